"""Caches of earlier releases. 0.1.0 packed codes in another order; 0.2.0 knew no Hadamard transform."""

import pytest
import torch
from kvq_turboquant.plugin import build, kvq_backend
from kvq_turboquant.quantizer import TurboQuantizer

from kvq import KVQ, register_backend
from kvq.errors import CacheFileError
from kvq.plugin_api import BackendSpec


class OlderQuantizer:
    """Names the parts as 0.1.0 did: the codes are `plain_codes` and `outlier_codes`."""

    block_length = TurboQuantizer.block_length
    group_local = True

    def __init__(self, quantizer):
        self.quantizer = quantizer
        self.constants = quantizer.constants

    def layout(self):
        return {name.replace("_packed_codes", "_codes"): part for name, part in self.quantizer.layout().items()}

    def encode(self, states):
        return {name.replace("_packed_codes", "_codes"): part for name, part in self.quantizer.encode(states).items()}

    def decode_into(self, parts, out):
        self.quantizer.decode_into({name.replace("_codes", "_packed_codes"): part for name, part in parts.items()}, out)


def register(build):
    """From code, where no version of a distribution tells the two apart."""
    spec = kvq_backend()
    fields = ("capabilities", "options", "summary", "defaults", "uses_group_size")
    register_backend(
        BackendSpec("turboquant-here", spec.api_version, build=build, **{name: getattr(spec, name) for name in fields}),
        replace=True,
    )


def build_0_2(spec, options):
    return TurboQuantizer(
        spec.head_dim, spec.nbits, spec.device, inner_product=options.inner_product, seed=options.seed
    )


def build_0_1(spec, options):
    return OlderQuantizer(build_0_2(spec, options))


@pytest.mark.parametrize(
    ("older", "nbits", "inner_product"),
    [(build_0_1, 2.5, False), (build_0_1, 4, False), (build_0_1, 4, True), (build_0_2, 4, False)],
)
def test_they_are_refused_in_words(tmp_path, older, nbits, inner_product):
    register(older)
    options = {"turboquant-here": {"inner_product": inner_product}}
    cache = KVQ(backend="turboquant-here", nbits_k=nbits, nbits_v=nbits, backend_options=options)
    states = torch.randn(1, 2, 200, 64, generator=torch.Generator().manual_seed(0))
    cache.update(states, states, 0)
    cache.save(tmp_path / "older.kvq")
    KVQ.load(tmp_path / "older.kvq")
    register(build)
    with pytest.raises(CacheFileError, match=r"codes|other tensors: 10 are missing"):
        KVQ.load(tmp_path / "older.kvq")
