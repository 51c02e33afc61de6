"""What `kvq backends NAME` says of the kernels that read a backend's packed form."""

from __future__ import annotations

import pytest
import torch

from kvq.cli.reader_facts import list_readers
from kvq.plugin_api import API_VERSION, BackendSpec, Capabilities, Granularity, Part


class Halves:
    """The states as float16, in blocks of 16 tokens."""

    block_length = 16
    group_local = True

    def __init__(self, spec):
        self.head_dim = spec.head_dim

    def layout(self):
        return {"halves": Part((self.block_length, self.head_dim), torch.float8_e5m2)}

    def constants(self):
        return {}

    def encode(self, states):
        return {"halves": states.unflatten(2, (-1, self.block_length)).to(torch.float8_e5m2)}

    def decode_into(self, parts, out):
        out.copy_(parts["halves"].float().flatten(2, 3))


class FusedHalves(Halves):
    def prepare_query(self, query):
        return query

    scores = mix = finish_output = prepare_query


class Shy(Halves):
    def encode(self, states):
        raise RuntimeError("not today")


def readers_of(build, **capabilities):
    capabilities.setdefault("granularities", (Granularity.PER_TOKEN,))
    spec = BackendSpec(
        "halves", API_VERSION, Capabilities(nbits=(8,), **capabilities), build=lambda spec, options: build(spec)
    )
    return list_readers(spec)


@pytest.mark.parametrize(("build", "way"), [(Halves, "decoded"), (FusedHalves, "FusedScores")])
def test_a_representation_of_its_own_is_read_by_its_own_methods_or_decoded(build, way):
    (row,) = readers_of(build)
    assert row["kernels"] == {"compiled": None, "triton": None, "blockwise": "decoded", "eager": way}
    assert row["reasons"] == {
        "compiled": f"serves quantizers with a packed format, not {build.__name__}",
        "triton": "codes without a packed format",
    }


def test_one_that_fails_says_so_and_there_is_a_row_for_each_direction():
    rows = readers_of(Shy, granularities=tuple(Granularity))
    assert [row["granularity"] for row in rows] == ["per_token", "per_channel"]
    assert all("not today" in row["reasons"][""] and row["kernels"] == {} for row in rows)


def test_it_asks_about_the_widths_that_the_backend_proposes():
    """Its widest codes may be those of a side that nobody gives them to."""
    seen = []
    capabilities = Capabilities(nbits=(4, 8), granularities=(Granularity.PER_TOKEN,))

    def build(spec, options):
        seen.append((spec.side, spec.nbits))
        return Halves(spec)

    list_readers(BackendSpec("halves", API_VERSION, capabilities, build=build, defaults={"nbits_v": 4}))
    assert seen[-2:] == [("key", 8), ("value", 4)]
