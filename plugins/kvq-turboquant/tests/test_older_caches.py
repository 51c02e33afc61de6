"""Caches that 0.1.0 saved: it packed codes in another order, into a part of the same shape."""

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


@pytest.mark.parametrize("nbits", [2.5, 4])
@pytest.mark.parametrize("inner_product", [False, True])
def test_they_are_refused_in_words(tmp_path, nbits, inner_product):
    register(lambda spec, options: OlderQuantizer(build(spec, options)))
    options = {"turboquant-here": {"inner_product": inner_product}}
    cache = KVQ(backend="turboquant-here", nbits_k=nbits, nbits_v=nbits, backend_options=options)
    states = torch.randn(1, 2, 200, 64, generator=torch.Generator().manual_seed(0))
    cache.update(states, states, 0)
    cache.save(tmp_path / "older.kvq")
    KVQ.load(tmp_path / "older.kvq")
    register(build)
    with pytest.raises(CacheFileError, match="codes"):
        KVQ.load(tmp_path / "older.kvq")
