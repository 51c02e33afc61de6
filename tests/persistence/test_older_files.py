"""Files in the folders of `older`, which kvq wrote before it had the step of that name: they keep their meaning."""

from pathlib import Path

import pytest
import torch
import yaml

from kvq import KVQ, KVQCacheConfig

OLDER = Path(__file__).parent / "older"
STEPS_THEN = {
    "before-balance": ("none", "none", "none"),
    "before-clipping": ("auto", "auto", "none"),
}
"""What the files say, or leave to kvq, of rotation, balance and clipping."""


@pytest.mark.parametrize("folder", STEPS_THEN)
def test_a_saved_cache_gives_the_states_that_it_gave_then(folder):
    cache = KVQ.load(OLDER / folder / "cache.kvq")
    expected = torch.load(OLDER / folder / "states.pt", weights_only=True)
    for states, then in zip(cache.materialize(0), expected, strict=True):
        torch.testing.assert_close(states, then, rtol=1e-6, atol=1e-6)
    assert (cache.config.balance_v, cache.config.clip_k, cache.config.clip_v) == (STEPS_THEN[folder][1], "none", "none")
    more = torch.randn(1, 1, 100, 16)
    cache.update(more, more, 0)
    assert cache.get_seq_length() == 200


@pytest.mark.parametrize("folder", STEPS_THEN)
def test_a_configuration_with_all_fields_of_its_time_gets_nothing_new(folder):
    config = KVQCacheConfig.from_file(OLDER / folder / "config.yaml")
    layer = config.for_layer(0)
    for side in (layer.key, layer.value):
        assert (side.rotation, side.balance, side.clip) == STEPS_THEN[folder]
        assert side.rounding == "nearest"
    assert KVQCacheConfig.from_mapping(config.to_dict()) == config


@pytest.mark.parametrize("folder", STEPS_THEN)
def test_a_step_that_is_added_by_hand_brings_no_other(folder):
    values = yaml.safe_load((OLDER / folder / "config.yaml").read_text(encoding="utf-8"))
    config = KVQCacheConfig.from_mapping({**values, "clip_k": 0.9})
    assert (config.balance_v, config.clip_k, config.clip_v) == (STEPS_THEN[folder][1], 0.9, "none")


def test_one_that_leaves_fields_out_gets_the_defaults_of_today():
    config = KVQCacheConfig.from_mapping({"version": 1, "backend": "native"})
    assert (config.balance_k, config.clip_k) == ("auto", "auto")
