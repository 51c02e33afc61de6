"""Two backends that keep the contract, one of each protocol; the wrong ones change one thing in them."""

from __future__ import annotations

import torch

from kvq.plugin_api import API_VERSION, BackendSpec, Capabilities, Granularity, Part


class RightAffine:
    """Rounds between the extremes of a group."""

    group_local = True

    def __init__(self, spec):
        self.spec = spec
        self.largest = 2 ** int(spec.nbits) - 1

    def encode(self, groups):
        low, high = groups.aminmax(dim=-1)
        scale = (high - low) / self.largest
        codes = (groups - low[..., None]) / torch.where(scale > 0, scale, 1.0)[..., None]
        return codes.round().clamp(0, self.largest).to(torch.uint8), scale, low


class RightOpaque:
    """Eight bits and a scale for each token, symmetric about zero."""

    group_local = True
    block_length = 32

    def __init__(self, spec):
        self.spec = spec
        self.head_dim = spec.head_dim

    def layout(self):
        return {
            "codes": Part((self.block_length, self.head_dim), torch.int8),
            "scale": Part((self.block_length,), torch.bfloat16),
        }

    def constants(self):
        return {}

    def encode(self, states):
        return self.encode_blocks(states.float().unflatten(2, (-1, self.block_length)))

    def encode_blocks(self, blocks):
        scale = (self.find_largest(blocks) / 127).to(torch.bfloat16)
        divisor = scale.float().masked_fill(scale == 0, 1)[..., None]
        codes = (blocks / divisor).round().clamp(-127, 127).nan_to_num(0).to(torch.int8)
        return {"codes": codes, "scale": scale.masked_fill(~scale.isfinite(), torch.nan)}

    def find_largest(self, blocks):
        return blocks.abs().amax(-1)

    def decode_into(self, parts, out):
        states = parts["codes"].float() * parts["scale"].float()[..., None]
        largest = torch.finfo(out.dtype).max
        out.unflatten(2, (-1, self.block_length)).copy_(states.clamp(-largest, largest))


def make_spec(build, nbits=(8,), **fields):
    """Return the spec of a backend that is built by a class of one argument."""
    fields.setdefault("capabilities", Capabilities(nbits=nbits, granularities=(Granularity.PER_TOKEN,)))
    fields = {"name": "testee", "api_version": API_VERSION, "summary": "a backend under test", **fields}
    return BackendSpec(build=lambda spec, options: build(spec), **fields)


DEFAULTS = {"nbits_k": 8, "nbits_v": 8, "axis_key": "per_token", "axis_value": "per_token"}
AFFINE = make_spec(RightAffine, nbits=(3, 8), defaults=DEFAULTS, calibration="required")
OPAQUE = make_spec(RightOpaque, defaults=DEFAULTS, uses_group_size=False, calibration="optional")
