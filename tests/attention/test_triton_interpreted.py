"""The Triton kernel computes attention: under Triton's interpreter, against float64."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from optional_triton import needs_triton

from kvq import KVQ
from kvq.attention.dispatch.kernel_registry import get_kernel_registry
from kvq.attention.dispatch.request import AttentionRequest
from kvq.attention.kernels.triton.chunk_table import get_chunk_table
from kvq.attention.kernels.triton.kernel import TRITON, _find_missing_triton
from kvq.errors import CacheStateError
from kvq.layers.fixed_step import FixedStep

SCRIPT = Path(__file__).with_name("interpreted_triton.py")
SUPPORT = Path(__file__).parents[1] / "support"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def errors():
    """Return the largest error of each case, relative to its largest output."""
    paths = [str(SUPPORT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-W", "ignore", str(SCRIPT)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@needs_triton
@pytest.mark.costly
def test_every_case_is_attention_by_its_definition(errors):
    assert len(errors) >= 30
    assert {name: error for name, error in errors.items() if not isinstance(error, float)} == {}
    bounds = {name: 1e-3 if name.endswith("float16") else 5e-6 for name in errors}
    assert {name: error for name, error in errors.items() if not error <= bounds[name]} == {}


FIXED_STEPS = Path(__file__).with_name("interpreted_fixed_steps.py")
ON_THE_DEVICE = {
    *(
        "empty.memory_format",
        "empty",
        "zeros",
        "view",
        "reshape",
        "_unsafe_view",
        "unsqueeze",
        "expand",
        "slice",
        "select",
    ),
    *("unbind", "transpose", "permute", "t", "alias", "clone", "contiguous", "empty_like", "new_empty"),
    *("mm", "bmm", "matmul", "add_", "add", "mul", "div", "index_copy_", "_to_copy"),
}
"""Operations that start work on the device or none; `_to_copy` from one dtype to another."""


@needs_triton
@pytest.mark.costly
def test_a_step_at_fixed_addresses_asks_the_host_nothing():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-W", "ignore", str(FIXED_STEPS)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["error"] <= 5e-6
    assert (seen["runs"], seen["refreshes"]) == (74, 2), "all steps but those that flush"
    assert seen["same"] == [True, True], "the layer holds what one without captures holds"
    assert seen["launches"] == {"attend_parts": 1, "combine": 1}, "one launch each, with the same arguments every time"
    assert {name.removeprefix("aten::") for name in seen["operations"]} <= ON_THE_DEVICE
    assert not seen["after a crop"]
    assert "outgrown 256 tokens" in seen["outgrown"]


@needs_triton
def test_fixed_addresses_are_refused_where_they_could_not_stay():
    cache = KVQ(backend="native", nbits_k=4, nbits_v=4, residual_length=32)
    states = torch.randn(1, 2, 150, 64)
    cache.update(states[:, :, :20], states[:, :, :20], 0)
    for count, room, reason in ((0, 64, "nothing is quantized yet"), (130, 32, "more than the room of 32")):
        cache.update(states[:, :, :count], states[:, :, :count], 0)
        with pytest.raises(CacheStateError, match=reason):
            FixedStep(cache.layers[0], torch.randn(1, 4, 1, 64), 0.1, room)


@needs_triton
def test_a_token_that_the_layer_took_by_itself_is_taken_over_first():
    cache = KVQ(backend="native", nbits_k=4, nbits_v=4, residual_length=32)
    states = torch.randn(2, 2, 150, 64)
    cache.update(states, states, 0)
    step = FixedStep(cache.layers[0], torch.randn(2, 4, 1, 64), 0.1, 1024)
    cache.layers[0].update(states[:, :, :1], states[:, :, :1])
    assert not step.may_run()
    step.refresh()
    assert step.may_run()
    assert step._length.tolist() == [150 - 64 + 1]


@needs_triton
def test_a_layer_that_waits_for_its_turn_has_room_for_the_tokens_that_wait():
    pytest.importorskip("hqq")
    cache = KVQ(backend="hqq", nbits_k=4, nbits_v=4, residual_length=32)
    states = torch.randn(1, 2, 184, 64)
    for layer_idx in range(2):
        cache.update(states, states, layer_idx)
    layer = cache.layers[1]
    step = FixedStep(layer, torch.randn(1, 4, 1, 64), 0.1, 1024)
    assert step.may_run()
    while not layer.will_flush(1):
        layer.update(states[:, :, :1], states[:, :, :1])
        step.refresh()
    assert layer.side("key").window.length == 32 + 63 + layer.flush_delay > 32 + 64
    assert torch.equal(layer.materialize()[0][:, :, 64:184], states[:, :, 64:])


@needs_triton
def test_a_window_that_outgrows_its_room_is_refused():
    cache = KVQ(backend="native", nbits_k=4, nbits_v=4, residual_length=32)
    states = torch.randn(1, 2, 150, 64)
    cache.update(states, states, 0)
    layer = cache.layers[0]
    step = FixedStep(layer, torch.randn(1, 4, 1, 64), 0.1, 1024)
    cache.activate_past_recording()
    layer.update(states[:, :, :20], states[:, :, :20])
    assert layer.side("key").window.length > 96
    with pytest.raises(CacheStateError, match="window has 106 tokens"):
        step.refresh()
    with pytest.raises(CacheStateError, match="window has 106 tokens"):
        FixedStep(layer, torch.randn(1, 4, 1, 64), 0.1, 1024)


@needs_triton
@pytest.mark.parametrize("taken", [0, 1])
def test_what_was_forked_stays_when_the_window_is_filled_again(taken):
    cache = KVQ(backend="native", nbits_k=4, nbits_v=4, residual_length=32)
    states = torch.randn(1, 2, 150, 64)
    cache.update(states, states, 0)
    layer = cache.layers[0]
    step = FixedStep(layer, torch.randn(1, 4, 1, 64), 0.1, 1024)
    if taken:
        layer.update(states[:, :, :taken], states[:, :, :taken])
    fork = layer.fork()
    before = [held.clone() for held in fork.materialize()]
    layer.update(states[:, :, :30], states[:, :, :30])
    step.refresh()
    assert layer.side("key").store.length == 128
    assert all(map(torch.equal, fork.materialize(), before))


@needs_triton
@pytest.mark.parametrize("change", ["reorder_cache", "batch_select_indices", "reset"])
def test_other_tensors_in_their_place_end_a_capture(change):
    cache = KVQ(backend="native", nbits_k=4, nbits_v=4, residual_length=32)
    states = torch.randn(2, 2, 150, 64)
    cache.update(states, states, 0)
    layer = cache.layers[0]
    step = FixedStep(layer, torch.randn(2, 4, 1, 64), 0.1, 1024)
    assert step.may_run()
    getattr(layer, change)(*([] if change == "reset" else [torch.tensor([1, 0][: 2 if "order" in change else 1])]))
    assert not step.may_run()
    with pytest.raises(CacheStateError, match="and capture it"):
        step.refresh()


def make_request(dtype=torch.float32, head_dim=64, queries=1, groups=4, tokens=400, new=True, mask=None, **fields):
    cache = KVQ({"backend": "native", **fields})
    states = torch.randn(1, 2, tokens, head_dim, dtype=dtype)
    cache.update(states, states, 0)
    fresh = states[:, :, :queries]
    pair = cache.layers[0].update(fresh, fresh, packed=True)[0].pair
    if not new:
        pair = type(pair)(*(side.view() for _, side in cache.layers[0].sides()), pair.kernel_cache)
    return AttentionRequest(torch.randn(1, 2 * groups, queries, head_dim, dtype=dtype), pair, mask, scaling=1.0)


@needs_triton
@pytest.mark.parametrize(
    ("asked", "obstacle"),
    [
        ({}, None),
        ({"tokens": 60}, "nothing is quantized yet"),
        ({"head_dim": 288, "q_group_size": 96}, "head dims above 256"),
        ({"head_dim": 256, "q_group_size": 128}, "registers"),
        ({"queries": 17}, "64 query vectors"),
        ({"queries": 2, "new": False}, "not the newest"),
        ({"q_group_size": 48, "tokens": 800}, "powers of two"),
        ({"q_group_size": {"key": 64, "value": 32}}, "shorter than the blocks"),
        ({"axis_value": "per_token", "q_group_size": {"key": 64, "value": 32}}, None),
        ({"sink_length": 80}, "64 sinks"),
        ({"mask": torch.zeros(1, 1, 1, 401)}, "not boolean"),
        ({"mask": torch.ones(1, 8, 1, 401, dtype=torch.bool)}, "differs by head"),
    ],
)
def test_what_it_cannot_serve_is_left_to_the_reference(asked, obstacle):
    found = TRITON.why_unsupported(make_request(**asked))
    assert found is None if obstacle is None else obstacle in (found or "")


def test_it_is_no_default_without_a_record_and_never_runs_on_a_cpu(monkeypatch):
    monkeypatch.setattr("kvq.attention.dispatch.standing.device_class", lambda device: "cuda-sm90")
    cuda, registry = torch.device("cuda", 0), get_kernel_registry()
    assert "KVQ_ATTENTION_KERNEL=triton" in (registry.why_not_default(TRITON, cuda) or "")
    assert registry.why_not_default(TRITON, cuda, is_wanted=True) is None
    monkeypatch.setenv("KVQ_ATTENTION_KERNEL", "triton")
    assert registry.choose(make_request()).passed_over["triton"] == "runs on cuda only"


@needs_triton
def test_it_is_not_for_other_gpus_that_torch_calls_cuda(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.1")
    _find_missing_triton.cache_clear()
    assert TRITON.why_unavailable() == "is for NVIDIA GPUs"
    monkeypatch.undo()
    _find_missing_triton.cache_clear()
    assert TRITON.why_unavailable() is None


def test_nothing_is_uploaded_between_flushes(monkeypatch):
    import kvq.attention.kernels.triton.chunk_table as module

    uploads, original = [], module._upload
    monkeypatch.setattr(module, "_upload", lambda table, device: uploads.append(1) or original(table, device))
    cache = KVQ(backend="native")
    states = torch.randn(1, 2, 400, 64)
    layer_states = states[:, :, :1]
    cache.update(states, states, 0)
    counts = []
    for _ in range(130):
        pair = cache.layers[0].update(layer_states, layer_states, packed=True)[0].pair
        table = get_chunk_table(pair, CPU)
        counts.append(len(uploads))
        assert table.stored_length.item() == pair.key.store.length
    flushes = len(set(counts)) - 1
    assert flushes == 2
    assert counts[-1] == (1 + flushes) * counts[0] > 0


def test_the_table_points_at_every_stored_block():
    cache = KVQ(backend="native", nbits_k=7)
    for count in (200, 300, 64, 1000):
        states = torch.randn(2, 2, count, 64)
        cache.update(states, states, 0)
    cache.layers[0].reorder_cache(torch.tensor([1, 0]))
    pair = cache.layers[0].update(states[:, :, :1], states[:, :, :1], packed=True)[0].pair
    found = get_chunk_table(pair, CPU)
    for view, table in ((pair.key.store, found.key), (pair.value.store, found.value)):
        places = [(segment, block) for segment in view.segments for block in range(segment.used)]
        for (segment, block), row in zip(places, table.blocks.tolist(), strict=True):
            widths = sorted((int(name[6:]) for name in segment.parts if name.startswith("codes_")), reverse=True)
            names = [*(f"codes_{width}" for width in widths), "scale", "mid", "exponent", "factor"]
            addresses = [segment.parts[name][0, 0, block].data_ptr() for name in names if name in segment.parts]
            assert [address for address in row[:7] if address] == addresses
            assert row[7:] == [segment.capacity, segment.rows.data_ptr()]
    assert len(pair.key.store.segments) > 2
