"""Files in the folder `older`, which kvq wrote before it could balance: they keep their meaning."""

from pathlib import Path

import torch

from kvq import KVQ, KVQCacheConfig

OLDER = Path(__file__).parent / "older"


def test_a_saved_cache_gives_the_states_that_it_gave_then():
    cache = KVQ.load(OLDER / "cache.kvq")
    for states, expected in zip(cache.materialize(0), torch.load(OLDER / "states.pt", weights_only=True), strict=True):
        torch.testing.assert_close(states, expected, rtol=1e-6, atol=1e-6)
    assert (cache.config.balance_k, cache.config.balance_v) == ("none", "none")
    more = torch.randn(1, 1, 100, 16)
    cache.update(more, more, 0)
    assert cache.get_seq_length() == 200


def test_a_configuration_with_all_fields_of_its_time_gets_nothing_new():
    config = KVQCacheConfig.from_file(OLDER / "config.yaml")
    layer = config.for_layer(0)
    for side in (layer.key, layer.value):
        assert (side.rotation, side.balance) == ("none", "none")
    assert KVQCacheConfig.from_mapping(config.to_dict()) == config


def test_one_that_leaves_fields_out_gets_the_defaults_of_today():
    assert KVQCacheConfig.from_mapping({"version": 1, "backend": "native"}).balance_k == "auto"
