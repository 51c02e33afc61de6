"""Launches that are the same at every step until the store outgrows them, so a CUDA graph can hold one.

Lengths are read on the device, and addresses stay: tables with room for more blocks are filled again in place after a
flush. It must not know when a layer flushes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from kvq.attention.dispatch.request import AttentionRequest
from kvq.attention.handle import PackedPair
from kvq.attention.kernels.triton.chunk_table import ChunkTable, get_chunk_table
from kvq.attention.kernels.triton.launch import Launch
from kvq.attention.kernels.triton.plan import EXACT_TILE, Plan, make_plan


@dataclass(frozen=True)
class FixedPlan:
    """What the launches of one layer share until its store outgrows it.

    Attributes:
        plan: the plan, with parts for a full window and a store of `room` tokens.
        table: the tables that launches read, never replaced.
        room: tokens of the store that they have room for.
    """

    plan: Plan
    table: ChunkTable
    room: int

    @classmethod
    def of(cls, request: AttentionRequest, room: int, window_capacity: int) -> FixedPlan:
        """Return a plan for requests like this one; it is to be filled before it is used.

        Args:
            request: a step of decoding that the kernel serves.
            room: tokens that the store may have, those that are there included.
            window_capacity: tokens that the window may have.
        """
        plan = make_plan(request, room)
        options = {**plan.options, "WINDOW_TILES": -(-window_capacity // EXACT_TILE)}
        table = get_chunk_table(request.pair, request.query.device)
        lengths = plan.key.packed.block_length, plan.value.packed.block_length
        sides = [
            replace(side, segments=(), blocks=side.blocks.new_zeros((room // length, side.blocks.shape[1])))
            for side, length in zip((table.key, table.value), lengths, strict=True)
        ]
        own = replace(table, key=sides[0], value=sides[1], stored_length=table.stored_length.clone(), plans={})
        return cls(replace(plan, options=options), own, room)

    def fill(self, pair: PackedPair) -> None:
        """Write the addresses of a layer's chunks into the tables; the layer keeps the chunks alive."""
        found = get_chunk_table(pair, self.table.stored_length.device)
        for own, side in ((self.table.key, found.key), (self.table.value, found.value)):
            own.blocks[: len(side.blocks)].copy_(side.blocks)
        self.table.stored_length.copy_(found.stored_length)


class FixedLaunch(Launch):
    """A launch whose arguments are the same at every step.

    Args:
        request: the step; its window is a view of a buffer that stays.
        fixed: the layer's plan.
        window_length: int32 `[1]`, on the device: the tokens in the window.
    """

    def __init__(self, request: AttentionRequest, fixed: FixedPlan, window_length: torch.Tensor) -> None:
        super().__init__(request, fixed.table, fixed.plan)
        held = -(-self.window_length // EXACT_TILE)
        self.parts += fixed.plan.options["WINDOW_TILES"] - held
        self.window_argument = window_length
