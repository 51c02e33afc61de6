"""What a cache is written over: files, and nothing else that may be at a path."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest
import torch
from cache_files import SMALL, assert_equal, fill

from kvq import KVQ
from kvq.errors import CacheFileError

posix = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no such things there")


def folder(path):
    path.mkdir()


def pipe(path):
    os.mkfifo(path)


def a_socket(path):
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(path))


def device(path):
    path.symlink_to("/dev/null")


PLACES = {"a folder": folder, "a pipe": pipe, "a socket": a_socket, "a device": device}


@posix
@pytest.mark.case("`save` to a pipe, a device, a folder, a socket", "CacheFileError; it stays what it is")
@pytest.mark.parametrize("linked", [False, True], ids=["itself", "through a link"])
@pytest.mark.parametrize("kind", PLACES)
def test_only_files_are_replaced(kind, linked, tmp_path):
    path = tmp_path / "place"
    PLACES[kind](path)
    before = stat.S_IFMT(path.stat().st_mode)
    asked = path
    if linked:
        asked = tmp_path / "link"
        asked.symlink_to(path)
    with pytest.raises(CacheFileError, match=f"cannot be written: it is {kind}, .* give the path of a file"):
        fill(KVQ(**SMALL), 40).save(asked)
    assert stat.S_IFMT(path.stat().st_mode) == before
    assert sorted(one.name for one in tmp_path.iterdir()) == sorted({"place", asked.name})
    with pytest.raises(CacheFileError, match=f"cannot be loaded: it is {kind}, and no file"):
        KVQ.load(asked)


@posix
def test_the_null_device_stays_one():
    with pytest.raises(CacheFileError, match="it is a device"):
        fill(KVQ(**SMALL), 40).save("/dev/null")
    assert Path("/dev/null").is_char_device()


@posix
def test_a_link_that_leads_nowhere_yet_and_one_in_a_circle(tmp_path):
    cache = fill(KVQ(**SMALL), 40)
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "cache.safetensors")
    cache.save(link)
    assert link.is_symlink()
    assert_equal(KVQ.load(tmp_path / "cache.safetensors"), cache)
    circle = tmp_path / "circle"
    circle.symlink_to(circle)
    with pytest.raises(CacheFileError, match="circle"):
        cache.save(circle / "cache.safetensors", token_ids=torch.zeros(2, 40, dtype=torch.int64))
