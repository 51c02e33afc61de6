"""Bad input at run time: each row of docs/bad-input.md, with the error and the words that stand there."""

import itertools
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import transformers
from transformers import DynamicCache

from kvq import KVQ, available_backends
from kvq.plugin_api import API_VERSION, BackendSpec, Capabilities
from kvq.testing.case import PLAIN

DOCS = Path(__file__).parents[1] / "docs" / "bad-input.md"
OURS = sorted(info.name for info in available_backends() if info.origin == "kvq")


def read_table():
    """Return what happens and the error, by input, as the document says."""
    lines = [line.strip("|\n ").split(" | ") for line in DOCS.read_text(encoding="utf-8").splitlines() if "|" in line]
    rows = {cells[0]: (cells[1], cells[2]) for cells in lines if len(cells) == 3 and cells[0] != "input"}
    assert len(rows) == len([cells for cells in lines if len(cells) == 3 and cells[0] != "input"]), "a row stands twice"
    return rows


TABLE = read_table()
ACTIONS = {}


def row(text, cache=None):
    """Register what a row of the table does; `cache` makes the cache that it is done to."""

    def register(action):
        ACTIONS[text] = (action, cache or held)
        return action

    return register


def states(tokens, batch=2, heads=2, key_dim=64, value_dim=64, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, heads, tokens, dim) for dim in (key_dim, value_dim)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def held(**fields):
    """Return a cache of two layers with sinks, stored tokens and a window."""
    cache = KVQ(**fields)
    for layer in range(2):
        cache.update(*states(300, seed=layer), layer)
    return cache


def empty(**fields):
    return KVQ(**fields)


def llama(layers=2, heads=2):
    return transformers.LlamaConfig(
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=heads,
        vocab_size=99,
        hidden_size=64,
        intermediate_size=32,
    )


def with_model():
    """Return a cache that a model has filled."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(llama()).eval()
    cache = KVQ(model=model)
    with torch.no_grad():
        model(torch.randint(0, 99, (2, 300)), past_key_values=cache)
    return cache


def snapshot(cache):
    """Return all that a refused update must leave alone: tokens, bits, bytes and versions."""
    layers = [layer for layer in cache.layers if layer.get_seq_length()]
    bits = [
        (
            layer.get_seq_length(),
            layer.kernel_cache.version,
            layer.keys.view(torch.int32),
            layer.values.view(torch.int32),
        )
        for layer in layers
    ]
    return bits, cache.memory().total_bytes, cache.config


def assert_unchanged(cache, before):
    bits, *others = snapshot(cache)
    assert others == list(before[1:])
    assert len(bits) == len(before[0])
    for found, expected in zip(bits, before[0], strict=True):
        assert found[:2] == expected[:2]
        assert torch.equal(found[2], expected[2])
        assert torch.equal(found[3], expected[3])


def expected_error(text):
    """Return the name of the class and the words of the message that the document promises, or None."""
    error = TABLE[text][1]
    if error == "none":
        return None
    match = re.fullmatch(r"`(\w+)`: (.+)", error)
    assert match, f"{error!r} is not `Class`: words"
    return match.groups()


def test_every_row_is_a_test_and_every_test_a_row():
    assert set(TABLE) == set(ACTIONS)
    assert len(TABLE) > 30


@pytest.mark.parametrize("text", TABLE)
def test_row(text):
    action, make = ACTIONS[text]
    error = expected_error(text)
    if error is None:
        action()
        return
    cache = make()
    before = snapshot(cache)
    with pytest.raises(Exception) as caught:  # noqa: PT011  # which one is what the table says
        action(cache)
    assert type(caught.value).__name__ == error[0]
    assert error[1] in str(caught.value)
    assert_unchanged(cache, before)
    if make is held:
        more = states(200, seed=7)
        for layer in range(2):
            cache.update(*more, layer)
        untouched = held()
        for layer in range(2):
            untouched.update(*more, layer)
        assert_unchanged(cache, snapshot(untouched))


# Refused.


@row("another batch size than before")
def _(cache):
    cache.update(*states(3, batch=3), 0)


@row("more sequences or beams than rows that are held")
def _(cache):
    cache.update(*states(3, batch=6), 0)


@row("a write to `layer.keys` or `layer.values`, or an assignment")
def _(cache):
    cache.layers[0].keys[:, :, -1:] = 0


@row("another number of heads")
def _(cache):
    cache.update(*states(3, heads=4), 0)


@row("another head dim")
def _(cache):
    cache.update(*states(3, value_dim=32), 0)


@row("another dtype")
def _(cache):
    cache.update(*states(3, dtype=torch.float16), 0)


@row("another device")
def _(cache):
    cache.update(*(side.to("meta") for side in states(3)), 0)


@row("keys and values of unequal length")
def _(cache):
    cache.update(states(3)[0], states(4)[1], 0)


@row("states without four dimensions")
def _(cache):
    cache.update(torch.zeros(2, 3, 64), torch.zeros(2, 3, 64), 0)


@row("a vector as states of a layer after the first")
def _(cache):
    cache.update(torch.zeros(64), torch.zeros(64), 1)


@row("something that is not a tensor")
def _(cache):
    cache.update(None, None, 0)


@row("no rows, no heads or no channels", empty)
def _(cache):
    cache.update(torch.zeros(2, 0, 3, 64), torch.zeros(2, 0, 3, 64), 0)


@row("integers as states")
def _(cache):
    for dtype in (torch.bool, torch.float64, torch.float8_e4m3fn):
        with pytest.raises(ValueError, match="cannot be quantized"):
            cache.update(*states(3, dtype=dtype), 0)
    cache.update(*states(3, dtype=torch.int64), 0)


def picky():
    capabilities = Capabilities(nbits=(2, 4), states_dtypes=("bfloat16",))
    return KVQ(backend=BackendSpec("picky", API_VERSION, capabilities, build=lambda spec, options: None))


@row("states of a dtype that the backend does not take", picky)
def _(cache):
    cache.update(*states(3), 0)


def small_groups():
    return KVQ(nbits_v=8, nbits_k=8, axis_value="per_token", q_group_size={"key": 64, "value": 2})


@row("groups so small that nothing is saved", small_groups)
def _(cache):
    cache.update(*states(3), 0)


@row("a layer that gets out of step with the one before it")
def _(cache):
    cache.update(*states(3), 1)


@row("a layer that is left out")
def _(cache):
    cache.update(*states(3), 3)


@row("a layer beyond the model", with_model)
def _(cache):
    cache.update(*states(3, key_dim=16, value_dim=16), 2)


@row("a negative layer")
def _(cache):
    cache.update(*states(3), -1)


@row("padding for another number of rows", lambda: KVQ(padding=[1, 0, 0]))
def _(cache):
    cache.update(*states(3), 0)


@row("negative padding", empty)
def _(cache):
    KVQ(padding=[-1, 0])


@row("one cache under a second model of another shape", with_model)
def _(cache):
    other = transformers.LlamaForCausalLM(llama(heads=4)).eval()
    with torch.no_grad():
        other(torch.randint(0, 99, (2, 5)), past_key_values=cache)


@row("one cache under a second model with more layers", lambda: KVQ(model=llama()))
def _(cache):
    other = transformers.LlamaForCausalLM(llama(layers=3)).eval()
    try:
        with torch.no_grad():
            other(torch.randint(0, 99, (2, 5)), past_key_values=cache)
    finally:
        assert cache.get_seq_length() == 5, "each of its layers is an update of its own"
        cache.reset()


def in_thread(function, *arguments):
    """Call a function in a thread of its own and return its result or raise its error."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(function, *arguments).result(timeout=60)


def in_the_middle_of_a_forward():
    """Return a cache whose first layer has the tokens that another thread brought, the second not yet."""
    cache = held(model=llama())
    in_thread(cache.update, *states(3), 0)
    return cache


@row("a second thread in the middle of a forward", in_the_middle_of_a_forward)
def _(cache):
    with pytest.raises(RuntimeError, match="another thread"):
        cache.update(*states(3), 1)
    cache.update(*states(3), 0)


@row("group sizes with little in common", lambda: KVQ(q_group_size={"key": 56, "value": 72}, axis_value="per_channel"))
def _(cache):
    cache.update(*states(3), 0)


@row("a write to keys that `update` returned", empty)
def _(cache):
    keys, _ = held().layers[0].update(*states(1), packed=True)
    keys[:, :, 0] = 7


@row("a crop by a positive number")
def _(cache):
    with pytest.raises(ValueError, match="positive"):
        filled_dynamic_cache().crop(5)
    cache.crop(5)


@row("rows beyond the batch in `reorder_cache`")
def _(cache):
    cache.reorder_cache(torch.tensor([7, 0]))


@row("states to read from a layer that holds none")
def _(cache):
    cache.materialize(5)


@row("keys that `update` returned, used after the cache changed", empty)
def _(cache):
    layer = held().layers[0]
    keys, _ = layer.update(*states(1), packed=True)
    layer.crop(-1)
    keys + 0


@contextmanager
def failing_quantizer(layer, error):
    """Make the quantizer of the values fail, after that of the keys has done its part."""
    quantizer = layer.side("value").codec.quantizer

    def fail(groups):
        raise error

    quantizer.encode = fail
    try:
        yield
    finally:
        del quantizer.encode


@row("a quantizer that raises in the middle of an update")
def _(cache):
    with failing_quantizer(cache.layers[0], ZeroDivisionError("division by zero")):
        cache.update(*states(200), 0)


@row("memory that runs out in a quantizer")
def _(cache):
    with failing_quantizer(cache.layers[0], torch.OutOfMemoryError("no room")):
        cache.update(*states(200), 0)


@row("a quantizer that breaks its contract")
def _(cache):
    quantizer = cache.layers[0].side("value").codec.quantizer
    encode = quantizer.encode

    def wrong(groups):
        codes, *metadata = encode(groups)
        return codes.int(), *metadata

    quantizer.encode = wrong
    try:
        cache.update(*states(200), 0)
    finally:
        del quantizer.encode


class WideCodes:
    group_local = True

    def encode(self, groups):
        codes = torch.full(groups.shape, 255, dtype=torch.uint8)
        return codes, torch.ones(groups.shape[:-1]), torch.zeros(groups.shape[:-1])


def with_wide_codes():
    spec = BackendSpec("wide", API_VERSION, Capabilities(nbits=(2, 4)), build=lambda spec, options: WideCodes())
    return KVQ(backend={"key": "quanto", "value": spec}, nbits_v=2, model=llama())


@row("codes with more bits than configured, or a scale that is not finite", with_wide_codes)
def _(cache):
    cache.update(*states(300), 0)


class FailingAtOnce:
    group_local = True

    def encode(self, groups):
        raise RuntimeError("the library is ill")


def failing_at_once():
    spec = BackendSpec("failing", API_VERSION, Capabilities(nbits=(2, 4)), build=lambda spec, options: FailingAtOnce())
    return KVQ(backend={"key": "quanto", "value": spec}, rotation_k="hadamard", model=llama())


@row("a first update that fails", failing_at_once)
def _(cache):
    try:
        cache.update(*states(300), 0)
    finally:
        assert not list(cache.layers[0].sides())
        without_model = KVQ(cache.config)
        with pytest.raises(RuntimeError, match="the library is ill"):
            without_model.update(*states(300), 0)
        assert not without_model.layers


# Taken.


@row("an empty update")
def _():
    cache = held()
    before = snapshot(cache)
    keys, values = cache.update(*states(0), 0)
    assert torch.equal(keys, cache.materialize(0)[0])
    assert torch.equal(values, cache.materialize(0)[1])
    after = snapshot(cache)
    assert after[1:] == before[1:]
    assert after[0][0][0] == 300
    assert torch.equal(after[0][0][2], before[0][0][2])


@row("an empty first update")
def _():
    cache = KVQ()
    keys, values = cache.update(*states(0, value_dim=32), 0)
    assert keys.shape == (2, 2, 0, 64)
    assert values.shape == (2, 2, 0, 32)
    assert cache.get_seq_length() == 0
    assert cache.memory().total_bytes == 64 + 32, "the signs of the rotations"
    with pytest.raises(ValueError, match="head_dim"):
        cache.update(*states(3), 0)
    cache.update(*states(300, value_dim=32), 0)
    assert torch.equal(cache.materialize(0)[0], held().materialize(0)[0])


def each_quantization():
    """Yield fields of a configuration: every backend of ours at its narrowest, at 4 and at its widest bits."""
    for info in available_backends(load=True):
        if info.origin == "kvq":
            widths = info.spec.capabilities.nbits
            for nbits in sorted({min(widths), 4, max(widths)}):
                yield dict(backend=info.name, nbits_k=nbits, nbits_v=nbits, sink_length=0, residual_length=0)


@row("a group without range")
def _():
    assert {"hqq", "quanto"} <= set(OURS)
    for fields in each_quantization():
        for rotation in ("none", "hadamard"):
            for value in (0.0, 3.7, -1e-6, 60000.0):
                cache = KVQ(**fields, rotation_k=rotation, rotation_v=rotation)
                constant = torch.full((2, 2, 128, 64), value, dtype=torch.float16)
                cache.update(constant, constant, 0)
                for side in cache.materialize(0):
                    error = (side.float() - constant.float()).abs().max()
                    assert error <= 2.0**-9 * abs(constant[0, 0, 0, 0]), (fields, rotation, value)


@row("the largest float16 of either sign")
def _():
    signs = torch.randint(0, 2, (2, 2, 128, 64), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    signs[1] = 1
    extremes = (signs * 65504).half()
    for fields in each_quantization():
        for rotation in ("none", "hadamard"):
            cache = KVQ(**fields, rotation_k=rotation, rotation_v=rotation)
            cache.update(extremes, extremes, 0)
            for side in cache.materialize(0):
                assert side.isfinite().all(), (fields, rotation)
                if rotation == "none":
                    assert (side.float() - extremes.float()).abs().max() <= 128, fields


def assert_it_stays_in_its_group(bad, magnitude):
    for fields in each_quantization():
        for rotation in ("none", "hadamard"):
            rotated = {**PLAIN, "axis_value": "per_token", "rotation_v": rotation}
            cache, clean = (KVQ(**fields, **rotated) for _ in range(2))
            keys, values = (side * magnitude for side in states(128))
            clean.update(keys, values, 0)
            keys[0, 1, 10, 3] = values[0, 1, 10, 3] = bad
            cache.update(keys, values, 0)
            for name, found, expected in zip(("key", "value"), cache.materialize(0), clean.materialize(0), strict=True):
                group = torch.zeros_like(found, dtype=torch.bool)
                group[(0, 1, slice(0, 64), 3) if name == "key" else (0, 1, 10)] = True
                assert found[group].isnan().all(), (fields, name)
                # hqq refines all groups of a call until their mean error stops falling: NaN ends that at once, and the
                # neighbours are rounded as they would be without it.
                off = (found - expected)[~group].abs().max()
                assert off <= magnitude * (10 if fields["backend"] == "hqq" else 1e-2), (fields, name)


def assert_it_stays_in_its_block(bad):
    """The rotation spreads it over its token, and so over the groups of all channels; balance alone does not."""
    for fields, rotation in itertools.product(each_quantization(), ("auto", "none")):
        lost = (0, 1, slice(64, 128)) if rotation == "auto" else (0, 1, slice(64, 128), 3)
        cache, clean = (KVQ(**fields, rotation_k=rotation, rotation_v=rotation) for _ in range(2))
        keys, values = states(192)
        clean.update(keys, values, 0)
        keys[0, 1, 74, 3] = values[0, 1, 74, 3] = bad
        cache.update(keys, values, 0)
        for found, expected in zip(cache.materialize(0), clean.materialize(0), strict=True):
            assert found[lost].isnan().all(), fields
            expected[lost] = torch.nan
            assert torch.equal(found.isnan(), expected.isnan()), fields
            found[0, 1, 64:128] = expected[0, 1, 64:128] = 0  # the factor of the token is that of its other elements
            if fields["backend"] != "hqq":  # see above
                assert torch.equal(found, expected), fields


@row("NaN")
def _():
    for magnitude in (1e-2, 1.0, 1000.0):
        assert_it_stays_in_its_group(float("nan"), magnitude)
    assert_it_stays_in_its_block(float("nan"))


@row("infinity")
def _():
    for magnitude in (1e-2, 1.0, 1000.0):
        assert_it_stays_in_its_group(float("inf"), magnitude)
        assert_it_stays_in_its_group(-float("inf"), magnitude)
    assert_it_stays_in_its_block(float("inf"))


@row("NaN in the window")
def _():
    cache, (keys, values) = KVQ(residual_length=128), states(100)
    keys[0, 0, 50, 3], values[1, 0, 9, 2] = float("nan"), float("inf")
    cache.update(keys, values, 0)
    assert torch.equal(cache.materialize(0)[0].view(torch.int32), keys.view(torch.int32))
    assert torch.equal(cache.materialize(0)[1], values)


@row("NaN in padding")
def _():
    keys, values = states(400)
    clean = KVQ(padding=[70, 0])
    clean.update(keys, values, 0)
    keys[0, :, :70] = values[0, :, :70] = float("nan")
    cache = KVQ(padding=[70, 0])
    cache.update(keys, values, 0)
    for found, expected in zip(cache.materialize(0), clean.materialize(0), strict=True):
        assert torch.equal(found, expected)
    short = KVQ(padding=[70, 0], residual_length=128)
    short.update(keys[:, :, :100], values[:, :, :100], 0)
    assert short.materialize(0)[0][0, :, :70].isnan().all()


def filled_dynamic_cache():
    cache = DynamicCache()
    cache.update(*states(300), 0)
    return cache


@row("a crop of more tokens than there are")
def _():
    ours, theirs = held(), filled_dynamic_cache()
    for cache in (ours, theirs):
        cache.crop(-1000)
        assert cache.get_seq_length() == 0
    new = states(5, seed=3)
    found, expected = ours.update(*new, 0), theirs.update(*new, 0)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@row("one cache under a second model of the same shape")
def _():
    logits = []
    for cache in (KVQ(residual_length=512), DynamicCache()):
        for seed in range(2):
            torch.manual_seed(seed)
            model = transformers.LlamaForCausalLM(llama()).eval()
            with torch.no_grad():
                logits.append(model(torch.arange(10)[None], past_key_values=cache).logits)
        assert cache.get_seq_length() == 20
    torch.testing.assert_close(logits[1], logits[3])


@row("layers in any order with `model=`")
def _():
    cache = KVQ(model=llama(), **PLAIN)  # each layer has a rotation of its own
    pair = states(300, key_dim=16, value_dim=16)
    cache.update(*pair, 1)
    cache.update(*pair, 0)
    assert torch.equal(cache.materialize(0)[0], cache.materialize(1)[0])


def generate_states(cache, seed):
    """Fill a cache as a forward does, many times."""
    for step in range(40):
        for layer in range(2):
            cache.update(*states(10, seed=seed + 2 * step + layer), layer)
    return cache


@row("two threads with a cache each")
def _():
    with ThreadPoolExecutor(max_workers=2) as pool:
        together = list(pool.map(generate_states, [KVQ(), KVQ()], [0, 1000]))
    for cache, seed in zip(together, [0, 1000], strict=True):
        assert_unchanged(cache, snapshot(generate_states(KVQ(), seed)))


@row("a cache that goes from thread to thread between forwards")
def _():
    cache, alone = held(model=llama()), held(model=llama())
    for _ in range(3):
        for layer in range(2):
            alone.update(*states(30, seed=layer), layer)
        in_thread(lambda: [cache.update(*states(30, seed=layer), layer) for layer in range(2)])
    assert_unchanged(cache, snapshot(alone))


def test_an_update_during_an_update_is_refused():
    cache = held()
    quantizer = cache.layers[0].side("key").codec
    encode, entered, go_on = quantizer.encode, threading.Event(), threading.Event()

    def wait(blocks):
        entered.set()
        assert go_on.wait(60)
        return encode(blocks)

    quantizer.encode = wait
    with ThreadPoolExecutor(max_workers=1) as pool:
        running = pool.submit(cache.update, *states(200), 0)
        assert entered.wait(60)
        with pytest.raises(RuntimeError, match="another thread is using this cache"):
            cache.update(*states(3), 0)
        go_on.set()
        running.result(timeout=60)
    del quantizer.encode
    expected = held()
    expected.update(*states(200), 0)
    assert_unchanged(cache, snapshot(expected))
