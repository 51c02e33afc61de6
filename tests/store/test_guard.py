"""What a backend's object must look like, and how what goes wrong in it is told."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kvq import KVQ
from kvq.errors import BackendFailedError, QuantizerContractError
from kvq.plugin_api import API_VERSION, BackendSpec, Capabilities, Part
from kvq.store import first_blocks
from kvq.store.guard import GuardedQuantizer


@pytest.fixture(autouse=True)
def nothing_seen(monkeypatch):
    monkeypatch.setattr(first_blocks, "_seen", set())


class Halves:
    """A right `Quantizer`: the states as eight-bit floating-point numbers."""

    block_length = 32
    group_local = True

    def layout(self):
        return {"halves": Part((32, 64), torch.float8_e4m3fn)}

    def encode(self, states):
        return {"halves": states.unflatten(2, (-1, 32)).to(torch.float8_e4m3fn)}

    def decode_into(self, parts, out):
        out.copy_(parts["halves"].to(out.dtype).flatten(2, 3))

    def constants(self):
        return {}


class Eighths:
    """A right `AffineQuantizer` of 4 bits."""

    group_local = True

    def encode(self, groups):
        low, high = groups.aminmax(dim=-1)
        scale = (high - low) / 15
        codes = ((groups - low[..., None]) / scale.clamp_min(1e-30)[..., None]).round().clamp(0, 15)
        return codes.to(torch.uint8), scale, low


def states(tokens=300, dtype=torch.float32):
    return torch.randn(2, 1, 2, tokens, 64, generator=torch.Generator().manual_seed(0)).to(dtype)


def make(build, nbits=4, **fields):
    """Return a cache whose values are quantized by what `build` builds, the keys by quanto."""
    spec = BackendSpec("toy", API_VERSION, Capabilities(nbits=(4, 8)), build=lambda spec, options: build())
    plain = dict(axis_value="per_token", rotation_v="none", residual_length=32, q_group_size=32)
    return KVQ(backend={"key": "quanto", "value": spec}, nbits_v=nbits, **plain, **fields)


def refuse(cache, error, words):
    """Check that an update is refused in these words, and that nothing of it stays."""
    with pytest.raises(error, match=words) as caught:
        cache.update(*states(), 0)
    assert not cache.layers
    assert cache.get_seq_length() == 0
    return caught.value


def without(base, *names, **attributes):
    """Return a class like `base` without some of its attributes."""
    kept = {name: value for name, value in vars(base).items() if name not in names and not name.startswith("__")}
    return type("Odd", (), {**kept, **attributes})


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (without(Halves, "constants"), r"toy.*Odd, which looks like a Quantizer but lacks constants\(\)$"),
        (
            without(Halves, "constants", constant=Halves.constants),
            r"lacks constants\(\) \(is constant meant for it\?\)",
        ),
        (without(Halves, "block_length", blocklength=32), r"lacks block_length \(is blocklength meant for it\?\)"),
        (without(Halves, "decode_into", "constants"), r"a Quantizer but lacks decode_into\(\) and lacks constants\(\)"),
        (without(Halves, block_length=0), "block_length=0, which is not a number of tokens"),
        (without(Halves, decode_into=lambda self, parts: None), "decode_into that cannot be called with 2 arguments"),
        (without(Halves, layout={}), "layout that cannot be called with 0 arguments"),
        (without(Eighths, "group_local"), r"looks like an AffineQuantizer but lacks group_local$"),
        (without(Eighths, encode=lambda self: None), "encode that cannot be called with 1 argument$"),
        (without(Eighths, group_local="yes"), "group_local='yes', which is not a bool"),
        (lambda: Halves, "build returned the class Halves; return an object of it"),
        (
            lambda: None,
            "a NoneType, which has neither the methods of AffineQuantizer nor those of Quantizer: for an Aff",
        ),
    ],
)
@pytest.mark.case(
    "a Quantizer of a plugin without constants(), with a misspelled method, or with methods of other arguments",
    "refused at the first update: which protocol it looks like, what it lacks, and the name that may be meant for it",
)
def test_a_near_miss_is_told(kind, words):
    error = refuse(make(kind), QuantizerContractError, words)
    assert "backend 'toy', layer 0, values" in str(error)


def test_what_keeps_a_protocol_is_taken():
    for kind in (Halves, Eighths):
        cache = make(kind)
        cache.update(*states(), 0)
        assert (cache.materialize(0)[1] - states()[1]).abs().max() < 0.3


def test_a_method_with_more_arguments_that_have_defaults_is_taken():
    make(without(Eighths, encode=lambda self, groups, verbose=False: Eighths.encode(self, groups))).update(*states(), 0)


def raising(name):
    def fail(self, *args):
        raise KeyError("the library is ill")

    return without(Halves, **{name: fail})


@pytest.mark.parametrize("operation", ["build", "layout", "constants", "encode"])
@pytest.mark.case(
    "build, layout, constants, encode or decode_into of a backend raising",
    "an error that names backend, layer, side and operation, from the backend's own; the cache is as it was",
)
def test_what_a_backend_raises_is_located(operation):
    def build():
        raise KeyError("the library is ill")

    cache = make(build if operation == "build" else raising(operation))
    words = f"backend 'toy', layer 0, values: {operation} failed: KeyError: 'the library is ill'"
    error = refuse(cache, BackendFailedError, words)
    assert isinstance(error.__cause__, KeyError)


def test_what_a_backend_raises_later_leaves_the_cache_as_it_was():
    cache = make(Halves)
    cache.update(*states(), 0)
    before, version = cache.materialize(0), cache.layers[0].kernel_cache.version
    inner = cache.layers[0].side("value").codec._inner

    def fail(*args):
        raise IndexError("past the end")

    inner.decode_into = fail
    with pytest.raises(BackendFailedError, match="toy', layer 0, values: decode_into failed: IndexError: past the end"):
        cache.materialize(0)
    inner.encode = fail
    with pytest.raises(BackendFailedError, match="encode failed: IndexError"):
        cache.layers[0].update(*states(200), packed=True)
    del inner.encode, inner.decode_into
    assert cache.layers[0].kernel_cache.version == version
    for found, expected in zip(cache.materialize(0), before, strict=True):
        assert torch.equal(found, expected)


def test_a_missing_library_keeps_its_own_error():
    def build():
        import no_such_library  # noqa: F401

    said = "'toy' is installed, but a library that it needs cannot be imported: No module named"
    refuse(make(build), ImportError, said)


@pytest.mark.parametrize("copy_of", [copy.deepcopy, KVQ.fork])
def test_a_guarded_quantizer_is_copied_as_one(copy_of):
    cache = KVQ(backend={"key": "quanto", "value": HALVES}, residual_length=32, q_group_size=32)
    cache.update(*states(), 0)
    other = copy_of(cache)
    assert torch.equal(other.materialize(0)[1], cache.materialize(0)[1])
    other.update(*states(100), 0)
    assert (other.get_seq_length(), cache.get_seq_length()) == (400, 300)
    quantizer = other.layers[0].side("value").codec
    for one in (quantizer, pickle.loads(pickle.dumps(quantizer))):  # noqa: S301  # our own bytes
        assert isinstance(one, GuardedQuantizer)
        assert one.kind is Halves


def build_halves(spec, options):
    return Halves()


HALVES = BackendSpec("halves", API_VERSION, Capabilities(nbits=(2, 4)), build=build_halves)


def wrong_affine(**changes):
    """Return a class whose codes, scale or offset are changed."""

    def encode(self, groups):
        encoded = dict(zip(("codes", "scale", "offset"), Eighths.encode(self, groups), strict=True))
        for name, change in changes.items():
            encoded[name] = change(encoded[name])
        return tuple(encoded.values())

    return without(Eighths, encode=encode)


def with_one(value):
    def change(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[-1] = value
        return tensor

    return change


INFINITE, NAN = float("inf"), float("nan")
WRONG_NUMBERS = {
    "code": (wrong_affine(codes=with_one(16)), r"Odd.encode returned the code 16; with 4 bits they go from 0 to 15"),
    "scale": (wrong_affine(scale=with_one(INFINITE)), "encode returned 1 of .* values of scale as inf"),
    "negative scale": (wrong_affine(scale=with_one(-INFINITE)), "values of scale as -inf"),
    "offset": (wrong_affine(offset=with_one(NAN)), "values of offset as nan"),
    "dtype": (wrong_affine(codes=lambda codes: codes.to(torch.int8)), "codes as torch.int8"),
    "shape": (wrong_affine(scale=lambda scale: scale[..., None]), r"scale as torch.float32 \["),
    "no tensor": (wrong_affine(offset=lambda offset: 0.0), "offset as a float"),
    "two": (without(Eighths, encode=lambda self, groups: Eighths.encode(self, groups)[:2]), "returned 2 things"),
    "None": (without(Eighths, encode=lambda self, groups: None), "returned a NoneType"),
    "blocks": (
        without(Halves, decode_into=lambda self, parts, out: out.fill_(NAN)),
        "decode_into returned numbers that are not finite for the parts of a finite block",
    ),
}


@pytest.mark.parametrize("name", WRONG_NUMBERS)
@pytest.mark.case(
    "codes over the bits, scale or offset that are inf or NaN, a representation that decodes to NaN",
    "refused in the first blocks of a process, with backend, layer and side",
)
def test_numbers_outside_the_contract_are_refused_at_once(name):
    kind, words = WRONG_NUMBERS[name]
    error = refuse(make(kind), QuantizerContractError, words)
    assert "backend 'toy', layer 0, values" in str(error)


@pytest.mark.parametrize("bad", [NAN, INFINITE, -INFINITE])
@pytest.mark.parametrize("kind", [Halves, Eighths])
@pytest.mark.case(
    "states with inf or NaN, of a model that is broken",
    "no backend is blamed: the group reads as NaN, and the next clean block is what a backend is judged by",
)
def test_states_that_are_not_finite_are_no_backends_fault(kind, bad):
    keys, values = states()
    values[:, :, 9::16, 3] = bad  # in every block
    cache = make(kind)
    cache.update(keys, values, 0)
    if kind is Eighths:
        assert cache.materialize(0)[1][0, 1, 9, 3].isnan()
    assert not any("toy" in seen for seen in first_blocks._seen)
    cache.update(*states(), 0)
    assert any("toy" in seen for seen in first_blocks._seen)


class Counter(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", [Halves, Eighths])
def test_later_blocks_cost_nothing_more(kind, monkeypatch):
    def operations(cache):
        with Counter() as counter:
            cache.layers[0].update(*states(64), packed=True)
        return counter.names

    cache = make(kind)
    cache.update(*states(), 0)
    second = operations(cache)
    monkeypatch.setattr(first_blocks, "check_first_codes", None)
    monkeypatch.setattr("kvq.store.affine.check_first_codes", lambda *args: None)
    monkeypatch.setattr("kvq.store.guard.check_first_blocks", lambda *args: None)
    cache = make(kind)
    cache.update(*states(), 0)
    assert second == operations(cache)


def test_a_layout_or_constants_outside_the_contract_are_refused():
    def odd(**changes):
        return without(Halves, **{name: lambda self, value=value: value for name, value in changes.items()})

    cases = [
        (odd(layout={}), "layout returned {}"),
        (odd(layout={"halves": (32, 64)}), r"layout has 'halves': \(32, 64\)"),
        (odd(layout={"halves": Part((32, 0), torch.float16)}), "sizes of at least 1"),
        (odd(constants=[]), "constants returned a list"),
        (odd(constants={"table": 3}), "something that is not a tensor"),
    ]
    for kind, words in cases:
        refuse(make(kind), QuantizerContractError, words)
