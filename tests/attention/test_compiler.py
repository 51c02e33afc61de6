"""Which compiler is called, with what, and one clear line where there is none or it makes nothing of use."""

import ctypes
import os
import subprocess
import sys

import pytest
import torch

from kvq.attention.dispatch.kernel_cache import KernelCache
from kvq.attention.entry import attend_packed
from kvq.attention.kernels.compiled import compiler, library
from kvq.attention.kernels.compiled.compiler import BuildError, Toolchain, find_toolchain
from kvq.attention.kernels.compiled.kept_library import provide_library
from kvq.encoding import library as encode_library

CC = next((name for name in ("gcc", "cc", "clang") if compiler.shutil.which(name)), None)
needs_compiler = pytest.mark.skipif(library.why_unavailable() is not None, reason="no C compiler")


@pytest.fixture(autouse=True)
def variables(monkeypatch):
    """The compiler on the path, whatever the suite was started with."""
    for name in ("CC", "KVQ_CC", "KVQ_KERNEL_CFLAGS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "answer.c"
    path.write_text("int answer(void) { return 42; }\n", encoding="utf-8")
    return path


@pytest.fixture
def pretend(tmp_path):
    """Make a program that stands where a compiler should."""

    def make(*lines, name="pretend"):
        path = tmp_path / name
        path.write_text("\n".join(["#!/bin/sh", *lines, ""]), encoding="utf-8")
        path.chmod(0o755)
        return path

    return make


@pytest.fixture
def unloaded():
    """The libraries are looked for anew, here and afterwards: what quantizes is loaded beside what attends."""
    loaders = (library._load_once, encode_library._load_once)
    for load in loaders:
        load.cache_clear()
    yield
    for load in loaders:
        load.cache_clear()


@needs_compiler
def test_another_source_compiler_flags_or_processor_is_another_file(source, monkeypatch):
    built = {provide_library(source).path}
    monkeypatch.setattr(compiler, "describe_processor", lambda: "another")
    built.add(provide_library(source).path)
    source.write_text("int answer(void) { return 43; }\n", encoding="utf-8")
    built.add(provide_library(source).path)
    monkeypatch.setenv("CC", f"{CC} -DX")
    built.add(provide_library(source).path)
    monkeypatch.setenv("KVQ_CC", f"{CC} -DY")
    built.add(provide_library(source).path)
    monkeypatch.setenv("KVQ_KERNEL_CFLAGS", "-O1 -DZ")
    built.add(provide_library(source).path)
    assert len({path.name.split("-")[1] for path in built}) == 6


def test_flags_of_the_user_take_the_place_of_those_for_the_processor(source, monkeypatch, pretend):
    monkeypatch.setenv("KVQ_CC", str(pretend('printf "%s\\n" "$*" >> "$0.calls"', "exit 1")))
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setenv("KVQ_KERNEL_CFLAGS", "-march=x86-64 -DX='a b'")
    with pytest.raises(BuildError, match="pretend failed on"):
        provide_library(source)
    calls = source.with_name("pretend.calls").read_text(encoding="utf-8").splitlines()
    assert len(calls) == 2
    assert calls[0] == "--version"
    assert " -march=x86-64 -DX=a b " in calls[1]
    assert "native" not in calls[1]


def test_native_flags_are_tried_in_turn(source, monkeypatch, pretend):
    program = pretend('printf "%s\\n" "$*" >> "$0.calls"', "exit 1")
    monkeypatch.setenv("CC", str(program))
    with pytest.raises(BuildError):
        provide_library(source)
    calls = source.with_name("pretend.calls").read_text(encoding="utf-8")
    assert calls.count("-march=native") == calls.count("-mcpu=native") == 1
    assert len(calls.splitlines()) == 4


@needs_compiler
@pytest.mark.costly
def test_the_process_keeps_its_denormal_numbers():
    """Linked with -ffast-math, a library would flush them for everybody."""
    code = (
        "from kvq.attention.kernels.compiled.library import get_library; get_library(); "
        "import torch; assert (torch.tensor(1e-40) * 1).item() > 0"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300, env={**os.environ})


@needs_compiler
def test_a_compiler_that_fails_is_quoted(source):
    source.write_text("int answer(void) { return nothing; }\n", encoding="utf-8")
    with pytest.raises(BuildError, match=r"failed on answer\.c: .*"):
        provide_library(source)


@pytest.mark.usefixtures("unloaded")
def test_without_a_compiler_one_line_says_so(monkeypatch, caplog):
    monkeypatch.setattr(compiler.shutil, "which", lambda name: None)
    with caplog.at_level("WARNING", logger="kvq"):
        assert (
            library.why_unavailable()
            == library.why_unavailable()
            == "there is no C compiler (cc, gcc, clang) on the PATH"
        )
    assert len(caplog.records) == 1
    with pytest.raises(BuildError):
        library.get_library()


USELESS = {
    "gcc '": r"the variable CC is \"gcc '\", which is not a command: No closing quotation",
    "no-such-compiler -O2": "the C compiler 'no-such-compiler -O2', which the variable CC names, is not there",
    "''": r"the C compiler \"''\", which the variable CC names, is not there",
    "/": "the C compiler '/', which the variable CC names, is not there",
    "WRITES NOTHING": "reported success and wrote no library",
    "WRITES GARBAGE": "reported success, but wrote no library that can be loaded: .*(invalid ELF|too short|header)",
    "WRITES HALF": "reported success, but wrote no library that can be loaded",
    "SPEAKS LATIN": "failed on attend.c: d\ufffdfaut",
}
NO_COMPILERS = {
    "WRITES NOTHING": ["exit 0"],
    "WRITES GARBAGE": ['while [ "$1" != -o ]; do [ $# -gt 0 ] || exit 0; shift; done', 'echo garbage > "$2"'],
    # The first pages of a true library: loading it kills the process with SIGBUS or SIGSEGV.
    "WRITES HALF": [
        'while [ "$1" != -o ]; do [ $# -gt 0 ] || exit 0; shift; done',
        f'head -c 20000 "{torch.__path__[0]}/lib/libtorch_cpu.so" > "$2"',
    ],
    "SPEAKS LATIN": ['[ "$1" = --version ] && exit 0', "printf 'd\\351faut\\n' >&2", "exit 1"],
}


@pytest.mark.case("CC names no compiler", "attention falls back to the reference, with the reason")
@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize("command", USELESS)
def test_what_is_no_compiler_is_a_reason_and_no_crash(
    command, monkeypatch, tmp_path, pretend, make_request, reference, error_of
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", str(pretend(*NO_COMPILERS[command])) if command in NO_COMPILERS else command)
    request, kernel_cache = make_request(), KernelCache()
    assert error_of(attend_packed(request, kernel_cache), reference(request)) < 1e-5
    assert kernel_cache.last_reader == "eager"
    with pytest.raises(BuildError, match=USELESS[command]):
        library.get_library()
    assert kernel_cache.passed_over["compiled"] == library.why_unavailable()
    assert not list((tmp_path / "kvq" / "kernels").glob("*")), "nothing of it is kept"


@pytest.mark.parametrize("blank", ["", "   "])
def test_an_empty_variable_is_none(monkeypatch, blank):
    monkeypatch.setattr(compiler.shutil, "which", lambda name: f"/usr/bin/{name}" if name == "cc" else None)
    for name in ("CC", "KVQ_CC", "KVQ_KERNEL_CFLAGS"):
        monkeypatch.setenv(name, blank)
    assert find_toolchain() == Toolchain(("cc",))


@needs_compiler
def test_what_a_compiler_made_can_be_called(source):
    built = provide_library(source)
    assert ctypes.CDLL(str(built.path)).answer() == 42


def test_a_compiler_that_cannot_be_run_is_a_reason(source, monkeypatch, tmp_path):
    damaged = tmp_path / "damaged"
    damaged.write_bytes(b"\x7fELF, but no more of it")
    damaged.chmod(0o755)
    monkeypatch.setenv("CC", str(damaged))
    with pytest.raises(BuildError, match=r"damaged cannot be run: .*Exec format error"):
        provide_library(source)
    with pytest.raises(BuildError, match="cannot be run: embedded null byte"):
        Toolchain(("cc\0",), ((),)).fingerprint(b"")
