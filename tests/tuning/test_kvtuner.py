"""Allocations in the form in which KVTuner publishes them."""

from __future__ import annotations

import pytest

from kvq.errors import ConfigError
from kvq.tuning import read_kvtuner

PUBLISHED = """
0: {nbits_key: 8, nbits_value: 4}
1: {nbits_key: 4, nbits_value: 2}
2: {nbits_key: 4, nbits_value: 2}
3: {nbits_key: 2, nbits_value: 4}
"""


@pytest.fixture
def write(tmp_path):
    def call(text):
        (tmp_path / "preset.yaml").write_text(text)
        return tmp_path / "preset.yaml"

    return call


@pytest.mark.parametrize(
    ("scheme", "axes", "groups", "window"),
    [
        ("defaults", ("per_channel", "per_channel"), (64, 64), (32, 4)),
        ("kivi", ("per_channel", "per_token"), (32, 32), (32, 0)),
        ("per-token", ("per_token", "per_token"), (65536, 65536), (0, 0)),
    ],
)
def test_every_layer_gets_its_bits_and_the_scheme(write, scheme, axes, groups, window):
    config = read_kvtuner(write(PUBLISHED), scheme=scheme)
    layers = [config.for_layer(index) for index in range(4)]
    assert [(one.key.nbits, one.value.nbits) for one in layers] == [(8, 4), (4, 2), (4, 2), (2, 4)]
    assert {(one.key.granularity, one.value.granularity) for one in layers} == {axes}
    assert {(one.key.group_size, one.value.group_size) for one in layers} == {groups}
    assert (config.residual_length, config.sink_length) == window
    assert {one.key.rotation for one in layers} == {"auto" if scheme == "defaults" else "none"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0: {nbits_key: 4}", "exactly nbits_key and nbits_value are needed"),
        ("0: {nbits_key: 4, nbits_value: 2, extra: 1}", "exactly nbits_key and nbits_value are needed"),
        ("0: {nbits_key: 4, nbits_value: two}", "bits are whole numbers above 0"),
        ("0: {nbits_key: 4, nbits_value: true}", "bits are whole numbers above 0"),
        ("first: {nbits_key: 4, nbits_value: 2}", "an index of a layer is needed"),
        ("1: {nbits_key: 4, nbits_value: 2}", "layers are missing"),
        ("", "no layer is named"),
        ("0: {nbits_key: 9, nbits_value: 2}", "nbits_k"),
    ],
)
def test_a_file_that_is_something_else_is_refused(write, text, said):
    with pytest.raises(ConfigError, match=said):
        read_kvtuner(write(text))


def test_an_unknown_scheme_and_a_missing_file_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="'other' is unknown; choose from defaults, kivi, per-token"):
        read_kvtuner(tmp_path / "preset.yaml", scheme="other")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_kvtuner(tmp_path / "preset.yaml")
