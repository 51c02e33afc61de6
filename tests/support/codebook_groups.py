"""A quantizer whose codes are places in a codebook: groups with a scale each, without a mid."""

import torch

from kvq.plugin_api import API_VERSION, BackendSpec, Capabilities, Granularity, PackedFormat


class Codebook:
    """Levels at the quantiles of a normal distribution, of which no three lie on a line."""

    group_local = True

    def __init__(self, spec, **fields):
        self.spec, self.bits = spec, int(spec.nbits)
        fields = {"has_codebook": True, "mid_dtype": None, **fields}
        self.packed_format = PackedFormat.of(spec, scale_dtype=torch.float32, **fields)
        self.block_length = self.packed_format.block_length
        places = (torch.arange(2**self.bits, dtype=torch.float64) + 0.5) / 2**self.bits
        self.levels = torch.special.ndtri(places).float() + 0.05

    def layout(self):
        return self.packed_format.layout()

    def constants(self):
        return {"codebook": self.levels.clone()}  # a new one for each call: nobody else keeps it

    def encode(self, states):
        grouped = self.group(states.float().unflatten(2, (-1, self.block_length)))
        scale = grouped.abs().amax(-1, True) / self.levels.abs().max()
        scale = scale.masked_fill(scale == 0, 1)
        codes = torch.bucketize((grouped / scale).contiguous(), (self.levels[1:] + self.levels[:-1]) / 2)
        return {
            **self.packed_format.pack(self.ungroup(codes.to(torch.uint8))),
            "scale": scale.squeeze(-1),
        }

    def decode_into(self, parts, out):
        codes = self.packed_format.unpack(parts).long()
        scale = parts["scale"]
        if self.packed_format.per_channel:
            spread = scale.unsqueeze(-2)
        else:
            spread = scale.repeat_interleave(self.spec.group_length, -1)[..., : self.spec.head_dim]
        out.copy_((self.levels[codes] * spread).flatten(2, 3))

    def group(self, blocks):
        """[B, H, N, D, L] per channel, [B, H, N, L, groups, G] per token, the last group filled up with zeros."""
        if self.packed_format.per_channel:
            return blocks.mT
        length = self.spec.group_length
        missing = -self.spec.head_dim % length
        return torch.nn.functional.pad(blocks, (0, missing)).unflatten(-1, (-1, length))

    def ungroup(self, codes):
        """[B, H, N, L, D]."""
        return codes.mT if self.packed_format.per_channel else codes.flatten(-2)[..., : self.spec.head_dim]


def spec_of(build=Codebook, nbits=(1, 2, 3, 4, 5, 8), granularities=tuple(Granularity)):
    capabilities = Capabilities(nbits=nbits, granularities=granularities)
    return BackendSpec("codebook", API_VERSION, capabilities, build=lambda spec, options: build(spec))
