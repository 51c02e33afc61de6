"""Building the compiled kernel: once, kept on disk, and one clear line where it cannot be built."""

import ctypes
import logging
import os
import stat
import subprocess
import sys

import pytest

from kvq.attention.compiled import compiler, library
from kvq.attention.compiled.compiler import BuildError, build_library

HAS_COMPILER = library.find_problem() is None
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="no C compiler")


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "answer.c"
    path.write_text("int answer(void) { return 42; }\n", encoding="utf-8")
    return path


@needs_compiler
def test_a_file_is_built_once_and_kept(source, monkeypatch, caplog):
    with caplog.at_level(logging.INFO, logger="kvq"):
        built = build_library(source)
    assert ctypes.CDLL(str(built)).answer() == 42
    assert "compiled answer.c in" in caplog.text
    assert list(built.parent.iterdir()) == [built], "nothing is left over"
    assert stat.S_IMODE(built.parent.stat().st_mode) == 0o700
    monkeypatch.setattr(compiler, "_compile", None)
    assert build_library(source) == built


@needs_compiler
def test_another_source_compiler_or_processor_is_another_file(source, monkeypatch):
    built = {build_library(source)}
    monkeypatch.setattr(compiler, "_processor", lambda: "another")
    built.add(build_library(source))
    source.write_text("int answer(void) { return 43; }\n", encoding="utf-8")
    built.add(build_library(source))
    monkeypatch.setenv("CC", "gcc -DX" if compiler.shutil.which("gcc") else "cc -DX")
    built.add(build_library(source))
    assert len(built) == 4


@needs_compiler
def test_the_process_keeps_its_denormal_numbers(source):
    """Linked with -ffast-math, a library would flush them for everybody."""
    code = (
        "from kvq.attention.compiled.library import get_library; get_library(); "
        "import torch; assert (torch.tensor(1e-40) * 1).item() > 0"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300, env={**os.environ})


@needs_compiler
def test_a_compiler_that_fails_is_quoted(source):
    source.write_text("int answer(void) { return nothing; }\n", encoding="utf-8")
    with pytest.raises(BuildError, match=r"failed on answer\.c: .*"):
        build_library(source)


def test_without_a_compiler_one_line_says_so(source, monkeypatch, caplog):
    monkeypatch.setattr(compiler.shutil, "which", lambda name: None)
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(BuildError, match="there is no C compiler"):
        build_library(source)
    library._load_once.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, logger="kvq"):
            assert (
                library.find_problem()
                == library.find_problem()
                == "there is no C compiler (cc, gcc, clang) on the PATH"
            )
        assert len(caplog.records) == 1
        with pytest.raises(BuildError):
            library.get_library()
    finally:
        library._load_once.cache_clear()


def test_a_named_compiler_that_is_missing_is_named(source, monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler -O2")
    with pytest.raises(BuildError, match="'no-such-compiler -O2', which the variable CC names"):
        build_library(source)


def test_nowhere_to_write_is_an_answer_too(source, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(compiler, "find_compiler", lambda: (sys.executable,))
    with pytest.raises(BuildError, match="cannot be kept in"):
        build_library(source)
