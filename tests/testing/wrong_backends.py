"""One deliberately wrong backend, or more, for every check of the contract."""

from __future__ import annotations

import time

import numpy as np
import torch
from pydantic import Field
from right_backends import RightAffine, RightOpaque, make_spec

from kvq.plugin_api import BackendOptions, Capabilities, Granularity, Part


class Undescribed(BackendOptions):
    rounds: int = 1


class Demanding(BackendOptions):
    rounds: int = Field(description="has no default")


class AnyWidth(tuple):
    """Widths that take every number in."""

    __slots__ = ()

    def __contains__(self, nbits):
        return True


class FewerLevelsForMoreBits(RightAffine):
    def __init__(self, spec):
        super().__init__(spec)
        self.largest = {3: 7, 8: 5}[int(spec.nbits)]


class ScaleInTheDtypeOfTheStates(RightOpaque):
    def encode(self, states):
        parts = super().encode(states)
        return {**parts, "scale": parts["scale"].to(states.dtype)}


class LeavesTheLastChannel(RightOpaque):
    def decode_into(self, parts, out):
        whole = torch.empty_like(out)
        super().decode_into(parts, whole)
        out[..., :-1].copy_(whole[..., :-1])


class CodesPastTheEnd(RightAffine):
    def encode(self, groups):
        codes, scale, offset = super().encode(groups)
        return codes + (codes == self.largest).to(torch.uint8), scale, offset


class WritesIntoTheStates(RightOpaque):
    def encode(self, states):
        parts = super().encode(states)
        states.mul_(0.5)
        return parts


class IgnoresStrides(RightOpaque):
    def encode(self, states):
        return super().encode(torch.as_strided(states, states.shape, torch.empty(states.shape).stride()))


class RoundsAtRandom(RightOpaque):
    def encode_blocks(self, blocks):
        return super().encode_blocks(blocks + torch.rand_like(blocks) * 0.01)


class DividesByZero(RightOpaque):
    def encode_blocks(self, blocks):
        scale = (self.find_largest(blocks) / 127).to(torch.bfloat16)
        codes = (blocks / scale.float()[..., None]).round().nan_to_num(5).clamp(-127, 127).to(torch.int8)
        return {"codes": codes, "scale": torch.where(scale == 0, 1, scale)}


class OverflowsInSquares(RightOpaque):
    def find_largest(self, blocks):
        return blocks.square().amax(-1).sqrt()


class TurnsNaNIntoZero(RightOpaque):
    def encode(self, states):
        return super().encode(states.nan_to_num(0, 0, 0))


class TakesTheMeanOfWhatItDecodes(RightOpaque):
    def decode_into(self, parts, out):
        super().decode_into(parts, out)
        out.sub_(out.mean(dim=2, keepdim=True) * 0.01)


class RunningScale(RightOpaque):
    """Decodes with the largest scale so far."""

    def __init__(self, spec):
        super().__init__(spec)
        self.factor = torch.ones(())

    def constants(self):
        return {"factor": self.factor}

    def encode_blocks(self, blocks):
        self.factor.copy_(torch.maximum(self.factor, blocks.abs().max()))
        return super().encode_blocks(blocks / self.factor)

    def decode_into(self, parts, out):
        super().decode_into(parts, out)
        out.mul_(self.factor)


class OneBitFewer(RightAffine):
    def __init__(self, spec):
        super().__init__(spec)
        self.largest = 2 ** (int(spec.nbits) - 1) - 1


class SwapsTwoGroups(RightAffine):
    def encode(self, groups):
        return tuple(part.roll(1, 3) for part in super().encode(groups))


class ClipsAtFour(RightOpaque):
    def encode(self, states):
        return super().encode(states.clamp(-4, 4))


class HiddenCopy(RightOpaque):
    """Keeps the states as they were, and hands them out by the codes that they got."""

    def __init__(self, spec):
        super().__init__(spec)
        self.hidden = {}

    def encode(self, states):
        parts = super().encode(states)
        for head in range(states.shape[1]):
            for place, block in enumerate(states[:, head].unflatten(1, (-1, self.block_length)).unbind(1)):
                for row, kept in enumerate(block):
                    self.hidden[parts["codes"][row, head, place].numpy().tobytes()] = self.keep(kept)
        return parts

    def keep(self, states):
        return states.clone()

    def take(self, kept):
        return kept

    def decode_into(self, parts, out):
        super().decode_into(parts, out)
        blocks = out.unflatten(2, (-1, self.block_length))
        for row, head, place in np.ndindex(*parts["codes"].shape[:3]):
            kept = self.hidden.get(parts["codes"][row, head, place].numpy().tobytes())
            if kept is not None:
                blocks[row, head, place].copy_(self.take(kept))


class KeepsStatesInAList(RightOpaque):
    def __init__(self, spec):
        super().__init__(spec)
        self.seen = []

    def encode(self, states):
        self.seen.append(states.clone())
        return super().encode(states)


class KeepsStatesInAGlobal(RightOpaque):
    seen = []  # noqa: RUF012  # shared by all: that is what is wrong with it

    def encode(self, states):
        if states.shape[-1] == 128:
            KeepsStatesInAGlobal.seen.append(states.clone())
        return super().encode(states)


class KeepsStatesInNumPy(RightOpaque):
    def __init__(self, spec):
        super().__init__(spec)
        self.seen = []

    def encode(self, states):
        self.seen.append(states.float().numpy().copy())
        return super().encode(states)


class KeepsWhatItDecodes(RightOpaque):
    def __init__(self, spec):
        super().__init__(spec)
        self.decoded = {}

    def decode_into(self, parts, out):
        super().decode_into(parts, out)
        self.decoded[parts["codes"].data_ptr()] = out.clone()


class GrowingConstant(RightOpaque):
    def __init__(self, spec):
        super().__init__(spec)
        self.table = torch.zeros(0)

    def constants(self):
        return {"table": self.table}

    def encode(self, states):
        self.table = torch.cat([self.table, torch.zeros(states.shape[2])])
        return super().encode(states)


class ScaleOfTheWholeCall(RightOpaque):
    def find_largest(self, blocks):
        return blocks.abs().amax().expand(blocks.shape[:-1])


class RemembersRows(RightOpaque):
    """Leaves the scale of each row of the batch out of the parts."""

    def __init__(self, spec):
        super().__init__(spec)
        self.rows = None

    def encode_blocks(self, blocks):
        if self.rows is None:
            self.rows = blocks.abs().amax((1, 2, 3, 4), keepdim=True) / 2
        return super().encode_blocks(blocks / self.rows[: len(blocks)])

    def decode_into(self, parts, out):
        super().decode_into(parts, out)
        rows = torch.ones(len(out), 1, 1, 1)
        rows[: len(self.rows)] = self.rows[: len(out), ..., 0]
        out.mul_(rows)


class ScalesInOrder(RightOpaque):
    """Keeps the scales in a list, in the order in which the blocks came."""

    def __init__(self, spec):
        super().__init__(spec)
        self.scales = []

    def encode_blocks(self, blocks):
        parts = super().encode_blocks(blocks)
        self.scales.extend(parts["scale"].unbind(2))
        return {**parts, "scale": torch.ones_like(parts["scale"])}

    def decode_into(self, parts, out):
        scales = torch.stack(self.scales[-parts["scale"].shape[2] :], dim=2)[: len(out)]
        super().decode_into({**parts, "scale": scales}, out)


class TableOfScales(RightOpaque):
    """Keeps the scales in a table of its own and stores places in it, which mean nothing to who loads them."""

    def __init__(self, spec):
        super().__init__(spec)
        self.table = []

    def layout(self):
        return {**super().layout(), "scale": Part((), torch.int32)}

    def encode_blocks(self, blocks):
        parts = super().encode_blocks(blocks)
        places = torch.arange(parts["scale"][..., 0].numel(), dtype=torch.int32) + len(self.table)
        self.table.extend(parts["scale"].flatten(0, 2).unbind(0))
        return {**parts, "scale": places.reshape(parts["scale"].shape[:-1])}

    def decode_into(self, parts, out):
        found = torch.stack([self.table[place] for place in parts["scale"].flatten().tolist()])
        super().decode_into({**parts, "scale": found.reshape(*parts["scale"].shape, self.block_length)}, out)


class SharedFactor(RightOpaque):
    """Sets an attribute of the class, which the next one that is built overwrites."""

    factor = 1.0

    def __init__(self, spec):
        super().__init__(spec)
        type(self).factor = 1.0 + spec.seed

    def encode_blocks(self, blocks):
        return super().encode_blocks(blocks / (1.0 + self.spec.seed))

    def decode_into(self, parts, out):
        super().decode_into(parts, out)
        out.mul_(self.factor)


class SharedScratch(RightOpaque):
    """Works in a buffer of the class, which another thread may overwrite."""

    scratch = torch.zeros(1 << 16)

    def encode_blocks(self, blocks):
        buffer = self.scratch[: blocks.numel()].view(blocks.shape)
        buffer.copy_(blocks)
        time.sleep(1e-4)
        return super().encode_blocks(buffer)


class ForgetsTheScale(RightOpaque):
    """Computes dot products on the codes alone."""

    def prepare_query(self, query):
        return query.float()

    def _repeat(self, parts, query):
        states = parts["codes"].float().flatten(2, 3)
        return states.repeat_interleave(query.shape[1] // states.shape[1], dim=1)

    def scores(self, query, parts):
        return query @ self._repeat(parts, query).transpose(-1, -2)

    def mix(self, probabilities, parts):
        return probabilities.float() @ self._repeat(parts, probabilities)

    def finish_output(self, mixed):
        return mixed


class ServesFourQueries(ForgetsTheScale):
    """Computes on the packed form, right but for the fifth row of queries and those after it."""

    def _repeat(self, parts, query):
        blocks = parts["codes"].float() * parts["scale"].float()[..., None]
        states = blocks.flatten(2, 3)
        return states.repeat_interleave(query.shape[1] // states.shape[1], dim=1)

    def scores(self, query, parts):
        scores = super().scores(query, parts)
        scores[:, :, 4:] = 0
        return scores


class NoisyDecoder(RightOpaque):
    def decode_into(self, parts, out):
        super().decode_into(parts, out)
        out.add_(torch.randn_like(out))


class ShiftsKeys(RightOpaque):
    """Decodes each token's key as that of the token before it in the block."""

    def decode_into(self, parts, out):
        super().decode_into(parts, out)
        if self.spec.side == "key":
            out.copy_(out.unflatten(2, (-1, self.block_length)).roll(1, 3).flatten(2, 3))


class WritesIntoStatistics(RightOpaque):
    def __init__(self, spec):
        super().__init__(spec)
        spec.statistics.maximum.clamp_(max=1)


class BlocksByStatistics(RightOpaque):
    def __init__(self, spec):
        super().__init__(spec)
        is_even = spec.statistics is None or len(spec.statistics.maximum.unique()) == 1
        self.block_length = 32 if is_even else 64


class DividesByStatistics(RightOpaque):
    def decode_into(self, parts, out):
        super().decode_into(parts, out)
        if self.spec.statistics is not None:
            out.div_(self.spec.statistics.mean.abs().sum())


WRONG = {
    "check_spec": [make_spec(RightOpaque, summary="")],
    "check_options": [make_spec(RightOpaque, options=Undescribed), make_spec(RightOpaque, options=Demanding)],
    "check_requirements": [make_spec(RightOpaque, requires=("no-such-distribution>=1",)), make_spec(HiddenCopy)],
    "check_defaults": [
        make_spec(RightAffine, uses_group_size=False, defaults={"nbits_v": 8}),
        make_spec(RightOpaque, defaults={"nbits_k": 8}),  # values would get 2 bits, which it lacks
    ],
    "check_calibration": [
        make_spec(WritesIntoStatistics, calibration="required"),
        make_spec(BlocksByStatistics, calibration="optional"),
        make_spec(DividesByStatistics, calibration="optional"),
    ],
    "check_configuration": [
        make_spec(RightOpaque, capabilities=Capabilities(AnyWidth((8,)), (Granularity.PER_TOKEN,)))
    ],
    "check_more_bits": [make_spec(FewerLevelsForMoreBits, nbits=(3, 8))],
    "check_layout": [make_spec(ScaleInTheDtypeOfTheStates), make_spec(LeavesTheLastChannel)],
    "check_codes": [make_spec(CodesPastTheEnd, nbits=(3,))],
    "check_input_untouched": [make_spec(WritesIntoTheStates)],
    "check_non_contiguous": [make_spec(IgnoresStrides)],
    "check_deterministic": [make_spec(RoundsAtRandom)],
    "check_finite": [make_spec(DividesByZero), make_spec(OverflowsInSquares)],
    "check_lost_numbers": [make_spec(TurnsNaNIntoZero)],
    "check_decoding": [make_spec(TakesTheMeanOfWhatItDecodes)],
    "check_constants": [make_spec(RunningScale)],
    "check_accuracy": [
        make_spec(OneBitFewer, nbits=(3,)),
        make_spec(SwapsTwoGroups, nbits=(8,)),
        make_spec(HiddenCopy),
    ],
    "check_bias": [make_spec(ClipsAtFour)],
    "check_honest_bytes": [
        make_spec(KeepsStatesInAList),
        make_spec(KeepsStatesInAGlobal),
        make_spec(KeepsStatesInNumPy),
        make_spec(KeepsWhatItDecodes),
    ],
    "check_constant_bytes": [make_spec(GrowingConstant)],
    "check_append_only": [make_spec(RunningScale)],
    "check_chunk_invariant": [make_spec(ScaleOfTheWholeCall)],
    "check_exact_ends": [make_spec(HiddenCopy)],
    "check_operations": [make_spec(RemembersRows)],
    "check_copies": [make_spec(ScalesInOrder)],
    "check_save_and_load": [make_spec(TableOfScales)],
    "check_independent": [make_spec(SharedFactor)],
    "check_threads": [make_spec(SharedScratch)],
    "check_fused_scores": [make_spec(ForgetsTheScale)],
    "check_fused_attention": [make_spec(NoisyDecoder), make_spec(ServesFourQueries)],
    "check_generation": [make_spec(ShiftsKeys)],
}
"""By the check that is to catch them; `check_light_import`, which needs an installed distribution, has its own test."""
