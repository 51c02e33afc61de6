"""`KVQ` as users build it: from what, for which models, and what it refuses."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
import transformers
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin

from kvq import KVQ, KVQCacheConfig
from kvq.errors import CacheStateError, ConfigError, ModelError, StatesError
from kvq.layers.quantized_layer import KVQLayer
from kvq.plugin_api import Capabilities

SMALL = dict(vocab_size=99, hidden_size=32, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1)


def llama(layers=3):
    return transformers.LlamaConfig(num_hidden_layers=layers, **SMALL)


def gemma2():
    return transformers.Gemma2Config(num_hidden_layers=4, sliding_window=16, head_dim=16, **SMALL)


def states(tokens=5, batch=1):
    return torch.randn(2, batch, 1, tokens, 16)


def kinds(cache):
    return ["kvq" if isinstance(layer, KVQLayer) else type(layer).__name__ for layer in cache.layers]


def test_the_seeds_configuration_as_object_and_as_dict():
    fields = dict(
        backend="quanto",
        nbits_k=4,
        nbits_v=2,
        axis_key=0,
        axis_value=0,
        q_group_size=64,
        residual_length=128,
        compute_dtype=torch.bfloat16,
        device=torch.device("cpu"),
    )
    cache = KVQ(KVQCacheConfig(**fields))
    assert cache.config == KVQ(fields).config == KVQ(**fields).config
    assert cache.config.axis_key == cache.config.axis_value == "per_token"


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_a_file_and_overrides(tmp_path, suffix):
    path = tmp_path / f"kvq{suffix}"
    path.write_text('{"nbits_k": 8, "nbits_v": 8}')
    assert KVQ(path).config.nbits_k == 8
    changed = KVQ(str(path), nbits_v=4).config
    assert (changed.nbits_k, changed.nbits_v) == (8, 4)
    assert KVQ(KVQCacheConfig(nbits_k=8), nbits_v=4).config == changed


def test_a_models_configuration_in_the_place_of_ours_names_the_right_argument():
    with pytest.raises(ConfigError, match="`model=`"):
        KVQ(llama())
    with pytest.raises(ConfigError, match="not accepted"):
        KVQ(7)
    with pytest.raises(ModelError, match="neither a model"):
        KVQ(model=object())


@pytest.mark.case(
    "a model with sliding and full layers",
    "the full ones are quantized, the sliding ones kept",
    report="huggingface/transformers#47828",
)
def test_layers_follow_the_model():
    assert kinds(KVQ(model=llama())) == ["kvq"] * 3
    assert kinds(KVQ(model=gemma2())) == ["DynamicSlidingWindowLayer", "kvq"] * 2
    assert kinds(KVQ(model=gemma2(), sliding="quantize")) == ["kvq"] * 4
    mistral = transformers.MistralConfig(num_hidden_layers=2, sliding_window=16, **SMALL)
    assert kinds(KVQ(model=mistral)) == ["kvq"] * 2, "a model with nothing else"
    assert KVQ().layers == []


def test_layers_of_their_own_settings():
    cache = KVQ(
        model=llama(6), layers={0: {"nbits_k": 8}, "1-2": {"backend": "hqq"}, "last:2": {"full_precision": True}}
    )
    assert kinds(cache) == ["kvq"] * 4 + ["DynamicLayer"] * 2
    assert cache.layers[0].settings.key.nbits == 8
    assert [layer.settings.key.backend.name for layer in cache.layers[:4]] == ["quanto", "hqq", "hqq", "quanto"]
    with pytest.raises(ConfigError, match="`model=`"):
        KVQ(layers={"last:1": {"full_precision": True}})


def test_a_cache_that_would_quantize_nothing_refuses():
    with pytest.raises(ModelError, match="nothing in this model would be quantized"):
        KVQ(model=llama(2), layers={"0-1": {"full_precision": True}})
    mamba = transformers.MambaConfig(num_hidden_layers=2, hidden_size=32, vocab_size=99)
    with pytest.raises(ModelError, match="nothing in this model would be quantized"):
        KVQ(model=mamba)


def test_encoder_decoder_models_are_refused_with_and_without_model():
    config = transformers.T5Config(
        d_model=32, d_kv=16, d_ff=32, num_layers=2, num_heads=2, vocab_size=99, decoder_start_token_id=0
    )
    with pytest.raises(ModelError, match="encoder-decoder"):
        KVQ(model=config)
    model = transformers.T5ForConditionalGeneration(config).eval()
    with pytest.raises(StatesError, match="pass `model=`"):
        model.generate(torch.ones(1, 7, dtype=torch.long), past_key_values=KVQ(), max_new_tokens=4)


def test_a_layer_beyond_the_model_is_refused():
    cache = KVQ(model=llama(2))
    with pytest.raises(ModelError, match="built for 2 layers"):
        cache.update(*states(), 2)


def test_layers_out_of_step_are_refused():
    cache = KVQ()
    cache.update(*states(), 0)
    with pytest.raises(StatesError, match="layer 1 would hold 3 tokens, but layer 0 holds 5"):
        cache.update(*states(3), 1)
    cache.update(*states(), 1)
    assert [layer.get_seq_length() for layer in cache.layers] == [5, 5]


def test_materialize_is_fresh_and_says_when_there_is_nothing():
    cache = KVQ(model=gemma2())
    with pytest.raises(CacheStateError, match="holds no tokens"):
        cache.materialize(0)
    with pytest.raises(CacheStateError, match="holds no tokens"):
        cache.materialize(17)
    for layer in range(4):
        cache.update(*states(), layer)
    for layer in range(2):
        keys, _ = cache.materialize(layer)
        keys.zero_()
        assert cache.materialize(layer)[0].any()


def test_it_counts_like_dynamic_cache():
    ours, theirs = KVQ(model=llama()), DynamicCache(config=llama())
    for tokens in (5, 1, 300):
        for layer in range(3):
            pair = states(tokens)
            ours.update(*pair, layer)
            theirs.update(*pair, layer)
    for question in ("get_seq_length", "get_max_length"):
        assert getattr(ours, question)(1) == getattr(theirs, question)(1)
    assert ours.get_mask_sizes(7, 0) == theirs.get_mask_sizes(7, 0)
    assert (len(ours), ours.is_sliding, ours.is_croppable, ours.is_initialized) == (
        len(theirs),
        theirs.is_sliding,
        theirs.is_croppable,
        theirs.is_initialized,
    )
    assert ours.is_compileable is False


@pytest.mark.case(
    "copy.deepcopy of a cache that holds a prompt", "an independent cache", report="huggingface/transformers#32159"
)
def test_copies_are_independent():
    cache = KVQ(rotation_k="hadamard")
    for layer in range(2):
        cache.update(*states(300), layer)
    for other in (copy.deepcopy(cache), cache.fork()):
        assert torch.equal(other.materialize(1)[0], cache.materialize(1)[0])
        before = cache.materialize(0)[0]
        for layer in range(2):
            other.update(*states(100), layer)
        assert torch.equal(cache.materialize(0)[0], before)
        assert (other.get_seq_length(), cache.get_seq_length()) == (400, 300)


def test_a_fork_shares_what_transformers_never_writes_to():
    cache = KVQ(model=gemma2(), residual_length=32, q_group_size=32)
    for layer in range(4):
        cache.update(*states(100, batch=2), layer)
    cache.activate_past_recording()
    for layer in range(4):
        cache.update(*states(5, batch=2), layer)
    before = [cache.materialize(layer) for layer in range(4)]
    other = cache.fork()
    assert kinds(other) == kinds(cache)
    assert other.layers[0].keys.data_ptr() == cache.layers[0].keys.data_ptr()
    other.crop(-3)
    other.reorder_cache(torch.tensor([1, 0]))
    for layer in range(4):
        other.update(*states(5, batch=2), layer)
    for layer in range(4):
        for found, expected in zip(cache.materialize(layer), before[layer], strict=True):
            assert torch.equal(found, expected)
        assert torch.equal(other.materialize(layer)[0][:, :, -6], before[layer][0][[1, 0], :, -4])
    other.reset()
    assert (cache.get_seq_length(), other.get_seq_length()) == (105, 0)
    assert torch.equal(cache.materialize(0)[0], before[0][0])


def test_a_fork_changes_nothing_in_the_cache_that_it_forks():
    """Another thread may be adding tokens to that cache."""
    cache = KVQ(nbits_k=4, nbits_v=4)
    cache.update(*states(300), 0)
    sides = [side for _, side in cache.layers[0].sides()]
    before = [side.contents for side in sides]
    other = cache.fork()
    assert [side.contents for side in sides] == before
    expected, buffers = copy.deepcopy(other), [side.window.buffer for side in sides]
    for seed in range(9):
        torch.manual_seed(seed)
        cache.update(*states(1), 0)
    assert [side.window.buffer for side in sides] == buffers, "the room behind the tokens is lost"
    assert torch.equal(torch.stack(other.materialize(0)), torch.stack(expected.materialize(0)))
    for seed in range(9):
        torch.manual_seed(seed)
        other.update(*states(1), 0)
    assert torch.equal(torch.stack(other.materialize(0)), torch.stack(cache.materialize(0)))


class LayerOfAModel(CacheLayerMixin):
    """As a model may bring it: of no kind that transformers has."""

    is_sliding = is_compileable = False

    def lazy_initialization(self, keys, values):
        self.is_initialized = True

    def update(self, keys, values, *args, **kwargs):
        self.keys = keys if self.keys is None else torch.cat([self.keys, keys], dim=2)
        self.values = values if self.values is None else torch.cat([self.values, values], dim=2)
        self.is_initialized = True
        return self.keys, self.values

    def get_seq_length(self):
        return 0 if self.keys is None else self.keys.shape[2]

    def get_mask_sizes(self, query_length):
        return self.get_seq_length() + query_length, 0

    def get_max_cache_shape(self):
        return -1

    get_max_length = get_max_cache_shape


def test_layers_of_an_unknown_kind_follow_the_batch():
    cache = KVQ()
    cache.update(*states(9, batch=2), 0)
    cache.layers.append(LayerOfAModel())
    cache.update(*states(9, batch=2), 1)
    cache.batch_repeat_interleave(3)
    assert [layer.keys.shape[0] for layer in cache.layers] == [6, 6]
    cache.batch_select_indices(torch.tensor([4]))
    assert [layer.keys.shape[0] for layer in cache.layers] == [1, 1]
    with pytest.raises(StatesError, match="batch_repeat_interleave"):
        cache.update(*states(1, batch=5), 1)


def test_states_of_another_batch_get_advice_also_where_keys_and_values_differ():
    cache = KVQ()
    cache.update(*states(9, batch=2), 0)
    with pytest.raises(StatesError, match=r"value states have batch size 4, .*batch_repeat_interleave\(2\)"):
        cache.update(states(1, batch=2)[0], states(1, batch=4)[1], 0)


def test_a_cache_survives_pickling():
    cache = KVQ()
    cache.update(*states(300), 0)
    again = pickle.loads(pickle.dumps(cache))  # noqa: S301  # our own bytes
    assert torch.equal(again.materialize(0)[0], cache.materialize(0)[0])


def test_a_refused_update_adds_no_layers():
    cache = KVQ()
    with pytest.raises(StatesError, match="int64"):
        cache.update(torch.zeros(1, 1, 4, 8, dtype=torch.long), torch.zeros(1, 1, 4, 8), 3)
    with pytest.raises(StatesError, match=r"head_dim\] is needed"):
        cache.update(torch.zeros(3), torch.zeros(3), 1)
    assert len(cache.layers) == 0


def test_full_precision_layers_without_a_model():
    cache = KVQ(layers={"0": {"full_precision": True}})
    for layer in range(2):
        cache.update(*states(300), layer)
    assert kinds(cache) == ["DynamicLayer", "kvq"]


def test_the_rope_part_of_latent_attention_takes_no_fewer_than_8_bits(testing_backend):
    config = transformers.DeepseekV3Config(num_hidden_layers=2, **{**SMALL, "num_key_value_heads": 2})
    bits = [(layer.settings.key.nbits, layer.settings.value.nbits) for layer in KVQ(model=config).layers]
    assert bits == [(4, 8)] * 2, "the default of 2 bits for the values is raised where they are no values"
    assert KVQ(model=config, nbits_k=8, nbits_v=8).layers[0].settings.value.nbits == 8
    assert KVQ(model=llama()).layers[0].settings.value.nbits == 2
    capable = replace(testing_backend, capabilities=Capabilities(nbits=(2, 4)))
    with pytest.raises(ModelError, match="no fewer than 8 bits, and backend 'testing' has no such codes"):
        KVQ(model=config, backend=capable)


def test_a_copy_follows_the_attention_of_the_same_model():
    config = llama(1)
    cache = KVQ(model=config)
    copied = copy.deepcopy(cache)
    config._attn_implementation = "kvq"
    assert type(cache.update(*states(), 0)[0]) is type(copied.update(*states(), 0)[0])


@pytest.mark.parametrize(("removed", "error"), [(-5, CacheStateError), (5, StatesError)])
def test_a_refused_crop_leaves_all_layers_as_they_are(removed, error):
    config = gemma2()
    config.layer_types = config.layer_types[::-1]  # a layer that could be cropped comes before one that cannot
    cache = KVQ(model=config)
    for layer in range(4):
        cache.update(*states(40), layer)
    with pytest.raises(error):
        cache.crop(removed)
    assert [layer.get_seq_length() for layer in cache.layers] == [40] * 4


@pytest.mark.parametrize("tokens", [5, 400], ids=["window", "store"])
def test_rows_of_a_batch_are_repeated_next_to_each_other(tokens):
    cache, expected = KVQ(), DynamicCache()
    keys, values = states(tokens, batch=3)
    cache.update(keys, values, 0)
    held = cache.materialize(0)
    expected.update(*held, 0)
    for one in (cache, expected):
        one.batch_repeat_interleave(2)
    for found, wanted in zip(cache.materialize(0), (expected.layers[0].keys, expected.layers[0].values), strict=True):
        assert torch.equal(found, wanted)
