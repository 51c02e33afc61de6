"""Predicted bytes against those that caches hold."""

from __future__ import annotations

import pytest
import torch
from random_texts import LAYERS

from kvq import KVQ, KVQCacheConfig
from kvq.planning import plan
from kvq.tuning.layer_bytes import LayerBytes
from kvq.tuning.side_setting import FULL_PRECISION, Pair, SideSetting, build_config

TWO, FIVE = SideSetting("native", 2), SideSetting("native", 5, group_size=128)
MIXED = {
    0: Pair(TWO, FIVE),
    1: Pair(FIVE, FIVE),
    3: Pair(SideSetting("quanto", 4), SideSetting("native", 3, "per_token", 16)),
}


@pytest.mark.parametrize("context", [1, 90, 333])
def test_the_bytes_of_layers_add_up_to_those_that_a_cache_holds(model, base, context):
    counted = LayerBytes(model.config, base, context=context, dtype=torch.float32)
    pairs = [MIXED.get(index, FULL_PRECISION) for index in range(LAYERS)]
    config = build_config(base, MIXED, LAYERS)
    cache = KVQ(config, model=model)
    with torch.no_grad():
        model(torch.randint(199, (1, context)), past_key_values=cache)
    found = [counted.measure(index, pair) for index, pair in enumerate(pairs)]
    assert found == [layer.total_bytes for layer in cache.memory().layers]
    assert sum(found) == plan(model.config, config, context=context, dtype=torch.float32).total_bytes


def test_the_peak_is_that_of_the_plan(model, base):
    counted = LayerBytes(model.config, base, context=300, dtype=torch.float32, moment="peak")
    assignment = dict.fromkeys(range(LAYERS), Pair(TWO, TWO))
    planned = plan(model.config, build_config(base, assignment, LAYERS), context=300, dtype=torch.float32)
    assert sum(counted.measure(*one) for one in assignment.items()) == planned.peak_bytes > planned.total_bytes


def test_bits_count_everything_that_is_held(model, base):
    counted = LayerBytes(model.config, base, context=500, dtype=torch.float32)
    plain = 2 * LAYERS * 500 * 2 * 16 * 4
    assert counted.in_full_precision() == plain
    assert counted.bits(plain) == 32
    assert counted.bytes_of_bits(8) == plain // 4


def test_what_auto_means_is_written_out(model, base):
    counted = LayerBytes(model.config, base, context=100, dtype=torch.float32)
    found = counted.resolve(0, Pair(TWO, SideSetting("native", 4, "per_token", 16)))
    assert (found.key.rotation, found.key.balance) == ("hadamard", "rms")
    assert 0 < found.key.clip < 1
    config = build_config(base, {0: found}, LAYERS)
    assert config.for_layer(0).key.clip == found.key.clip
    assert (found.value.rotation, found.value.balance) == ("none", "none")
    assert found.value.clip == "none"


def test_a_configuration_has_an_entry_for_each_run_of_equal_layers(base):
    pairs = dict(enumerate([Pair(TWO, TWO)] * 3 + [Pair(FIVE, TWO)] * 2))
    config = build_config(base, pairs, 7)
    assert list(config.layers) == ["3-4", "5-6"]
    assert config.layers["5-6"].full_precision
    assert config.for_layer(4).key.nbits == 5
    assert config.for_layer(4).key.group_size == 128
    assert config.for_layer(4).value == config.for_layer(0).value
    assert KVQCacheConfig.from_mapping(config.to_dict()) == config
