"""A model that transformers splits over two processes: the same tokens, and half of the cache in each."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).parent / "tensor_parallel_run.py"


def results(command, folder):
    """What each rank left in `folder`. Not what it printed: the ranks share one output, and their lines may mix."""
    folder.mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, *map(str, command), folder], env=environment, timeout=400, check=True)
    return [json.loads(path.read_text()) for path in sorted(folder.glob("rank*.json"))]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
@pytest.mark.costly
def test_two_processes(tmp_path):
    (whole,) = results([RUN, "whole"], tmp_path / "whole")
    run = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port()]
    halves = results([*run, RUN, "split"], tmp_path / "split")
    assert min(len(set(row)) for row in whole["tokens"]) >= 8
    assert whole["stored"] > 0
    assert len(halves) == 2
    for half in halves:
        assert half["tokens"] == whole["tokens"]
        assert half["heads"] * 2 == whole["heads"]
        assert half["packed"] * 2 == whole["packed"]
        assert half["bytes"] * 2 == whole["bytes"]
        assert half["loaded"] == half["packed"]
