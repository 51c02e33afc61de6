"""Two quantizers that are not affine, for tests only: they prove that the protocol needs no affine assumption."""

import math

import torch

from kvq.plugin_api import API_VERSION, BackendSpec, Capabilities, Part


class NormCodebookQuantizer:
    """Per-vector norm and a fixed codebook for the rotated direction, one token a block (as TurboQuant does it)."""

    block_length = 1
    group_local = True

    def __init__(self, spec):
        generator = torch.Generator().manual_seed(spec.seed)
        gaussian = torch.randn(spec.head_dim, spec.head_dim, generator=generator, dtype=torch.float64)
        self.rotation = torch.linalg.qr(gaussian).Q.float()
        self.head_dim = spec.head_dim
        levels = 16
        centres = torch.linspace(-2.4, 2.4, levels)
        self.codebook = centres / math.sqrt(spec.head_dim)

    def layout(self):
        return {"norm": Part((), torch.float16), "codes": Part((self.head_dim // 2,), torch.uint8)}

    def encode(self, states):
        rotated = states.float() @ self.rotation
        norm = rotated.norm(dim=-1).to(torch.float16)
        directions = rotated / norm.float().clamp_min(1e-6)[..., None]
        codes = (directions[..., None] - self.codebook).abs().argmin(-1).to(torch.uint8)
        low, high = codes.chunk(2, dim=-1)
        return {"norm": norm, "codes": low | (high << 4)}

    def decode_into(self, parts, out):
        codes = torch.cat([parts["codes"] & 15, parts["codes"] >> 4], dim=-1)
        rotated = self.codebook[codes.long()] * parts["norm"].float()[..., None]
        out.copy_(rotated @ self.rotation.T)

    def constants(self):
        return {"rotation": self.rotation, "codebook": self.codebook}


class StaticFloat8Quantizer:
    """float8 e4m3 with one static scale per head, calibrated on the first block that it sees."""

    block_length = 16
    group_local = False

    def __init__(self, spec):
        self.head_dim = spec.head_dim
        self.scale = torch.zeros(spec.num_heads, 1, 1)

    def layout(self):
        return {"codes": Part((self.block_length, self.head_dim), torch.float8_e4m3fn)}

    def encode(self, states):
        assert states.shape[0] == 1, "one row at a time"
        assert states.shape[2] == self.block_length, "one block at a time"
        states = states.float()
        if not self.scale.any():  # the constants alone tell, so that a quantizer built anew can be given them
            self.scale.copy_(states.abs().amax(dim=(0, 2, 3))[:, None, None].clamp_min(1e-6) / 200)
        codes = (states / self.scale).clamp(-448, 448).to(torch.float8_e4m3fn)
        return {"codes": codes.unflatten(2, (-1, self.block_length))}

    def decode_into(self, parts, out):
        out.copy_(parts["codes"].float().flatten(2, 3) * self.scale)

    def constants(self):
        return {"scale": self.scale}


NORM_CODEBOOK = BackendSpec(
    name="norm_codebook",
    api_version=API_VERSION,
    capabilities=Capabilities(nbits=(4,)),
    build=lambda spec, options: NormCodebookQuantizer(spec),
)
STATIC_FLOAT8 = BackendSpec(
    name="static_float8",
    api_version=API_VERSION,
    capabilities=Capabilities(nbits=(8,)),
    build=lambda spec, options: StaticFloat8Quantizer(spec),
)
