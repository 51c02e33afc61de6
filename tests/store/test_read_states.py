"""`layer.keys` and `layer.values`: they read like tensors, and no write to them is lost in silence."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812  # as everybody calls it

from kvq import KVQ
from kvq.errors import CacheStateError, StatesError
from kvq.store.read_states import ReadStates


@pytest.fixture
def cache():
    generator = torch.Generator().manual_seed(0)
    cache = KVQ(backend="native", residual_length=32)
    cache.update(*torch.randn(2, 2, 2, 200, 64, generator=generator), 0)
    return cache


@pytest.fixture
def layer(cache):
    return cache.layers[0]


def assign_item(keys):
    keys[:, :, -1:] = 0


def add_in_place(keys):
    keys += 1


def shift_in_place(keys):
    keys **= 2


def set_data(keys):
    keys.data = torch.zeros(1)


WRITES = {
    "an item": assign_item,
    "an operator": add_in_place,
    "another operator": shift_in_place,
    "mul_": lambda keys: keys.mul_(2),
    "copy_": lambda keys: keys.copy_(torch.zeros(())),
    "zero_ of a slice": lambda keys: keys[:, :, -1:].zero_(),
    "zero_ of a view of a view": lambda keys: keys.transpose(1, 2)[:, 5].unflatten(-1, (8, 8)).zero_(),
    "zero_ of an expanded one": lambda keys: torch.broadcast_tensors(keys, torch.zeros(2, 2, 200, 64))[0].zero_(),
    "zero_ of a part": lambda keys: keys.split(50, dim=2)[1].zero_(),
    "zero_ of an unbound row": lambda keys: next(iter(keys)).zero_(),
    "zero_ of .data": lambda keys: keys.data.zero_(),
    "zero_ of .mT": lambda keys: keys.mT.zero_(),
    "zero_ of detach()": lambda keys: keys.detach().zero_(),
    "zero_ of what is its own kind": lambda keys: keys.contiguous().float().to("cpu").zero_(),
    "index_copy_": lambda keys: keys.index_copy_(2, torch.tensor([0]), torch.zeros(2, 2, 1, 64)),
    "masked_fill_ by keyword": lambda keys: torch.Tensor.masked_fill_(keys, mask=keys > 0, value=0.0),
    "out=": lambda keys: torch.add(torch.ones(()), 1, out=keys),
    "out= of several": lambda keys: torch.aminmax(torch.ones(3, 4), dim=0, out=(keys, torch.empty(4))),
    "a function named like one": lambda keys: torch.relu_(keys),
    "inplace=True": lambda keys: F.relu(keys, inplace=True),
    "an operator of aten": lambda keys: torch.ops.aten.mul_(keys, 2),
    "an overload of aten": lambda keys: torch.ops.aten.add.out(keys, 1, out=keys),
    "foreach": lambda keys: torch._foreach_mul_([keys], 2),
    "a shallow copy": lambda keys: copy.copy(keys).zero_(),
    "an initializer": lambda keys: torch.nn.init.normal_(keys),
    "setting .data": set_data,
}


@pytest.mark.case("`layer.keys[:, :, -1:] = x`, `layer.values.mul_(2)`, `out=layer.keys`", "CacheStateError")
@pytest.mark.parametrize("side", ["keys", "values"])
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_write_is_refused_and_changes_nothing(cache, layer, write, side):
    before = cache.materialize(0)
    with pytest.raises(CacheStateError, match=rf"the {side} of layer 0.*cache\.materialize\(layer_idx\)"):
        write(getattr(layer, side))
    assert all(torch.equal(one, other) for one, other in zip(cache.materialize(0), before, strict=True))


@pytest.mark.parametrize("side", ["keys", "values"])
def test_an_assignment_of_anything_but_states_is_refused(layer, side):
    with pytest.raises(StatesError, match=r"layer 0: key states have shape \[1\]"):
        setattr(layer, side, torch.zeros(1))


def test_an_array_of_it_cannot_be_written_to(layer):
    for array in (layer.keys.numpy(), np.asarray(layer.keys), layer.keys[:, :, -1].numpy()):
        with pytest.raises(ValueError, match="read-only"):
            array[:] = 0


def test_what_it_is_written_into_is_written_to(layer):
    keys = layer.keys
    buffer = torch.zeros(2, 2, 200, 64)
    buffer.copy_(keys)
    assert torch.equal(buffer, keys)
    buffer[:, :, :5] = keys[:, :, 5:10]
    buffer.add_(keys)
    torch.mul(keys, 2, out=buffer)
    assert torch.equal(buffer, keys.clone() * 2)
    buffer.index_copy_(2, torch.tensor([3]), keys[:, :, :1])
    torch._foreach_add_([buffer], [keys])
    assert type(buffer) is torch.Tensor


READS = {
    "cat": lambda keys: torch.cat([keys, keys], dim=2),
    "arithmetic": lambda keys: keys[:, :, 3:7] * 2 + 1,
    "index": lambda keys: keys[torch.tensor([1, 0])],
    "clone": lambda keys: keys.clone(),
    "another dtype": lambda keys: keys.to(torch.bfloat16),
    "repeat_interleave": lambda keys: keys.repeat_interleave(2, dim=1),
    "attention": lambda keys: F.scaled_dot_product_attention(torch.ones(2, 2, 1, 64), keys, keys),
    "matmul": lambda keys: torch.ones(2, 2, 1, 64) @ keys.transpose(-1, -2),
    "deepcopy": copy.deepcopy,
    "pickle": lambda keys: pickle.loads(pickle.dumps(keys)),  # noqa: S301  # our own bytes
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_what_is_computed_from_it_is_plain_and_can_be_written_to(cache, layer, read):
    keys, plain = layer.keys, cache.materialize(0)[0]
    found, expected = read(keys), read(plain)
    assert type(found) is torch.Tensor
    assert torch.equal(found, expected)
    found.zero_()
    assert torch.equal(keys, plain)


def test_it_reads_like_a_tensor(cache, layer, tmp_path):
    keys, plain = layer.keys, cache.materialize(0)[0]
    assert isinstance(keys, ReadStates)
    assert (keys.shape, keys.dtype, keys.device, keys.dim()) == (plain.shape, plain.dtype, plain.device, 4)
    assert keys[0, 0, 0].tolist() == plain[0, 0, 0].tolist()
    assert keys.max().item() == plain.max().item()
    assert [type(one) for one in keys.topk(2)] == [torch.Tensor] * 2
    assert "layer" not in repr(keys[0, 0, 0])
    assert not keys.requires_grad_(False).requires_grad
    saved = io.BytesIO()
    torch.save({"keys": keys}, saved)
    saved.seek(0)
    assert torch.equal(torch.load(saved)["keys"], plain)


def test_reading_makes_no_second_copy(layer):
    """The one tensor that reading has always made is the one that is shown."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Sizes(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.found = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            self.found.append(str(func))
            return result

    with Sizes() as shown:
        keys = layer.keys
    with Sizes() as own:
        layer.side("key").view().materialize()
    assert shown.found.count("aten.empty.memory_format") == own.found.count("aten.empty.memory_format") > 0
    with Sizes() as read:
        assert keys.shape[2] == 200
        view = keys[:, :, 5:]
    assert set(read.found) <= {"aten.slice.Tensor", "aten.alias.default"}
    assert view.untyped_storage().data_ptr() == keys.untyped_storage().data_ptr()
