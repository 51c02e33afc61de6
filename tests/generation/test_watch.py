"""A `generate` that does not read the attached cache says so: once, with the reason, and shows no full cache."""

import inspect
import textwrap
import warnings

import pytest
import torch
import transformers
from transformers import DynamicCache, GenerationMixin
from transformers.generation import utils as generation

from kvq import KVQ, attach
from kvq.attaching.generation_watch import GenerationWatch
from kvq.errors import ModelError
from kvq.transformers_seams.private_names import PREPARE_CACHE, find_cache, pass_cache

GREEDY = dict(max_new_tokens=4, do_sample=False)
SMALL = dict(residual_length=32, q_group_size=32)
UNUSED = "does not use the attached cache: "


@pytest.fixture
def short(prompts):
    return prompts[:, :80]


def warnings_of(action):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action()
    return [str(one.message) for one in caught if UNUSED in str(one.message)]


def rename(monkeypatch, llama, old, new, *, keep_old):
    """Give the model the `generate` of a release that calls `old` by another name."""
    source = textwrap.dedent(inspect.getsource(GenerationMixin.generate))
    source = "\n".join(line for line in source.splitlines() if not line.startswith("@deprecate_kwarg"))
    assert old in source
    names = {}
    exec(source.replace(old, new), vars(generation), names)  # noqa: S102  # transformers' own source
    kind = type(llama.__class__.__name__, (llama.__class__,), {"generate": names["generate"]})
    setattr(kind, new, getattr(GenerationMixin, old))
    llama.__class__ = kind
    if not keep_old:
        monkeypatch.delattr(GenerationMixin, old)


def test_a_cache_that_is_read_is_passed_over_in_silence(llama, short):
    with attach(llama, SMALL) as handle:
        assert warnings_of(lambda: llama.generate(short, **GREEDY)) == []
        assert handle.cache.get_seq_length() == 83
        assert not llama._forward_hooks


@pytest.mark.case("transformers renames the method that makes the cache", "attach is refused")
def test_a_method_that_is_gone_is_refused(monkeypatch, llama):
    rename(monkeypatch, llama, PREPARE_CACHE, "_make_cache_for_generation", keep_old=False)
    with pytest.raises(ModelError, match=rf"has no {PREPARE_CACHE}.*{transformers.__version__}.*past_key_values=KVQ"):
        attach(llama)


@pytest.mark.case("transformers keeps the old method and calls another one", "one warning, and no cache is shown")
def test_a_method_that_is_no_longer_called_is_noticed(monkeypatch, llama, short):
    rename(monkeypatch, llama, PREPARE_CACHE, "_make_cache_for_generation", keep_old=True)
    reference = llama.generate(short, **GREEDY)
    with attach(llama, SMALL) as handle:
        told = warnings_of(lambda: llama.generate(short, **GREEDY))
        assert len(told) == 1
        assert f"did not ask for a cache by {PREPARE_CACHE}" in told[0]
        assert handle.cache is None
        assert warnings_of(lambda: llama.generate(short, **GREEDY)) == [], "once is enough"
        assert torch.equal(llama.generate(short, **GREEDY), reference)


@pytest.mark.case("transformers calls the cache of generate by a new name", "the attached cache is found and replaced")
@pytest.mark.parametrize("name", ["past_key_values", "cache", "kv_states"])
def test_the_name_of_the_cache_does_not_matter(llama, name):
    handle = attach(llama, SMALL)
    try:
        handle._own[PREPARE_CACHE] = lambda _config, arguments, *rest: arguments.update({name: DynamicCache()})
        arguments = {"attention_mask": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])}
        llama._prepare_cache_for_generation(llama.generation_config, arguments)
        assert isinstance(arguments[name], KVQ)
        assert handle.cache is arguments[name]
    finally:
        handle.detach()


def test_another_hook_in_our_place(llama, short):
    with attach(llama, SMALL) as handle:
        ours = llama._prepare_cache_for_generation
        original = type(llama)._prepare_cache_for_generation
        llama._prepare_cache_for_generation = lambda *a, **k: original(llama, *a, **k)
        told = warnings_of(lambda: llama.generate(short, **GREEDY))
        llama._prepare_cache_for_generation = ours
        assert "something else took the place" in told[0]
        assert handle.cache is None


@pytest.mark.case("use_cache=False in the call or in the generation config", "one warning, and no cache is shown")
@pytest.mark.parametrize("where", ["call", "config"])
def test_no_cache_is_wanted(llama, short, where):
    if where == "config":
        llama.generation_config.use_cache = False
    options = {"use_cache": False} if where == "call" else {}
    with attach(llama, SMALL) as handle:
        told = warnings_of(lambda: llama.generate(short, **GREEDY, **options))
        assert len(told) == 1
        assert "use_cache=False" in told[0]
        assert handle.cache is None


@pytest.mark.case(
    "gradient checkpointing in training mode drops the cache", "one warning, or the cache is read after all"
)
def test_gradient_checkpointing(llama, short):
    llama.train()
    llama.gradient_checkpointing_enable()
    with attach(llama, SMALL) as handle:
        told = warnings_of(lambda: llama.generate(short, **GREEDY))
        if told:
            assert "gradient checkpointing in training mode" in told[0]
            assert handle.cache is None
        else:
            assert handle.cache.get_seq_length() == 83


@pytest.mark.case("PEFT prefix tuning brings a cache of its own", "one warning, and no cache is shown")
def test_a_cache_that_is_swapped_on_the_way(llama, short):
    """What prefix tuning does: the inputs of the first forward carry the tokens that were learnt."""
    prepare = llama.prepare_inputs_for_generation
    learnt = DynamicCache(config=llama.config)

    def with_prefix(*args, **kwargs):
        inputs = prepare(*args, **kwargs)
        return {name: value for name, value in inputs.items() if value is not find_cache(inputs)} | pass_cache(
            llama, learnt
        )

    llama.prepare_inputs_for_generation = with_prefix
    with attach(llama, SMALL) as handle:
        told = warnings_of(lambda: llama.generate(short, **GREEDY))
        assert "the first forward was given a DynamicCache in its place" in told[0]
        assert handle.cache is None
    assert learnt.get_seq_length() > 0


def test_peft_prefix_tuning_itself(llama, short):
    peft = pytest.importorskip("peft")
    tuned = peft.get_peft_model(llama, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with attach(tuned, SMALL) as handle:
        told = warnings_of(lambda: tuned.generate(input_ids=short, attention_mask=torch.ones_like(short), **GREEDY))
        # PEFT 0.21 leaves its prefix out on transformers 5.24, which calls the cache by another name.
        assert len(told) == (handle.cache is None)


def test_prefix_tuning_over_a_cache_of_ones_own(llama):
    """PEFT would put its own cache in the place of ours without a word; it is stopped where it asks for the limit."""
    with pytest.raises(AttributeError, match="Prefix tuning of PEFT"):
        KVQ(SMALL, model=llama).max_cache_len  # noqa: B018


@pytest.mark.case("a model with a generate of its own that makes its cache", "one warning, and no cache is shown")
def test_a_loop_of_its_own(llama, short):
    def generate(self, input_ids, **_options):
        cache = DynamicCache(config=self.config)
        self(input_ids, use_cache=True, **pass_cache(self, cache))
        return input_ids

    llama.__class__ = type("OwnLoop", (llama.__class__,), {"generate": generate})
    with attach(llama, SMALL) as handle:
        told = warnings_of(lambda: llama.generate(short))
        assert "loop of its own" in told[0]
        assert handle.cache is None


def test_a_loop_that_never_calls_the_model(llama, short):
    llama.__class__ = type("Silent", (llama.__class__,), {"generate": lambda _self, input_ids: input_ids})
    with attach(llama, SMALL) as handle:
        assert "loop of its own" in warnings_of(lambda: llama.generate(short))[0]
        assert handle.cache is None


def test_a_forward_that_is_not_a_call_of_the_model(llama, short):
    """A loop that asks for a cache and goes past it, straight to the layers."""

    def generate(self, input_ids, **_options):
        arguments = {}
        self._prepare_cache_for_generation(self.generation_config, arguments, None, len(input_ids), 100)
        self.model(input_ids, use_cache=False)
        return input_ids

    llama.__class__ = type("Past", (llama.__class__,), {"generate": generate})
    with attach(llama, SMALL) as handle:
        assert "no forward of the model was given the cache" in warnings_of(lambda: llama.generate(short))[0]
        assert handle.cache is None


def test_a_look_before_the_cache_is_made_decides_nothing(llama, short):
    """Whisper finds the language by a forward without a cache, before `generate` asks for one."""

    def generate(self, input_ids, **options):
        self(input_ids[:, :2], use_cache=False)
        return GenerationMixin.generate(self, input_ids, **options)

    llama.__class__ = type("Looking", (llama.__class__,), {"generate": generate})
    with attach(llama, SMALL) as handle:
        assert warnings_of(lambda: llama.generate(short, **GREEDY)) == []
        assert handle.cache.get_seq_length() == 83


def test_a_cache_of_ones_own_is_nobodys_fault(llama, short):
    own = KVQ(SMALL, model=llama)
    with attach(llama, SMALL) as handle:
        assert warnings_of(lambda: llama.generate(short, past_key_values=DynamicCache(), **GREEDY)) == []
        assert handle.cache is None
        assert warnings_of(lambda: llama.generate(short, past_key_values=own, **GREEDY)) == []
        assert handle.cache is own


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_both_names_of_a_cache_are_taken(llama, short, name):
    own = KVQ(SMALL, model=llama)
    with attach(llama, SMALL), warnings.catch_warnings():
        warnings.simplefilter("error")
        llama.generate(short, **{name: own}, **GREEDY)
    assert own.get_seq_length() == 83


def test_what_generate_returns_carries_the_cache(llama, short):
    with attach(llama, SMALL) as handle:
        output = llama.generate(short, return_dict_in_generate=True, **GREEDY)
    assert find_cache(output) is handle.cache
    assert output.past_key_values is handle.cache


def test_a_generate_that_fails_is_not_judged(llama, short):
    def fail():
        with pytest.raises(IndexError):
            llama.generate(short + 100_000, **GREEDY)

    with attach(llama, SMALL):
        assert warnings_of(fail) == []
        assert not llama._forward_hooks


@pytest.mark.case("an assistant that is attached itself", "its handle shows the draft's cache")
def test_the_cache_of_a_draft_is_visible(llama, build, short):
    assistant = build("llama")
    reference = llama.generate(short[:1], **GREEDY)
    with attach(llama, residual_length=2048) as target, attach(assistant, residual_length=2048) as draft:
        assert torch.equal(llama.generate(short[:1], assistant_model=assistant, **GREEDY), reference)
        assert target.cache.get_seq_length() >= 80
        assert draft.cache is not target.cache
        assert draft.cache.get_seq_length() >= 80
        assert draft.cache.memory().total_bytes > 0


def test_a_model_that_drafts_for_itself(llama, short):
    """The forwards of a draft read the draft's cache, which is no fault of the `generate` around it."""
    options = dict(assistant_early_exit=1, **GREEDY)
    reference = llama.generate(short[:1], **options)
    with attach(llama, residual_length=2048) as handle:
        assert warnings_of(lambda: llama.generate(short[:1], **options)) == []
        assert handle.cache.get_seq_length() >= 80
        assert torch.equal(llama.generate(short[:1], **options), reference)


def test_attention_that_reads_no_handle_is_told_of(llama, short, monkeypatch):
    """A model that computes its attention by itself under our name: right, but dequantized at every operation."""
    attention = transformers.models.llama.modeling_llama

    class Interface(dict):
        def get_interface(self, _name, default):
            return default

    monkeypatch.setattr(attention, "ALL_ATTENTION_FUNCTIONS", Interface())
    with attach(llama, SMALL) as handle:
        with pytest.warns(UserWarning, match="does not hand the keys of the attached cache to transformers' attention"):
            llama.generate(short, **GREEDY)
        assert handle.cache.get_seq_length() == 83


@pytest.mark.case("a filled cache that a later generate does not read", "one warning, and no cache is shown")
def test_what_a_cache_held_before_proves_nothing(llama, short):
    """From the second turn of a chat on the cache is full, whoever reads it."""
    longer = torch.cat([short, short], dim=1)
    with attach(llama, SMALL) as handle:
        llama.generate(short, **GREEDY)
        cache = handle.cache
        prepare = llama.prepare_inputs_for_generation

        def without_cache(*args, **kwargs):
            inputs = prepare(*args, **kwargs)
            return {name: value for name, value in inputs.items() if value is not cache}

        llama.prepare_inputs_for_generation = without_cache
        told = warnings_of(lambda: llama.generate(longer, past_key_values=cache, **GREEDY))
        del llama.prepare_inputs_for_generation
        assert len(told) == 1
        assert "the first forward was not given the cache" in told[0]
        assert handle.cache is None
        assert warnings_of(lambda: llama.generate(longer, past_key_values=cache, **GREEDY)) == []
        assert handle.cache is cache


def test_a_hook_that_torch_calls_without_keywords(llama, short):
    """Where another thread registers a hook at that moment, torch leaves the keywords out."""
    watch = GenerationWatch(llama, pytest.fail, lambda _watch: True)
    watch.expect(KVQ(SMALL, model=llama))
    watch._look(llama, (short,), None)
    assert not watch._is_settled
