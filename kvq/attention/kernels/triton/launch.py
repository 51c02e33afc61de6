"""One step on the device: two launches, and two products where the sides are rotated."""

from __future__ import annotations

from typing import Any

import torch

from kvq.attention.dispatch.request import AttentionRequest
from kvq.attention.kernels.triton.chunk_table import ChunkTable
from kvq.attention.kernels.triton.layout import padded
from kvq.attention.kernels.triton.plan import EXACT_TILE, FUSION, Plan
from kvq.store.side import SideView


class Launch:
    """One call of the two programs.

    Args:
        request: the request to serve.
        table: addresses of the layer's chunks.
        plan: the plan for requests of this kind.
    """

    def __init__(self, request: AttentionRequest, table: ChunkTable, plan: Plan) -> None:
        self.request, self.table, self.plan, self.pair = request, table, plan, request.pair
        self.batch, self.query_heads, self.queries, self.key_dim = request.query.shape
        self.heads = self.pair.key.like.shape[1]
        self.window_length = self.pair.key.window.shape[2]
        self.new_length = 0 if self.pair.key.new is None else self.pair.key.new.shape[2]
        self.window_argument: int | torch.Tensor = self.window_length
        exact = -(-self.window_length // EXACT_TILE) - (-self.new_length // EXACT_TILE) + (plan.sinks > 0)
        self.parts = plan.splits + exact

    def run(self) -> torch.Tensor:
        """Return the output `[B, Tq, Hq, D_v]`, contiguous, in the dtype of the query; run on the query's device."""
        device = self.request.query.device
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):  # Triton launches on the current one
                return self._run()
        return self._run()

    def _run(self) -> torch.Tensor:
        """Return the output `[B, Tq, Hq, D_v]`, contiguous, in the dtype of the query."""
        from kvq.attention.kernels.triton.programs import attend_parts, combine

        parts = self._new_parts()
        grid = self.batch * self.heads, self.parts, self.plan.row_ranges
        attend_parts[grid](*self.attend_arguments(*parts), **self.plan.options)
        return self._combine(combine, *parts)

    def attend_arguments(
        self, peaks: torch.Tensor, totals: torch.Tensor, outputs: torch.Tensor
    ) -> tuple[torch.Tensor | float | int, ...]:
        """Return the arguments of `attend_parts` that are not compiled into it."""
        request, pair, plan, table = self.request, self.pair, self.plan, self.table
        exact_query = request.query.reshape(self.batch * self.heads, plan.rows, self.key_dim).contiguous()
        query = self._prepare(exact_query)
        sources = [_source(side.window, side.window) for side in (pair.key, pair.value)]
        sources += [_source(side.new, side.window) for side in (pair.key, pair.value)]
        states, strides = [source[0] for source in sources], [stride for source in sources for stride in source[1:]]
        mask, mask_batch_stride, mask_query_stride = self._mask(query)
        softcap = 1.0 if request.softcap is None else request.softcap
        return (
            query, exact_query, table.key.blocks, table.value.blocks, *self._levels(query), table.stored_length,
            *states, _sink_states(pair.key), _sink_states(pair.value), table.starts, mask, peaks, totals, outputs,
            request.scaling, softcap, self.heads, plan.rows, plan.splits, self.parts, plan.tiles_per_split,
            self.window_argument, self.new_length, mask_batch_stride, mask_query_stride, *strides,
        )  # fmt: skip

    def _levels(self, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return both codebooks; any tensor where there is none."""
        key, value = self.plan.key_levels, self.plan.value_levels
        return query if key is None else key, query if value is None else value

    def _prepare(self, query: torch.Tensor) -> torch.Tensor:
        """Return queries `[B * H, rows, D]` as keys are stored: rotated, or with an element for each channel."""
        plan = self.plan
        if plan.key_sources is not None:
            places = plan.key_sources.repeat(self.batch, 1)[:, None].expand(-1, plan.rows, -1)
            return query.gather(-1, places)
        return query if plan.key_rotation is None else query.float() @ plan.key_rotation

    def _new_parts(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return room for peaks, sums and outputs of every part."""
        shape, device = (self.batch * self.heads, self.parts, self.plan.rows), self.request.query.device
        peaks, totals = torch.empty((2, *shape), dtype=torch.float32, device=device).unbind()
        return peaks, totals, torch.empty((*shape, self.plan.value.head_dim), dtype=torch.float32, device=device)

    def _combine(self, combine: Any, peaks: torch.Tensor, totals: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
        request, plan, rotation = self.request, self.plan, self.plan.value_rotation
        value_dim = plan.value.head_dim
        shape = (self.batch, self.queries, self.query_heads, value_dim)
        like = request.query if rotation is None else outputs
        output = torch.empty(shape, dtype=like.dtype, device=like.device)
        stored_output = output if rotation is None else torch.empty_like(output)
        combine[(self.batch * self.heads, plan.rows)](
            peaks,
            totals,
            outputs,
            outputs if request.sink_logits is None else request.sink_logits,
            stored_output,
            output,
            self.heads,
            plan.rows,
            plan.splits,
            self.parts,
            VALUE_DIM=value_dim,
            VALUE_PADDED=padded(value_dim),
            QUERIES=self.queries,
            HAS_LOGITS=request.sink_logits is not None,
            APART=rotation is not None,
            **FUSION,
        )
        return output if rotation is None else (stored_output @ rotation.T).add_(output).to(request.query.dtype)

    def _mask(self, query: torch.Tensor) -> tuple[torch.Tensor, int, int]:
        """Return the mask as bytes, or any tensor where there is none, and its strides along rows and queries."""
        mask = self.request.mask
        if mask is None:
            return query, 0, 0
        seen = mask.expand(self.batch, 1, self.queries, mask.shape[3]).view(torch.uint8)
        if seen.stride(3) != 1:
            seen = seen.contiguous()
        return seen, seen.stride(0), seen.stride(2)


def _source(states: torch.Tensor | None, like: torch.Tensor) -> tuple[torch.Tensor, int, int, int]:
    """Return states whose head is contiguous, and their strides along rows, heads and tokens."""
    if states is None:
        return like, 0, 0, 0
    states = states if states.stride(3) == 1 else states.contiguous()
    return states, states.stride(0), states.stride(1), states.stride(2)


def _sink_states(side: SideView) -> torch.Tensor:
    """Return the sinks, or, where there are none, any tensor of their dtype: the program is compiled for both ways."""
    return side.window if side.sinks.states is None else side.sinks.states
