"""A quantizer with more channels than the states have elements: some elements are the sum of two."""

import torch

from kvq.plugin_api import API_VERSION, BackendSpec, Capabilities, Granularity, PackedFormat

FINE = 24
"""Channels of each head that are quantized twice: what is left of them after the first time has codes of its own."""


class Residual:
    """Keys of 2 bits, and 2 more for what is left in some channels, other ones in each head; values of 2 bits."""

    group_local = True

    def __init__(self, spec):
        self.spec, self.is_key = spec, spec.side == "key"
        stored = spec.head_dim + FINE if self.is_key else None
        self.packed_format = PackedFormat.of(spec, stored_channels=stored)
        self.block_length, self.largest = self.packed_format.block_length, 2 ** int(spec.nbits) - 1
        generator = torch.Generator().manual_seed(spec.num_heads)
        own = torch.stack([torch.randperm(spec.head_dim, generator=generator)[:FINE] for _ in range(spec.num_heads)])
        every = torch.stack([torch.randperm(spec.head_dim, generator=generator) for _ in own])
        self.sources = torch.cat([every, own], 1).int()

    def layout(self):
        return self.packed_format.layout()

    def constants(self):
        return {"channel_sources": self.sources} if self.is_key else {}

    def encode(self, states):
        blocks = states.float().unflatten(2, (-1, self.block_length))
        if not self.is_key:
            return self.pack([self.round(blocks)])
        places = self.sources.long()[None, :, None, None].expand(*blocks.shape[:4], -1)
        first = self.round(blocks.gather(-1, places[..., : self.spec.head_dim]))
        left = blocks - torch.zeros_like(blocks).scatter_(-1, places[..., : self.spec.head_dim], self.read(*first))
        return self.pack([first, self.round(left.gather(-1, places[..., self.spec.head_dim :]))])

    def round(self, blocks):
        low, high = blocks.amin(3, True), blocks.amax(3, True)
        scale = ((high - low) / self.largest).half()
        mid = (low + scale.float() * (self.largest + 1) / 2).half()
        codes = (blocks - mid.float()) / scale.float() + (self.largest + 1) / 2
        return codes.round().clamp(0, self.largest).to(torch.uint8), scale, mid

    def read(self, codes, scale, mid):
        return (codes.float() - (self.largest + 1) / 2) * scale.float() + mid.float()

    def pack(self, pieces):
        codes, scale, mid = (torch.cat(parts, -1) for parts in zip(*pieces, strict=True))
        return {**self.packed_format.pack(codes), "scale": scale.squeeze(3), "mid": mid.squeeze(3)}

    def decode_into(self, parts, out):
        scale, mid = parts["scale"].unsqueeze(3), parts["mid"].unsqueeze(3)
        states = self.read(self.packed_format.unpack(parts), scale, mid)
        if self.is_key:
            places = self.sources.long()[None, :, None, None].expand(states.shape)
            states = torch.zeros((*states.shape[:4], self.spec.head_dim)).scatter_add_(-1, places, states)
        out.copy_(states.flatten(2, 3))


def spec_of(build, nbits=(2, 3)):
    capabilities = Capabilities(nbits=nbits, granularities=(Granularity.PER_CHANNEL,))
    return BackendSpec("residual", API_VERSION, capabilities, build=lambda spec, options: build(spec))
