"""Layers that hold more than keys and values: states of linear attention, keys of an indexer."""

import pytest
import torch
import transformers
from carrying_models import SMALL, falcon_h1, glm_5

from kvq import KVQ, attach
from kvq.errors import CacheStateError
from kvq.layers.quantized_layer import KVQLayer
from kvq.planning import plan

EXACT = dict(residual_length=2048)
QUANTIZED = dict(nbits_k=8, nbits_v=8, residual_length=32, q_group_size=32)


KINDS = {"linear": falcon_h1, "indexed": glm_5}


@pytest.fixture(params=KINDS)
def model(request):
    torch.manual_seed(0)
    config = KINDS[request.param]()
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    if request.param == "linear":  # whose initialization leaves attention and state of one size
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    return model


def ids(rows=2, tokens=60):
    return torch.randint(3, 99, (rows, tokens), generator=torch.Generator().manual_seed(1))


def generate(model, cache, text, **options):
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, **options}
    return model.generate(text, attention_mask=torch.ones_like(text), past_key_values=cache, **options)


def read(model, text, cache=None):
    """Return a cache, by default `DynamicCache`, that has read a text at once."""
    cache = transformers.DynamicCache(config=model.config) if cache is None else cache
    with torch.no_grad():
        model(text, past_key_values=cache)
    return cache


def carried_tensors(layer):
    kept = layer.carried if isinstance(layer, KVQLayer) else layer
    states = [getattr(kept, name, {}) for name in ("conv_states", "recurrent_states")]
    found = [one for held in states for one in held.values()]
    return found or [kept.indexer_keys]


def test_beams_reorder_what_is_carried_too(model):
    text = ids(1)
    reference = generate(model, transformers.DynamicCache(config=model.config), text, num_beams=3)
    assert len(set(reference[0, 60:].tolist())) >= 4
    assert torch.equal(generate(model, KVQ(EXACT, model=model), text, num_beams=3), reference)


def test_a_fork_goes_its_own_way(model):
    text = ids()
    cache = read(model, text[:, :50], KVQ(EXACT, model=model))
    fork = cache.fork()
    generate(model, fork, torch.cat([text[:, :50], text[:, :10]], dim=1))
    assert cache.get_seq_length() == 50
    reference = generate(model, read(model, text[:, :50]), text)
    assert torch.equal(generate(model, cache, text), reference)


def test_a_moved_layer_goes_its_own_way(model):
    text = ids()
    cache = read(model, text[:, :50], KVQ(EXACT, model=model))
    moved = cache.layers[0].moved_to(torch.device("cpu"))
    before = [one.clone() for one in carried_tensors(moved)]
    with torch.no_grad():
        model(text[:, 50:51], past_key_values=cache)
    assert all(torch.equal(one, other) for one, other in zip(carried_tensors(moved), before, strict=True))
    assert not torch.equal(carried_tensors(cache.layers[0])[0], before[0])


def test_after_a_reset_another_batch_may_come(model):
    cache = KVQ(EXACT, model=model)
    generate(model, cache, ids(2))
    cache.reset()
    assert cache.get_seq_length() == 0
    reference = generate(model, transformers.DynamicCache(config=model.config), ids(3))
    assert torch.equal(generate(model, cache, ids(3)), reference)


def test_what_is_carried_is_that_of_dynamic_cache_and_counted(model):
    cache, plain = KVQ(QUANTIZED, model=model), transformers.DynamicCache(config=model.config)
    for one in (cache, plain):
        read(model, ids(), one)
    for own, other in zip(cache.layers[:1], plain.layers[:1], strict=True):  # what comes before any quantized token
        for ours, theirs in zip(carried_tensors(own), carried_tensors(other), strict=True):
            torch.testing.assert_close(ours, theirs)
    carried = sum(one.nbytes for layer in cache.layers for one in carried_tensors(layer))
    assert carried
    report = cache.memory()
    held = sum(
        sum(side.held_bytes.values()) + side.slack_bytes for one in report.layers for side in (one.key, one.value)
    )
    assert report.total_bytes == held + carried
    plain_bytes = sum(one.nbytes for layer in plain.layers for one in (layer.keys, layer.values))
    assert report.full_precision_bytes == plain_bytes + carried


def test_a_plan_counts_what_is_carried(model):
    planned = plan(model.config, QUANTIZED, context=150, batch=2, dtype=torch.float32)
    assert all("stay in full precision" in one.reason for one in planned.layers)
    assert any("are not quantized (layers 0-1)" in text for text in planned.unsupported)
    cache = read(model, ids(2, 150), KVQ(QUANTIZED, model=model))
    assert planned.total_bytes == cache.memory().total_bytes


def test_rows_are_repeated_and_chosen(model):
    text = ids()
    cache = read(model, text[:, :-1], KVQ(EXACT, model=model))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0]))
    reference = generate(model, read(model, text.flip(0)[:, :-1]), text.flip(0))
    assert torch.equal(generate(model, cache, text.flip(0)), reference)


def test_a_crop_takes_back_the_keys_of_an_indexer_and_is_refused_for_a_sum(model):
    text = ids()
    cache = read(model, text.flip(1), KVQ(EXACT, model=model))
    assert cache.is_croppable == (not hasattr(model.config, "mamba_d_ssm"))
    if not cache.is_croppable:
        with pytest.raises(CacheStateError, match=r"layers \[0, 1\] carry states of linear attention"):
            cache.crop(-10)
        return
    cache.crop(-60)
    read(model, text, cache).crop(-30)
    plain = read(model, text)
    plain.crop(-30)
    reference = generate(model, plain, text)
    assert torch.equal(generate(model, cache, text), reference)


def test_caches_that_carry_more_are_not_concatenated(model):
    caches = [read(model, ids(), KVQ(QUANTIZED, model=model)) for _ in range(2)]
    with pytest.raises(CacheStateError, match=r"layers \[0, 1\] do not hold the states of all their tokens, or more"):
        KVQ.concatenate(caches, model=model)


def test_tokens_under_an_indexer_are_not_evicted(model):
    cache = read(model, ids(), KVQ(QUANTIZED, model=model))
    keep = torch.arange(10, 60)
    if model.config.model_type == "falcon_h1":
        cache.evict(0, keep)
        assert cache.layers[0].get_seq_length() == 50
        return
    with pytest.raises(CacheStateError, match=r"layer 0: its indexer has a key for each token .* none can be evicted"):
        cache.evict(0, keep)
    assert cache.layers[0].get_seq_length() == 60


@pytest.mark.skipif(not hasattr(transformers, "Qwen4ExpTextConfig"), reason="no Qwen4-Exp in this release")
def test_an_indexer_over_plain_keys_reads_them_packed():
    config = transformers.Qwen4ExpTextConfig(
        head_dim=32, shared_expert_intermediate_size=32, linear_num_key_heads=2, linear_num_value_heads=2,
        linear_key_head_dim=16, linear_value_head_dim=16, layer_types=["linear_attention", "full_attention"],
        indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=32, indexer_budget=16, indexer_compress_ratio=4,
        num_experts=2, num_experts_per_tok=2, moe_intermediate_size=32, num_key_value_heads=2, **SMALL,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    text = ids()
    mask = torch.ones_like(text)
    mask[0, :9] = 0
    try:
        model(text[:, :3])
    except RuntimeError as error:  # in 5.17 with the torch of its time
        pytest.skip(f"the model does not run by itself: {error}")
    options = dict(attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0)
    reference = model.generate(text, **options)
    assert len(set(reference[1, 60:].tolist())) >= 8
    with attach(model, EXACT):
        assert torch.equal(model.generate(text, **options), reference)
    with attach(model, QUANTIZED) as attachment:
        model.generate(ids(2, 100), max_new_tokens=12, do_sample=False, pad_token_id=0)
        assert attachment.cache.memory().layers[1].attention == "compiled"
