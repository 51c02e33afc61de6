"""The reference: attention on packed blocks with torch alone, on any device, for any quantizer.

Scales are folded into query and probabilities, sums are in fp32, and pieces of the history follow each other under an
online softmax: nothing of the size of the history is ever allocated.
"""

from __future__ import annotations

import torch

from kvq.attention.dispatch.request import AttentionRequest
from kvq.attention.kernels.eager.folded import find_fused
from kvq.attention.kernels.eager.masking import RowMask
from kvq.attention.kernels.eager.online_softmax import OnlineSoftmax
from kvq.attention.kernels.stored_pieces import StoredPiece, iterate_pieces
from kvq.store.sinks import SinkTokens


class EagerKernel:
    """Runs everywhere and takes every request."""

    name = "eager"
    device_types: frozenset[str] = frozenset()
    needs_benchmark = False

    def why_unavailable(self) -> str | None:
        """Return None: torch is all that it needs."""
        return None

    def why_unsupported(self, request: AttentionRequest) -> str | None:
        """Return None: there is none."""
        del request
        return None

    def attend(self, request: AttentionRequest) -> torch.Tensor:
        """Return the output `[B, Tq, Hq, D_v]` in the dtype of the query."""
        run = _EagerRun(request)
        for piece in iterate_pieces(request.pair, request.row_count, request.query.device):
            run.add_stored(piece)
        run.add_sinks()
        run.add_exact()
        return run.finish()


REFERENCE = EagerKernel()


class _EagerRun:
    """One call: the running sums of the stored values, as these are stored, and of the exact ones.

    Rows are the R query vectors of one key-value head.
    """

    def __init__(self, request: AttentionRequest) -> None:
        pair = request.pair
        self.request = request
        batch, _, queries, head_dim = request.query.shape
        self.heads = pair.key.like.shape[1]
        self.query = request.query.reshape(batch, self.heads, request.queries_per_head * queries, head_dim).float()
        self.keys = find_fused(pair.key.store.codec, head_dim)
        self.values = find_fused(pair.value.store.codec, pair.value.like.shape[3])
        self.mask = RowMask(request)
        self.softmax = OnlineSoftmax(_first_logits(request, self.query))
        self.prepared = self.keys.prepare_query(self.query) if pair.key.store.segments else None
        self.covered = _sink_positions(pair.key.sinks, request.stored_length, request.query.device)
        self.stored_sum: torch.Tensor | None = None
        self.exact_sum: torch.Tensor | None = None

    def add_stored(self, piece: StoredPiece) -> None:
        """Attend to stored tokens, except those that sinks are laid over."""
        scores = torch.cat([self.keys.scores(self.prepared, parts) for parts, _ in piece.keys], dim=-1)
        scores = self.mask.apply(scores, piece.start)
        if self.covered is not None and piece.start < max(self.request.pair.key.sinks.ends):
            tokens = torch.arange(piece.start, piece.stop, device=scores.device)
            hidden = (tokens[:, None] == self.covered[:, None, :]).any(-1)
            scores.masked_fill_(hidden[:, None, None], -torch.inf)
        weights = self._weigh(scores)
        lengths = [length for _, length in piece.values]
        for share, (parts, _) in zip(weights.split(lengths, dim=-1), piece.values, strict=True):
            mixed = self.values.mix(share, parts)
            self.stored_sum = mixed if self.stored_sum is None else self.stored_sum.add_(mixed)

    def add_sinks(self) -> None:
        """Attend to the sinks that are laid over stored tokens."""
        pair, positions = self.request.pair, self.covered
        if positions is None or pair.key.sinks.states is None or pair.value.sinks.states is None:
            return
        scores = self.query @ pair.key.sinks.states.float().transpose(-1, -2)
        scores = self.mask.apply_at(scores, positions.clamp_min(0))
        scores.masked_fill_((positions < 0)[:, None, None], -torch.inf)
        self._add_exact_values(scores, pair.value.sinks.states)

    def add_exact(self) -> None:
        """Attend to the window and to the states of this forward."""
        pair, start = self.request.pair, self.request.stored_length
        for keys, values in ((pair.key.window, pair.value.window), (pair.key.new, pair.value.new)):
            if keys is not None and values is not None and keys.shape[2]:
                scores = self.mask.apply(self.query @ keys.float().transpose(-1, -2), start)
                self._add_exact_values(scores, values)
                start += keys.shape[2]

    def finish(self) -> torch.Tensor:
        """Return `[B, Tq, Hq, D_v]`."""
        parts = [] if self.stored_sum is None else [self.values.finish_output(self.stored_sum)]
        parts += [] if self.exact_sum is None else [self.exact_sum]
        output = self.softmax.normalize(parts[0] if len(parts) == 1 else parts[0] + parts[1])
        batch, heads, queries = self.request.query.shape[:3]
        output = output.reshape(batch, heads, queries, output.shape[-1])
        return output.transpose(1, 2).to(self.request.query.dtype).contiguous()

    def _add_exact_values(self, scores: torch.Tensor, values: torch.Tensor) -> None:
        mixed = self._weigh(scores) @ values.float()
        self.exact_sum = mixed if self.exact_sum is None else self.exact_sum.add_(mixed)

    def _weigh(self, scores: torch.Tensor) -> torch.Tensor:
        weights, factor = self.softmax.weigh(scores)
        for total in (self.stored_sum, self.exact_sum):
            if total is not None:
                total.mul_(factor)
        return weights


def _first_logits(request: AttentionRequest, query: torch.Tensor) -> torch.Tensor:
    """Return the logits `[B, H, R, 1]` that rows start with."""
    batch, heads, rows, _ = query.shape
    if request.sink_logits is None:
        return query.new_full((batch, heads, rows, 1), -torch.inf)
    by_head = request.sink_logits.float().reshape(1, heads, -1, 1)
    return by_head.expand(batch, -1, -1, request.query.shape[2]).reshape(batch, heads, rows, 1)


def _sink_positions(sinks: SinkTokens, stored: int, device: torch.device) -> torch.Tensor | None:
    """Return the positions `[B, S]` of the sinks that are kept, -1 for those behind the store; None without any."""
    if sinks.states is None or not stored:
        return None
    kept = sinks.states.shape[2]  # fewer than asked for until the store reaches them
    positions = torch.tensor(sinks.starts, device=device)[:, None] + torch.arange(kept, device=device)
    return positions.masked_fill(positions >= stored, -1)
