"""A process that is killed while it saves leaves the old file or the new one, and nothing that looks like one."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from cache_files import SMALL, fill

from kvq import KVQ
from kvq.errors import CacheFileError
from kvq.files import atomic

HERE = Path(__file__).parent
# Saves in a process of its own for each moment, which ends at that call of the system: before it, after it, or, where
# it writes, after half of it.
SAVING = """
import os, sys
from pathlib import Path
sys.path[:0] = [sys.argv[1]]
from cache_files import SMALL, fill
from kvq import KVQ

path, new = Path(sys.argv[2]), fill(KVQ(backend="native", **SMALL), 90, seed=3)
old = path.read_bytes()
new.save(path)
expected = path.read_bytes()
assert KVQ.load(path).get_seq_length() == 90
CALLS = ("open", "write", "lseek", "fsync", "close", "replace")
def kill_at(moment, when):
    left = [moment]
    def wrapped(name, call):
        def counted(*arguments, **options):
            left[0] -= 1
            if left[0]:
                return call(*arguments, **options)
            if when == "half" and name == "write":
                call(arguments[0], arguments[1][: len(arguments[1]) // 2])
            if when == "after":
                call(*arguments, **options)
            os._exit(7)
        return counted
    for name in CALLS:
        setattr(os, name, wrapped(name, getattr(os, name)))

for when in ("before", "half", "after"):
    moment, status = 0, 7
    while status == 7:
        moment += 1
        path.write_bytes(old)
        child = os.fork()
        if not child:
            kill_at(moment, when)
            new.save(path)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        found = path.read_bytes()
        assert found in (old, expected), (when, moment)
        print(when, moment, status, "old" if found == old else "new", len(os.listdir(path.parent)))
        for other in path.parent.iterdir():
            if other != path:
                assert other.name.startswith(".") and other.suffix == ".kvq-unfinished", other
                other.unlink()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.costly
def test_killed_at_every_call_of_the_system(tmp_path):
    path = tmp_path / "cache.safetensors"
    fill(KVQ(backend="native", **SMALL), 70).save(path)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SAVING, str(HERE), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    for when in ("before", "half", "after"):
        states = [row[3] for row in rows if row[0] == when]
        assert len(states) > 20  # moments at which it was killed
        changes = [one != other for one, other in pairwise(states)]
        assert sum(changes) == 1, "first the old file, from some moment on the new one"
        assert (states[0], states[-1]) == ("old", "new")
    assert any(row[4] == "2" for row in rows), "no unfinished file was ever left, so that nothing was shown"


def test_the_data_is_on_the_disk_before_the_name_and_the_name_before_the_end(tmp_path, monkeypatch):
    calls = []
    for name in ("write", "fsync", "replace"):
        call = getattr(os, name)
        monkeypatch.setattr(atomic.os, name, lambda *a, call=call, name=name: (calls.append(name), call(*a))[1])
    fill(KVQ(backend="native", **SMALL), 70).save(tmp_path / "cache.safetensors")
    assert calls[-4:] == ["write", "fsync", "replace", "fsync"]
    assert calls.count("fsync") == 2


def test_a_save_that_fails_leaves_the_old_file_alone(tmp_path, monkeypatch):
    path = tmp_path / "cache.safetensors"
    fill(KVQ(backend="native", **SMALL), 70).save(path)
    old = path.read_bytes()

    def full(descriptor, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic.os, "write", full)
    with pytest.raises(CacheFileError, match=r"cannot be written: .*No space left"):
        fill(KVQ(backend="native", **SMALL), 90).save(path)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_goes_on_leading_to_the_file(tmp_path):
    target, link = tmp_path / "real.safetensors", tmp_path / "link.safetensors"
    fill(KVQ(backend="native", **SMALL), 70).save(target)
    link.symlink_to(target)
    fill(KVQ(backend="native", **SMALL), 90).save(link)
    assert link.is_symlink()
    assert KVQ.load(target).get_seq_length() == 90
