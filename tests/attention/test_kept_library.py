"""The compiled kernel on disk: built once, found again, and harmless whatever has become of the file."""

import ctypes
import hashlib
import json
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from kvq.attention.kernels.compiled import kept_library, library
from kvq.attention.kernels.compiled.compiler import BuildError, Toolchain
from kvq.attention.kernels.compiled.kept_library import load_library, provide_library
from kvq.attention.kernels.compiled.structures import IN_ORDER
from kvq.attention.machine import kept_files

pytestmark = pytest.mark.skipif(library.why_unavailable() is not None, reason="no C compiler")

STAND_IN = (
    "long kvq_sizes(long which) {{ long sizes[] = {{{}}}; return sizes[which]; }}\n"
    "int kvq_attend(void *request) {{ return 0; }}\n"
)
"""What a kernel must have to be taken for one, and compiles in no time."""


def write_stand_in(path, *, smaller=0):
    sizes = ", ".join(str(ctypes.sizeof(one) - smaller) for one in IN_ORDER)
    path.write_text(STAND_IN.format(sizes), encoding="utf-8")
    return path


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return write_stand_in(tmp_path / "answer.c")


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache" / "kvq" / "kernels"


def test_a_file_is_built_once_and_kept(source, folder, monkeypatch, caplog):
    with caplog.at_level("INFO", logger="kvq"):
        built = provide_library(source)
    assert ctypes.CDLL(str(built.path)).kvq_attend(None) == 0
    assert "compiled answer.c in" in caplog.text
    assert list(folder.iterdir()) == [built.path], "nothing is left over"
    assert stat.S_IMODE(folder.stat().st_mode) == stat.S_IMODE(folder.parent.stat().st_mode) == 0o700
    monkeypatch.setattr(Toolchain, "compile", None)
    again = provide_library(source)
    assert (again.path, again.is_new) == (built.path, False)


def cut(path):
    path.write_bytes(path.read_bytes()[:5000])


def zero(path):
    path.write_bytes(bytes(path.stat().st_size))


def zero_the_end(path):
    path.write_bytes(path.read_bytes()[:4096] + bytes(path.stat().st_size - 4096))


def empty(path):
    path.write_bytes(b"")


def replace_by_another(path):
    path.write_bytes(Path(torch._C.__file__).read_bytes())


def let_others_write(path):
    path.chmod(0o666)


def grow_beyond_memory(path):
    """A sparse file, which takes no room on disk."""
    os.truncate(path, 2**42)


def link_elsewhere(path):
    path.rename(path.with_suffix(".moved"))
    path.symlink_to(path.with_suffix(".moved"))


DAMAGES = [cut, zero, zero_the_end, empty, replace_by_another, let_others_write, grow_beyond_memory, link_elsewhere]


@pytest.mark.case("a damaged kernel in the cache folder", "it is detected before it is loaded, and built again")
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_built_anew(source, damage):
    built = provide_library(source)
    whole = built.path.read_bytes()
    damage(built.path)
    again = provide_library(source)
    assert again.is_new
    assert again.path == built.path
    assert again.path.read_bytes() == whole
    assert not again.path.is_symlink()
    assert stat.S_IMODE(again.path.stat().st_mode) == 0o600
    assert not provide_library(source).is_new


LOAD_EACH = """
import json, os, sys
from pathlib import Path
from kvq.attention.kernels.compiled import library
from kvq.attention.kernels.compiled.kept_library import provide_library
library.SOURCE = Path(sys.argv[1])
path = provide_library(library.SOURCE).path
whole, ends = path.read_bytes(), []
for damaged in (whole[:5000], bytes(len(whole)), whole[:4096] + bytes(len(whole) - 4096), b""):
    child = os.fork()
    if not child:
        path.write_bytes(damaged)
        os._exit(library.get_library().attend(None))
    ends.append(os.waitpid(child, 0)[1])
print(json.dumps(ends))
"""


@pytest.mark.case("a truncated or zeroed kernel under a forward", "no SIGBUS: the process goes on")
@pytest.mark.costly
def test_no_damaged_file_kills_the_process(source):
    command = [sys.executable, "-c", LOAD_EACH, str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [0, 0, 0, 0]


@pytest.fixture
def as_kernel(source, monkeypatch):
    """Make the stand-in the source of the kernel."""
    monkeypatch.setattr(library, "SOURCE", source)
    return source


def put_under_its_own_digest(path, data):
    """Put bytes where they pass for a whole library."""
    stem = "-".join(path.stem.split("-")[:2])
    path.unlink()
    path.with_name(f"{stem}-{hashlib.sha256(data).hexdigest()[:32]}.so").write_bytes(data)


@pytest.mark.case("a foreign library under the kernel's name", "it is replaced")
def test_a_library_without_the_symbols_is_built_once_more(as_kernel, folder, tmp_path):
    other = tmp_path / "other.c"
    other.write_text("int answer(void) { return 42; }\n", encoding="utf-8")
    foreign, built = provide_library(other), provide_library(as_kernel)
    put_under_its_own_digest(built.path, foreign.path.read_bytes())
    foreign.path.unlink()
    assert load_library(library.SOURCE, library._open).attend(None) == 0
    assert list(folder.iterdir()) == [built.path]


def test_a_source_without_the_symbols_is_a_reason(as_kernel):
    as_kernel.write_text("int answer(void) { return 42; }\n", encoding="utf-8")
    for _ in range(2):  # built, then kept and built once more
        with pytest.raises(BuildError, match=r"is not the library that was to be built: .*kvq_attend"):
            load_library(library.SOURCE, library._open)


def test_other_sizes_of_the_structures_are_a_reason(as_kernel):
    write_stand_in(as_kernel, smaller=8)
    for _ in range(2):
        with pytest.raises(BuildError, match="lays out States in another way than Python's ctypes"):
            load_library(library.SOURCE, library._open)
    write_stand_in(as_kernel)
    assert load_library(library.SOURCE, library._open).attend(None) == 0


def assert_held_for_this_process(source, caplog, reason):
    with caplog.at_level("WARNING", logger="kvq"):
        built = provide_library(source)
    assert [one.message for one in caplog.records] == [
        f"the compiled kernel is built again in every process, since it cannot be kept: {reason}"
    ]
    assert stat.S_IMODE(built.scratch.stat().st_mode) == 0o700
    assert ctypes.CDLL(str(built.path)).kvq_attend(None) == 0
    built.release()
    assert not built.scratch.exists()


def test_a_file_where_the_folder_should_be(source, tmp_path, caplog):
    (tmp_path / "cache").write_text("", encoding="utf-8")
    assert_held_for_this_process(source, caplog, f"[Errno 20] Not a directory: '{tmp_path}/cache/kvq'")


def test_a_disk_that_is_full(source, folder, monkeypatch, caplog):
    keep_file = kept_library.keep_file

    def fill(target, data):
        if target.parent == folder:
            raise OSError(28, "No space left on device")
        keep_file(target, data)

    monkeypatch.setattr(kept_library, "keep_file", fill)
    assert_held_for_this_process(source, caplog, "[Errno 28] No space left on device")
    monkeypatch.setattr(kept_library, "keep_file", lambda target, data: fill(folder / "any", data))
    with pytest.raises(BuildError, match=r"cannot be kept: .*No space left.*; nor in a temporary folder: .*No space"):
        provide_library(source)


def test_what_fails_half_way_leaves_nothing_behind(tmp_path, monkeypatch):
    target = tmp_path / "file"
    kept_files.keep_file(target, b"old")

    def fail(descriptor):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(kept_files.os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output"):
        kept_files.keep_file(target, b"new")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


def test_file_and_folder_are_synced(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync
    monkeypatch.setattr(
        kept_files.os, "fsync", lambda fd: synced.append(stat.S_IFMT(os.fstat(fd).st_mode)) or fsync(fd)
    )
    kept_files.keep_file(tmp_path / "file", b"data")
    assert synced == [stat.S_IFREG, stat.S_IFDIR]


def test_what_a_killed_process_left_is_removed_later(source, folder):
    provide_library(source).discard()
    fresh, stale = folder / ".a.1.unfinished", folder / ".b.2.unfinished"
    for path in (fresh, stale):
        path.write_bytes(b"")
    os.utime(stale, (0, 0))
    built = provide_library(source)
    assert sorted(folder.iterdir()) == sorted([fresh, built.path])


def test_a_folder_of_ours_that_is_open_to_others_is_closed(source, folder):
    built = provide_library(source)
    for path in (folder, folder.parent):
        path.chmod(0o777)
    assert not provide_library(source).is_new
    assert stat.S_IMODE(folder.stat().st_mode) == stat.S_IMODE(folder.parent.stat().st_mode) == 0o755
    assert built.path.exists()


def test_nothing_is_loaded_from_a_folder_of_another_user(source, folder, monkeypatch, caplog):
    provide_library(source)
    owner = os.geteuid()
    monkeypatch.setattr(kept_files.os, "geteuid", lambda: owner + 1)
    assert_held_for_this_process(source, caplog, f"{folder.parent} belongs to another user, or others may write to it")


def test_nothing_is_loaded_from_below_a_folder_that_everybody_may_change(source, folder, caplog):
    provide_library(source)
    base = folder.parent.parent
    base.chmod(0o777)
    assert_held_for_this_process(
        source, caplog, f"everybody may write to {base}, and so put another folder in the place of {folder}"
    )
    base.chmod(0o1777)
    assert not provide_library(source).is_new, "as in /tmp, where only the owner may rename"


def test_no_home(source, monkeypatch, caplog):
    def fail():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(kept_files.Path, "home", fail)
    reason = "there is no home folder, and XDG_CACHE_HOME is not set: Could not determine home directory."
    assert_held_for_this_process(source, caplog, reason)


@pytest.mark.parametrize("text", ["", "  ", "relative/folder"])
def test_what_is_no_folder_counts_as_not_set(source, monkeypatch, tmp_path, text):
    monkeypatch.setenv("XDG_CACHE_HOME", text)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert provide_library(source).path.parent == tmp_path / "home" / ".cache" / "kvq" / "kernels"


def test_several_at_once_build_the_same(source, folder):
    built = []
    threads = [threading.Thread(target=lambda: built.append(provide_library(source))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({one.path for one in built}) == 1
    assert list(folder.iterdir()) == [built[0].path]
