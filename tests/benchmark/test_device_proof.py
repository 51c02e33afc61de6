"""The proof of a kernel on a device, with a kernel and a stopwatch that are made up."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from gpu_tables import COLUMNS, _row
from optional_triton import needs_triton

from kvq.attention.kernels.eager.kernel import REFERENCE
from kvq.attention.kernels.triton.kernel import TRITON, _find_missing_triton
from kvq.attention.kernels.triton.way import Way, find_forced_way
from kvq.attention.proving.samples import Sample
from kvq.benchmark.device_proof.correctness import SAMPLES, SHAPES, WIDTHS, compare_all
from kvq.benchmark.device_proof.record import prove_device, write_record
from kvq.benchmark.device_proof.timing import SIZES, find_best_way, make_step, time_full_precision, time_sizes
from kvq.watcher import Nobody

CPU = torch.device("cpu")
SMALL = (Sample(), Sample(bits=(2, 2), stored=400))
SLOW_WAY, FAST_WAY = Way(2, 1, None, 4), Way(4, 1, 128, 6)


class MadeUp:
    """The reference under another name, which may be wrong."""

    name, needs_benchmark = "made-up", True

    def __init__(self, error=0.0):
        self.error = error

    def source_digest(self):
        return "of nothing"

    def why_unsupported(self, request):
        return "not two bits" if request.pair.key.store.codec.spec.nbits == 2 else None

    def attend(self, request):
        return REFERENCE.attend(request) * (1 + self.error)


class Stopwatch:
    """Calls once, and returns what it was told: less for one way, most for full precision."""

    def __init__(self):
        self.ways = []

    def __call__(self, action):
        action()
        self.ways.append(find_forced_way())
        return {SLOW_WAY: 40.0, FAST_WAY: 20.0, None: 50.0}[self.ways[-1]]


def test_every_width_and_shape_is_compared():
    assert {sample.bits for sample in WIDTHS} == {(bits, bits) for bits in range(1, 9)}
    assert {sample.head_dim for sample in SHAPES} >= {64, 80, 96, 128, 256}
    assert {sample.sharing for sample in SHAPES} >= {1, 2, 4, 8, 16}
    assert len(set(SAMPLES)) == len(SAMPLES)
    served = [TRITON.why_unsupported(sample.build(CPU)) is None for sample in (*WIDTHS, *SHAPES)]
    assert all(served) or _find_missing_triton() is not None


def test_sizes_go_from_4k_to_128k_and_from_one_row_to_32():
    assert {length for _, length in SIZES} == {2**power for power in range(12, 18)}
    assert {batch for batch, _ in SIZES} == {1, 8, 32}


def test_a_request_that_the_kernel_does_not_serve_is_left_out():
    (found,) = compare_all(MadeUp(), CPU, Nobody(), SMALL)
    assert found.is_right
    assert found.sample == SMALL[0]


def prove(kernel, bench, **changes):
    def time_few(*args):
        return time_sizes(*args, ways=(SLOW_WAY, FAST_WAY), tuned=((1, 300),))

    options = dict(samples=SMALL, time_all=time_few, sizes=((1, 300), (2, 500)))
    return prove_device(kernel, CPU, Nobody(), bench=bench, **{**options, **changes})


def test_ways_are_tried_at_one_size_and_the_best_at_all(tmp_path):
    bench = Stopwatch()
    record = prove(MadeUp(), bench)
    assert bench.ways == [None, None, SLOW_WAY, FAST_WAY, None, None, FAST_WAY]
    assert record["best_way"] == dict(warps=4, stages=1, registers=128, programs_per_processor=6)
    assert record["speedup"] == 50 / 20
    assert (record["compared"], record["wrong"], record["relative_error"]) == (1, [], 0.0)
    sizes = [(one["batch"], one["length"], one["kernel_us"]) for one in record["ways"]]
    assert sizes == [(1, 300, 40.0), (1, 300, 20.0), (2, 500, 20.0)]
    path = write_record(record, tmp_path / "record.json")
    assert json.loads(path.read_text()) == record
    assert len(_row(record["ways"][0])) == len(COLUMNS), "what docs/speed.md makes of a committed record"


def test_nothing_is_timed_of_a_kernel_that_is_wrong():
    bench = Stopwatch()
    record = prove(MadeUp(error=1e-3), bench)
    assert (len(record["wrong"]), record["ways"], record["speedup"], bench.ways) == (1, [], None, [])
    assert record["relative_error"] == pytest.approx(1e-3, rel=0.01)


def test_a_size_without_memory_is_skipped():
    calls = []

    def bench(action):
        calls.append(action)
        if len(calls) > 4:
            raise torch.OutOfMemoryError
        return 1.0

    record = prove(MadeUp(), bench)
    assert record["ways"][-1] == {"batch": 2, "length": 500, "skipped": "the device has too little memory"}
    assert record["speedup"] == 1.0


def test_the_best_way_is_the_least_behind_over_all_sizes():
    def entry(length, way, kernel_us):
        names = dict(warps=way.warps, stages=1, registers=way.registers, programs_per_processor=4)
        return {"batch": 1, "length": length, "kernel_us": kernel_us, **names}

    first, second, third = (Way(warps, 1, None, 4) for warps in (1, 2, 4))
    found = [
        *(entry(1, way, time) for way, time in ((first, 10), (second, 12), (third, 30))),
        *(entry(2, way, time) for way, time in ((first, 900), (second, 330), (third, 300))),
    ]
    assert find_best_way(found, (first, second, third)) == second
    assert find_best_way([*found, {"batch": 9, "length": 9, "skipped": ""}], (first,)) == first
    assert find_best_way([], (first,)) is None


def test_a_step_and_the_buffer_have_the_same_tokens():
    request = make_step(2, 5000, CPU)
    assert request.pair.key.length == 5000
    assert request.pair.key.store.length > 4800
    seen = []

    def bench(action):
        seen.append(action().shape)
        return len(seen)

    assert time_full_precision(request.query, 2, 5000, bench) == {"packed queries": 1, "enable_gqa": 2}
    assert seen == [(2, 8, 4, 128), (2, 32, 1, 128)]


INTERPRETED = """
import json, torch
from kvq.attention.kernels.triton.kernel import TRITON
from kvq.attention.kernels.triton.way import Way, find_forced_way
from kvq.benchmark.device_proof.correctness import SAMPLES
from kvq.benchmark.device_proof.record import prove_device
from kvq.benchmark.device_proof.timing import time_sizes
from kvq.watcher import Nobody

def bench(action):
    action()
    way = find_forced_way()
    return 9.0 if way is None else float(way.warps)

def time_few(*args):
    ways = (Way(4, 2, 128, 4), Way(2, 1, None, 6))
    return time_sizes(*args, ways=ways, tuned=((1, 200),))

# The interpreter computes products of bfloat16 on other numbers.
samples = [one for one in SAMPLES if one.dtypes == (torch.float32,) * 3 and one.stored < 1000]
record = prove_device(
    TRITON, torch.device("cpu"), Nobody(), bench=bench, samples=samples[::2], time_all=time_few,
    sizes=((1, 200), (2, 200)),
)
print(json.dumps(record))
"""


@pytest.mark.costly
@needs_triton
def test_the_triton_kernel_is_proved_under_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-W", "ignore", "-c", INTERPRETED]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    assert record["compared"] >= 6
    assert record["wrong"] == []
    assert 0 < record["relative_error"] < 1e-4
    assert record["best_way"]["warps"] == 2
    assert record["speedup"] == 9.0 / 2.0
    assert [(one["batch"], one["warps"]) for one in record["ways"]] == [(1, 4), (1, 2), (2, 2)]
