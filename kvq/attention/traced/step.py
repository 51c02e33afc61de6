"""The operation `kvq::step`: add the states of one layer to a cache and attend to all that the layer then holds.

torch.compile records it as it is, whatever the layer does with the states: a step of decoding is one graph for the
whole model. It must not know how attention is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn

from kvq.attention.traced.ticket import find_taker

Attend = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]
_SCHEMA = (
    "(Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? sink_logits, Tensor(a!) ticket, SymInt layer_idx, "
    "float scaling, bool is_causal, float? softcap) -> Tensor"
)


def define_step(attend: Attend) -> Any:
    """Return the operation; its output is `[B, Tq, Hq, D_v]`, contiguous, in the dtype of the query.

    Its arguments: query `[B, Hq, Tq, D_k]`; keys and values of this forward, `[B, H, T, D]`; mask as for `attend`, or
    None; one more logit for each head, `[Hq]`, or None; the number of the cache's ticket; the index of the layer; and
    scaling, `is_causal` and softcap as for attention.

    Args:
        attend: attends as transformers' attention functions do, to what the cache returns for the states.
    """
    # CUDA graphs leave it out: it looks up the cache, and a step that quantizes does other work than one that does not.
    tags: Any = {"tags": (torch.Tag.cudagraph_unsafe,)} if hasattr(torch.Tag, "cudagraph_unsafe") else {}
    step: Any = torch.library.custom_op("kvq::step", _Step(attend), mutates_args=("ticket",), schema=_SCHEMA, **tags)
    step.register_fake(_describe_output)
    return step


class _Step:
    """The operation on real tensors."""

    def __init__(self, attend: Attend) -> None:
        self.attend = attend

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        sink_logits: torch.Tensor | None,
        ticket: torch.Tensor,
        layer_idx: int,
        scaling: float,
        is_causal: bool,
        softcap: float | None,
    ) -> torch.Tensor:
        keys, values = find_taker(ticket).take(key, value, layer_idx)
        options = {"scaling": scaling, "is_causal": is_causal, "softcap": softcap, "s_aux": sink_logits}
        given = {name: option for name, option in options.items() if option is not None}
        output, _ = self.attend(_stand_in(query.shape[1] // key.shape[1]), query, keys, values, mask, **given)
        return output.contiguous().to(query.dtype)


def _describe_output(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any, **options: Any
) -> torch.Tensor:
    del key, rest, options
    return query.new_empty((query.shape[0], query.shape[2], query.shape[1], value.shape[3]))


@cache
def _stand_in(queries_per_head: int) -> nn.Module:
    """Return what attention over plain states asks of the model's module, which no graph can hand over."""
    module: Any = nn.Module().eval()
    module.num_key_value_groups = queries_per_head
    stand_in: nn.Module = module
    return stand_in
