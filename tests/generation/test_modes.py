"""Every way in which the installed transformers generates by itself, beside DynamicCache."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers import DynamicCache
from transformers.generation import GenerationMode
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GENERATION_MODES_MAPPING

from kvq import KVQ, attach
from kvq.errors import ModelError
from kvq.layers.quantized_layer import KVQLayer

EXACT = dict(residual_length=2048)
QUANTIZED = dict(nbits_k=4, nbits_v=4, residual_length=32, q_group_size=32)
SAMPLED = dict(do_sample=True, temperature=0.9, top_k=20)

BATCHED = {
    "greedy": (GenerationMode.GREEDY_SEARCH, dict(do_sample=False)),
    "greedy, chunked prefill": (GenerationMode.GREEDY_SEARCH, dict(do_sample=False, prefill_chunk_size=70)),
    "sampling": (GenerationMode.SAMPLE, SAMPLED),
    "sampling, three sequences": (GenerationMode.SAMPLE, dict(**SAMPLED, num_return_sequences=3)),
    "beam search": (GenerationMode.BEAM_SEARCH, dict(do_sample=False, num_beams=3)),
    "beam search, two sequences": (
        GenerationMode.BEAM_SEARCH,
        dict(do_sample=False, num_beams=3, num_return_sequences=2),
    ),
    "beam sampling": (GenerationMode.BEAM_SAMPLE, dict(**SAMPLED, num_beams=3)),
}
ASSISTED = {
    "prompt lookup": dict(prompt_lookup_num_tokens=5, max_matching_ngram_size=1),
    "draft model": dict(assistant_model="draft"),
    "draft model, sampling": dict(assistant_model="draft", **SAMPLED),
    "early exit": dict(assistant_early_exit=1),
}
NEEDS_CODE_FROM_A_HUB = {mode for mode, function in GENERATION_MODES_MAPPING.items() if "/" in function}


@pytest.fixture
def draft(llama):
    """A model that agrees with `llama` most of the time."""
    model = copy.deepcopy(llama)
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        parameter.data += 0.02 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    model.generation_config.num_assistant_tokens = 5
    model.generation_config.num_assistant_tokens_schedule = "constant"
    model.generation_config.assistant_confidence_threshold = 0.0
    return model


@pytest.fixture
def lookup_prompt():
    """A prompt that repeats itself, so that what comes next can be looked up; long enough for flushes."""
    generator = torch.Generator().manual_seed(4)
    phrase = torch.randint(2, 199, (1, 40), generator=generator)
    return phrase.repeat(1, 6)


def seeded(model, prompt, **settings):
    torch.manual_seed(11)
    return model.generate(prompt, max_new_tokens=24, pad_token_id=0, **settings)


def test_every_mode_that_needs_no_code_from_a_hub_is_tested_here():
    tested = {mode for mode, _ in BATCHED.values()} | {GenerationMode.ASSISTED_GENERATION}
    assert set(GENERATION_MODES_MAPPING) == set(GenerationMode), "modes that have no function"
    assert tested == set(GenerationMode) - NEEDS_CODE_FROM_A_HUB


@pytest.mark.parametrize("way", ["cache", "attach"])
@pytest.mark.parametrize("name", BATCHED)
def test_the_tokens_are_those_of_dynamic_cache(llama, prompts, name, way, assert_telling):
    mode, settings = BATCHED[name]
    assert transformers.GenerationConfig(**settings).get_generation_mode() == mode
    reference = seeded(llama, prompts, **settings)
    assert_telling(reference[:, 300:])
    if way == "cache":
        assert torch.equal(seeded(llama, prompts, past_key_values=KVQ(**EXACT), **settings), reference)
    else:
        with attach(llama, **EXACT):
            assert torch.equal(seeded(llama, prompts, **settings), reference)


@pytest.mark.parametrize("way", ["cache", "attach"])
@pytest.mark.parametrize("name", ASSISTED)
@pytest.mark.case(
    "drafts: prompt lookup, a draft model, early exit",
    "the tokens of DynamicCache",
    report="huggingface/transformers#30413",
)
def test_assisted_tokens_are_those_of_dynamic_cache(llama, draft, lookup_prompt, name, way, assert_telling):
    settings = {key: draft if value == "draft" else value for key, value in ASSISTED[name].items()}
    reference = seeded(llama, lookup_prompt, **settings)
    assert_telling(reference[:, 240:])
    if way == "cache":
        cache = KVQ(**EXACT)
        assert torch.equal(seeded(llama, lookup_prompt, past_key_values=cache, **settings), reference)
    else:
        with attach(llama, **EXACT) as attachment:
            assert torch.equal(seeded(llama, lookup_prompt, **settings), reference)
        cache = attachment.cache
    assert len(cache.layers) == 2
    assert 0 <= reference.shape[1] - 1 - cache.get_seq_length() <= 1


class Witness:
    """Keeps a DynamicCache of the states that a KVQ is given, and compares the two after every crop."""

    def __init__(self, cache):
        self.cache = cache
        self.states = DynamicCache()
        self.grown = []
        self.removed = []
        self.stored = []

    def __enter__(self):
        self.update, self.crop = self.cache.update, self.cache.crop
        self.cache.update, self.cache.crop = self.watch_update, self.watch_crop
        return self

    def __exit__(self, *exception):
        del self.cache.update, self.cache.crop

    def watch_update(self, keys, values, layer_idx, *args, **kwargs):
        self.states.update(keys.detach().clone(), values.detach().clone(), layer_idx)
        return self.update(keys, values, layer_idx, *args, **kwargs)

    def watch_crop(self, tokens_to_remove):
        self.crop(tokens_to_remove)
        self.states.crop(tokens_to_remove)
        self.removed.append(-tokens_to_remove)
        self.assert_as_grown_token_by_token()

    def assert_as_grown_token_by_token(self):
        self.grown = self.grown or [KVQLayer(index, layer.settings) for index, layer in enumerate(self.cache.layers)]
        for layer, grown, states in zip(self.cache.layers, self.grown, self.states.layers, strict=True):
            known = grown.get_seq_length() if grown.is_initialized else 0
            assert states.get_seq_length() > known, "what was verified before is taken back"
            new = (side[:, :, known:].split(1, dim=2) for side in (states.keys, states.values))
            for keys, values in zip(*new, strict=True):
                grown.update(keys, values, packed=True)
            self.stored.append(grown.side("key").store.length)
            for name, side in layer.sides():
                assert packed(side.store) == packed(grown.side(name).store)
                assert torch.equal(side.window.view(), grown.side(name).window.view())


def packed(store):
    """The bytes of each part of a store in order of tokens, however chunks divide them and without slack."""
    blocks = [segment.read(0, segment.used) for segment in store.segments]
    return {name: torch.cat([one[name] for one in blocks], dim=2).numpy().tobytes() for name in store.writer.layout}


@pytest.mark.parametrize("name", ["prompt lookup", "draft model"])
def test_assisted_decoding_stores_what_plain_decoding_would(llama, draft, lookup_prompt, name):
    settings = {key: draft if value == "draft" else value for key, value in ASSISTED[name].items()}
    cache = KVQ(**QUANTIZED)
    with Witness(cache) as witness:
        text = llama.generate(
            lookup_prompt, past_key_values=cache, max_new_tokens=80, do_sample=False, pad_token_id=0, **settings
        )
    plain = llama.generate(lookup_prompt, past_key_values=KVQ(**QUANTIZED), max_new_tokens=80, do_sample=False)
    agreement = (text == plain)[:, 240:].float().mean().item()
    print(f"{name}: {agreement:.0%} of 80 tokens as in plain greedy decoding, {len(witness.removed)} verifications")
    assert max(witness.removed) >= 2, "no draft was taken back"
    assert min(witness.removed) == 0, "no draft was right"
    assert len(set(witness.stored)) >= 3, "too few flushes between verifications"


def test_a_stream_says_what_is_returned(llama, prompts):
    streamer = SimpleNamespace(heard=[], put=lambda ids: streamer.heard.append(ids.flatten()), end=lambda: None)
    assert hasattr(BaseStreamer, "put")
    prompt = prompts[:1]
    with attach(llama, **QUANTIZED):
        text = llama.generate(prompt, streamer=streamer, max_new_tokens=12, do_sample=False)
    assert torch.equal(torch.cat(streamer.heard), text[0])


def test_a_returned_cache_goes_on(llama, prompts, assert_telling):
    settings = dict(max_new_tokens=12, do_sample=False)
    whole = llama.generate(prompts, past_key_values=KVQ(**QUANTIZED), max_new_tokens=24, do_sample=False)
    assert_telling(whole[:, 300:])
    with attach(llama, **QUANTIZED):
        first = llama.generate(prompts, return_dict_in_generate=True, **settings)
    for again in (first.past_key_values.fork(), pickle.loads(pickle.dumps(first.past_key_values))):  # noqa: S301
        second = llama.generate(first.sequences, past_key_values=again, **settings)
        assert torch.equal(second, whole)


def test_a_cache_that_recorded_its_past_goes_on_plainly(llama, lookup_prompt):
    """The flag stays after assisted decoding; the window is bounded all the same."""
    cache = KVQ(**QUANTIZED)
    text = llama.generate(lookup_prompt, past_key_values=cache, prompt_lookup_num_tokens=5, max_new_tokens=12)
    longer = llama.generate(text, past_key_values=cache, max_new_tokens=400, do_sample=False)
    longest = max(side.window.length for layer in cache.layers for _, side in layer.sides())
    assert longest < 32 + 256 + 32
    cache.crop(0)
    assert cache.get_seq_length() == longer.shape[1] - 1
    assert max(side.window.length for layer in cache.layers for _, side in layer.sides()) < 32 + 32


def test_an_attached_draft_model_has_a_cache_of_its_own(llama, draft, lookup_prompt, assert_telling):
    settings = dict(max_new_tokens=24, do_sample=False, assistant_model=draft)
    reference = llama.generate(lookup_prompt, **settings)
    assert_telling(reference[:, 240:])
    with attach(llama, **EXACT) as attachment, attach(draft, **EXACT) as drafts:
        assert torch.equal(llama.generate(lookup_prompt, **settings), reference)
        assert drafts.cache is not attachment.cache
        assert drafts.cache.get_seq_length() >= 240
        assert attachment.cache.get_seq_length() >= 240 + 22
        draft.generate(lookup_prompt, max_new_tokens=2, do_sample=False)
        assert drafts.cache is not None


@pytest.mark.parametrize("way", ["generate_batch", "manager", "paged", "pages"])
def test_continuous_batching_is_refused_while_attached(llama, prompts, way):
    calls = {
        "generate_batch": lambda: llama.generate_batch([prompts[0].tolist()], max_new_tokens=2),
        "manager": lambda: llama.init_continuous_batching(),
        "paged": lambda: llama.generate(prompts, cache_implementation="paged", max_new_tokens=2),
        "pages": lambda: llama.generate(prompts, past_key_values=SimpleNamespace(), max_new_tokens=2),
    }
    with attach(llama), pytest.raises(ModelError, match="detach first"):
        calls[way]()
    assert "init_continuous_batching" not in vars(llama)
