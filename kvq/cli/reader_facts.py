"""Which kernels of attention read what a backend stores, and how: found by asking them about a layer that holds some.

Heavy: it imports torch and, through the backend, the vendor's library.
"""

from __future__ import annotations

import warnings
from typing import Any

from kvq.attention.dispatch.request import AttentionRequest
from kvq.attention.kernels.eager.folded import DecodedBlocks, FoldedAffine, find_fused
from kvq.attention.kernels.own_kernels import OWN_KERNELS
from kvq.cli.console import one_line
from kvq.cli.sample_block import proposed_group_sizes
from kvq.plugin_api.backend_spec import BackendSpec
from kvq.plugin_api.granularity import Granularity
from kvq.testing.attention import make_request
from kvq.testing.case import STEPS, ContractCase

DEFAULT_STEPS = dict.fromkeys(STEPS, "auto")
DECODING_KERNELS = frozenset({"blockwise"})
"""Kernels that serve several queries, of any backend, since they decode."""
MANY_QUERIES = 5
_WIDTHS = ("nbits_k", "nbits_v")


def list_readers(spec: BackendSpec) -> list[dict[str, Any]]:
    """Return, for each direction of groups, how each kernel reads what the backend stores by default."""
    return [_describe(spec, word) for word in spec.capabilities.granularities]


def _describe(spec: BackendSpec, granularity: Granularity) -> dict[str, Any]:
    row: dict[str, Any] = {"granularity": str(granularity), "kernels": {}, "reasons": {}}
    case = ContractCase(spec, max(spec.capabilities.nbits), granularity)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            one, many = (_request(case, queries) for queries in (1, MANY_QUERIES))
    except Exception as error:  # noqa: BLE001  # foreign code; what it raises is the answer for this row
        row["reasons"] = {"": one_line(f"{type(error).__name__}: {error}")}
        return row
    for kernel in OWN_KERNELS:
        decodes = kernel.name in DECODING_KERNELS
        reason = kernel.why_unsupported(many if decodes else one)
        way = "decoded" if decodes else _find_way(one) if kernel.name == "eager" else "codes"
        row["kernels"][kernel.name] = None if reason else way
        if reason:
            row["reasons"][kernel.name] = reason
    return row


def _request(case: ContractCase, queries: int) -> AttentionRequest:
    proposed = {field: case.backend.defaults[field] for field in _WIDTHS if field in case.backend.defaults}
    fields = {"q_group_size": proposed_group_sizes(case.backend), **DEFAULT_STEPS, **proposed}
    return make_request(case, queries, is_padded=False, order=None, **fields)


def _find_way(request: AttentionRequest) -> str:
    """Return how the reference reads the keys: their codes, by the backend's `FusedScores`, or decoded."""
    fused = find_fused(request.pair.key.store.codec, request.query.shape[3])
    if isinstance(fused, FoldedAffine):
        return "codes"
    return "decoded" if isinstance(fused, DecodedBlocks) else "FusedScores"
