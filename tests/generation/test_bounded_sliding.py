"""Quantized layers that slide hold a window: they forget what no later query sees, and nothing else changes."""

from itertools import pairwise

import pytest
import torch
import transformers
from transformers import DynamicCache

from kvq import KVQ, attach
from kvq.errors import CacheStateError, StatesError
from kvq.layers.model_layers import DecoderConfig
from kvq.layers.quantized_layer import KVQLayer
from kvq.layers.sliding_layer import SlidingKVQLayer, choose_chunk_length
from kvq.store.cropped_groups import CroppedGroups
from kvq.store.sinks import SinkTokens

pytestmark = pytest.mark.filterwarnings("error:attention kernel")
"""A kernel that differs from the reference fails the test; with the warning the reference would take its place."""
WINDOW, LENGTH, PADDING, NEW = 96, 700, 126, 150
SHAPE = dict(
    vocab_size=99, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, head_dim=16,
    num_key_value_heads=2, tie_word_embeddings=False, pad_token_id=0, bos_token_id=1, eos_token_id=None,
)  # fmt: skip
MIXED = dict(sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"], **SHAPE)
MODELS = {
    "mistral": lambda: transformers.MistralConfig(sliding_window=WINDOW, **SHAPE),
    "gemma2": lambda: transformers.Gemma2Config(**MIXED),
    "gpt-oss": lambda: transformers.GptOssConfig(num_local_experts=2, num_experts_per_tok=2, **MIXED),
    "llama4": lambda: transformers.Llama4TextConfig(
        attention_chunk_size=WINDOW, layer_types=["chunked_attention", "full_attention"], num_local_experts=2,
        num_experts_per_tok=1, intermediate_size_mlp=64, **SHAPE,
    ),
}  # fmt: skip
FIELDS = dict(backend="native", nbits_k=4, nbits_v=4, residual_length=32, q_group_size=32, sliding="quantize")
EXACT = {**FIELDS, "residual_length": 4096}
LEAST_ERROR = 3e-3
"""Of quantizing, as a share of the range of the logits; the models show 3.5e-3 to 7e-2."""
PIECES = {
    "a prompt of many windows": [0, 500, 501, 502, 503, 640, LENGTH],
    "pieces shorter than a window": [*range(0, 201, 40), 223, 224, *range(240, LENGTH, 40), LENGTH],
}

TEXTS = list(zip(PIECES, [False, True], strict=True))


@pytest.fixture(scope="module", params=list(MODELS))
def model(request):
    return build(request.param)


def build(name, std=0.1):
    """Return a model; with large weights what it says is lively, with small ones an error of a state stays small."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(MODELS[name](), dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.dim() in (2, 3):
            torch.nn.init.normal_(parameter, std=std)
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=1.0)
    return model


def text(*, padded=False):
    ids = torch.randint(2, 99, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padded:
        ids[0, :PADDING] = mask[0, :PADDING] = 0
    return ids, mask


@torch.inference_mode()
def read(model, cache, ends, *, padded=False, watch=lambda cache: None):
    """Return the logits of a text that is read piece by piece."""
    ids, mask = text(padded=padded)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    logits = []
    for start, stop in pairwise(ends):
        given = dict(attention_mask=mask[:, :stop], position_ids=positions[:, start:stop])
        logits.append(model(ids[:, start:stop], past_key_values=cache, use_cache=True, **given).logits)
        watch(cache)
    found = torch.cat(logits, dim=1)
    return torch.cat([found[0, PADDING:], found[1]]) if padded else found.flatten(0, 1)


def sliding(cache):
    return [layer for layer in cache.layers if isinstance(layer, SlidingKVQLayer)]


def largest_held(layer):
    """The window, and what is behind it of a chunk that is not behind it as a whole."""
    return layer.window_length - 1 + layer.chunk_length - 1


def check_bound(cache):
    assert sliding(cache)
    for layer in sliding(cache):
        held = {side.store.length + side.window.length for _, side in layer.sides()}
        assert held == {layer.held_length}
        assert min(layer.get_seq_length(), layer.window_length - 1) <= layer.held_length <= largest_held(layer)


def assert_close(found, expected, bound=2e-5):
    assert (found - expected).abs().max() <= bound * (expected.max() - expected.min())


@pytest.mark.parametrize(("pieces", "padded"), TEXTS)
def test_exact_states_give_the_logits_of_full_precision(model, pieces, padded):
    ends = PIECES[pieces]
    expected = read(model, DynamicCache(config=model.config), ends, padded=padded)
    padding = [PADDING, 0] if padded else None
    found = read(model, KVQ(EXACT, model=model, padding=padding), ends, padded=padded, watch=check_bound)
    assert_close(found, expected)
    with attach(model, EXACT):
        assert_close(read(model, KVQ(EXACT, model=model), ends, padded=padded, watch=check_bound), expected)


@pytest.mark.parametrize("name", ["mistral", "gpt-oss"])
def test_generation_gives_the_tokens_of_full_precision(name):
    model = build(name, std=0.3)
    ids, mask = text(padded=True)
    asked = dict(attention_mask=mask[:, :300], max_new_tokens=NEW, do_sample=False)
    expected = model.generate(ids[:, :300], past_key_values=DynamicCache(config=model.config), **asked)
    assert len(expected[:, 300:].unique()) > 8
    assert torch.equal(model.generate(ids[:, :300], past_key_values=KVQ(EXACT, model=model), **asked), expected)
    with attach(model, EXACT) as attachment:
        assert torch.equal(model.generate(ids[:, :300], **asked), expected)
    check_bound(attachment.cache)
    assert attachment.cache.get_seq_length() == 300 + NEW - 1


@pytest.mark.parametrize("kernel", ["sdpa", "eager", "compiled"])
@pytest.mark.parametrize(("pieces", "padded"), TEXTS)
def test_quantized_it_reads_what_a_cache_of_all_tokens_reads(model, pieces, padded, kernel, monkeypatch):
    """Without `model=` a cache holds all tokens, and the mask hides those behind the window."""
    ends, padding = PIECES[pieces], [PADDING, 0] if padded else None
    expected = read(model, KVQ(FIELDS, padding=padding), ends, padded=padded)
    cache = KVQ(FIELDS, model=model, padding=padding)
    if kernel == "sdpa":
        found = read(model, cache, ends, padded=padded, watch=check_bound)
    else:
        monkeypatch.setenv("KVQ_ATTENTION_KERNEL", kernel)
        with attach(model, FIELDS):
            found = read(model, cache, ends, padded=padded, watch=check_bound)
    assert all(layer.dropped_length >= LENGTH - largest_held(layer) for layer in sliding(cache))
    assert all(layer.side("key").store.length for layer in sliding(cache))
    assert_close(found, expected, LEAST_ERROR / 10)


def test_a_longer_text_takes_no_more_bytes():
    model = build("mistral")
    sizes = []
    cache = KVQ(FIELDS, model=model)

    def watch(cache):
        check_bound(cache)
        sizes.append(cache.memory().total_bytes)

    read(model, cache, [*range(LENGTH + 1)], watch=watch)
    assert max(sizes[3 * WINDOW :]) <= max(sizes[: 3 * WINDOW])
    report = cache.memory()
    assert report.layers[0].tokens == LENGTH
    assert report.layers[0].full_precision_bytes == 2 * 2 * 2 * (WINDOW - 1) * 16 * 4, "that of transformers' own layer"


def test_chunks_are_an_eighth_of_the_window():
    assert [choose_chunk_length(window, 64) for window in (1, 64, 512, 1024, 1500, 4096)] == [64, 64, 64, 128, 128, 512]
    assert choose_chunk_length(4096, 96) == 384


@pytest.mark.parametrize("leaps", [(), (0, 20), (1, 2)])
@pytest.mark.parametrize("axis", ["per_channel", "per_token"])
def test_what_is_held_is_what_a_cache_of_all_tokens_holds(axis, leaps):
    """Bit for bit: in chunks that grow, with blocks of two lengths, after crops, and after pieces of many windows."""
    model = transformers.MistralConfig(sliding_window=1100, **SHAPE)
    fields = {**FIELDS, "axis_value": axis}
    ours, whole = KVQ(fields, model=model), KVQ(fields)
    generator, crops = torch.Generator().manual_seed(2), 0
    for turn in range(60):
        count = 4000 if turn in leaps else int(torch.randint(1, 150, (), generator=generator))
        states = torch.randn(1, 2, count, 16, generator=generator)
        for cache in (ours, whole):
            for layer in range(2):
                cache.update(states, -states, layer)
        check_bound(ours)
        layer = ours.layers[1]
        spare = layer.get_seq_length() - layer.window_length + 1 - layer.dropped_length
        if spare > 40 or not layer.dropped_length:
            crops += 1
            for cache in (ours, whole):
                cache.crop(-min(count, 41))
        for found, expected in zip(ours.materialize(1), whole.materialize(1), strict=True):
            assert torch.equal(found, expected[:, :, -found.shape[2] :])
    assert crops > 10
    assert layer.dropped_length > 1000
    assert layer.side("key").cropped.groups


def test_positions_count_from_the_first_token_held():
    cropped = CroppedGroups.at([32, 64, 96], torch.zeros(1, 1, 0, 4)).without_first(64)
    assert [group.start for group in cropped.groups] == [0, 32]
    sinks = SinkTokens(4, (0, 126), torch.zeros(2, 1, 4, 8))
    cut, gone = sinks.without_first(128), sinks.without_first(160)
    assert (cut.length, cut.starts, cut.states is sinks.states) == (4, (-128, -2), True), "two of one row are left"
    assert (gone.length, gone.starts, gone.states) == (0, (-160, -34), None)


def test_it_says_what_transformers_own_layer_says():
    model = build("gemma2")
    ours, theirs = KVQ(FIELDS, model=model), DynamicCache(config=model.config)
    assert ours.is_sliding == theirs.is_sliding
    for _ in range(9):
        for cache in (ours, theirs):
            states = torch.randn(2, 2, 23, 16)
            cache.update(states, states, 0)
        for tokens in (1, 7, 200):
            assert ours.get_mask_sizes(tokens, 0) == theirs.get_mask_sizes(tokens, 0)
        assert ours.get_seq_length(0) == theirs.get_seq_length(0)
        assert ours.layers[0].keys.shape == theirs.layers[0].keys.shape
        assert ours.layers[0].get_max_length() == theirs.layers[0].get_max_length()
    again = DynamicCache(list(ours)[:1])
    assert type(again.layers[0]) is type(theirs.layers[0])
    assert torch.equal(again.layers[0].keys, ours.materialize(0)[0])


def test_a_crop_past_what_is_held_is_refused():
    model = build("mistral")
    cache = KVQ(FIELDS, model=model)
    read(model, cache, [0, 400])
    layer = cache.layers[0]
    most = 400 - WINDOW + 1 - layer.dropped_length
    held = [one.clone() for one in cache.materialize(0)]
    with pytest.raises(CacheStateError, match=rf"the newest {most} can be removed.*snapshot"):
        cache.crop(-most - 1)
    assert cache.get_seq_length() == 400
    assert all(torch.equal(*pair) for pair in zip(held, cache.materialize(0), strict=True))
    with pytest.raises(StatesError, match="negative number"):
        cache.crop(3)
    cache.crop(-most)
    assert cache.get_seq_length() == 400 - most
    assert cache.materialize(0)[0].shape[2] == WINDOW - 1


def test_going_back_while_the_past_is_recorded_or_by_a_snapshot():
    model = build("gemma2")
    expected = read(model, KVQ(EXACT, model=model), [0, 300, 301, 430])[-2 * 430 :]
    cache = KVQ(EXACT, model=model)
    read(model, cache, [0, 300])
    snapshot = cache.snapshot()
    cache.activate_past_recording()
    other = torch.randint(2, 99, (2, 250))
    with torch.inference_mode():
        for piece in other.split(50, dim=1):
            model(piece, past_key_values=cache)
        cache.crop(-250)
        assert cache.get_seq_length() == 300
        ids = text()[0]
        found = model(ids[:, 300:430], past_key_values=cache).logits
    wanted = expected.unflatten(0, (2, 430))[:, 300:]
    assert_close(found, wanted)
    cache.restore(snapshot)
    with torch.inference_mode():
        assert_close(model(ids[:, 300:430], past_key_values=cache).logits, wanted)


def test_recording_is_bounded_too():
    cache = KVQ(FIELDS, model=build("mistral"))
    cache.activate_past_recording()
    for _ in range(40):
        states = torch.randn(1, 2, 50, 16)
        for layer in range(2):
            cache.update(states, states, layer)
    layer = cache.layers[0]
    assert layer.get_seq_length() == 2000
    assert layer.held_length <= largest_held(layer) + 256 + 50


def test_what_needs_all_tokens_is_refused():
    model = build("mistral")
    cache = KVQ(FIELDS, model=model)
    read(model, cache, [0, 250])
    with pytest.raises(CacheStateError, match="slid"):
        KVQ.concatenate([cache, cache.fork()], model=model)


ROWS = {
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([1, 0])), [1, 0]),
    "repeat": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1]),
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
}


@pytest.mark.parametrize("operation", list(ROWS))
def test_rows_and_forks_after_tokens_were_forgotten(operation):
    model = build("mistral")
    change, rows = ROWS[operation]
    ids, mask = text(padded=True)
    expected = read(model, KVQ(FIELDS, padding=[PADDING, 0]), [0, 200, 330, 331, 460], padded=True)
    cache = KVQ(FIELDS, model=model, padding=[PADDING, 0])
    read(model, cache, [0, 200, 330], padded=True)
    assert cache.layers[0].dropped_length
    fork = cache.fork()
    change(cache)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.inference_mode():
        for start, stop in ((330, 331), (331, 460)):
            given = dict(attention_mask=mask[rows, :stop], position_ids=positions[rows, start:stop])
            logits = model(ids[rows, start:stop], past_key_values=cache, **given).logits
    wanted = torch.stack([expected[: 460 - PADDING][-129:], expected[-129:]])
    assert_close(logits, wanted[rows])
    assert fork.get_seq_length() == 330
    assert fork.layers[0].held_length < 330


@pytest.mark.parametrize("given", ["model", "nothing"])
def test_saved_and_loaded(tmp_path, given):
    model = build("mistral")
    ends, more = [0, 200, 230], [230, 231, 500]
    cache = KVQ(FIELDS, model=model, padding=[PADDING, 0])
    read(model, cache, ends, padded=True)
    cache.save(tmp_path / "cache.safetensors")
    loaded = KVQ.load(tmp_path / "cache.safetensors", model=model if given == "model" else None)
    found, saved = (
        [(layer.dropped_length, layer.side("key").sinks.starts) for layer in held.layers] for held in (loaded, cache)
    )
    assert found == saved
    assert saved[0][0]
    ids, mask = text(padded=True)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.inference_mode():
        for start, stop in pairwise(more):
            fed = dict(attention_mask=mask[:, :stop], position_ids=positions[:, start:stop])
            one, other = (model(ids[:, start:stop], past_key_values=held, **fed).logits for held in (cache, loaded))
            assert torch.equal(one, other)
            check_bound(loaded)


def test_a_file_of_all_tokens_is_read_and_then_bounded(tmp_path):
    """As releases wrote it that held all tokens: without a window, and with nothing forgotten."""
    model = build("mistral")
    whole = KVQ(FIELDS)
    read(model, whole, [0, 400])
    whole.save(tmp_path / "cache.safetensors")
    loaded = KVQ.load(tmp_path / "cache.safetensors", model=model)
    assert [layer.held_length for layer in sliding(loaded)] == [400, 400]
    ids = text()[0]
    with torch.inference_mode():
        found = model(ids[:, 400:401], past_key_values=loaded).logits
        assert_close(found, model(ids[:, 400:401], past_key_values=whole).logits)
    check_bound(loaded)


def test_attention_to_an_encoder_sees_all_of_it():
    config = DecoderConfig.of(MODELS["mistral"]())
    layers = KVQ.of_decoder(KVQ(FIELDS).config, config, bounded=False).layers
    assert [type(layer) for layer in layers] == [KVQLayer] * 2
