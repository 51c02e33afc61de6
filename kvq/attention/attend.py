"""The one way from a query and a quantized layer to an attention output."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from kvq.attention.handle import PackedPair, PackedStates

ATTENTION_NAME = "kvq"
"""The name under which transformers knows our attention."""

BEYOND_SDPA = ("softcap", "s_aux", "sinks", "position_bias", "head_mask", "output_attentions")
"""Arguments that scaled-dot-product attention drops or refuses; the model's own eager attention knows them."""


def attend(
    module: nn.Module, query: torch.Tensor, pair: PackedPair, attention_mask: torch.Tensor | None, **options: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attend to the keys and values of a quantized layer.

    Args:
        module: the model's attention module.
        query: `[B, Hq, Tq, D]`.
        pair: keys and values of the layer; one layer's history is materialized for the time of the call.
        attention_mask: boolean or additive `[B, 1, Tq, Tk]`, or None for plain causal attention.
        **options: what the model passes to its attention function.

    Returns:
        The output `[B, Tq, Hq, D_v]`, and the attention weights where the model's eager attention returns them.
    """
    keys, values = pair.key.materialize(), pair.value.materialize()
    return attend_full_precision(module, query, keys, values, attention_mask, **options)


def attend_full_precision(
    module: nn.Module,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attend to plain keys and values `[B, H, Tk, D]`, by SDPA or, where that would drop an argument, by the model."""
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if eager is None or not any(_is_set(options.get(name)) for name in BEYOND_SDPA):
        output: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, keys, values, attention_mask, **options
        )
        return output
    additive = _additive_mask(attention_mask, query, keys, is_causal=bool(getattr(module, "is_causal", True)))
    attended: tuple[torch.Tensor, torch.Tensor | None] = eager(module, query, keys, values, additive, **options)
    return attended


def kvq_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attend as transformers' attention functions do; what `attn_implementation="kvq"` calls.

    Args:
        module: the model's attention module.
        query: `[B, Hq, Tq, D]`.
        key: a handle of a quantized layer, or plain keys `[B, H, Tk, D]`.
        value: the same for the values.
        attention_mask: what the mask function registered under the same name made.
        **options: scaling, dropout and whatever else the model passes.
    """
    if isinstance(key, PackedStates) and isinstance(value, PackedStates) and key.pair is value.pair:
        key.check_fresh()
        return attend(module, query, key.pair, attention_mask, **options)
    return attend_full_precision(module, query, _plain(key), _plain(value), attention_mask, **options)


def register_attention() -> None:
    """Make `attn_implementation="kvq"` known to transformers; without its mask, padding would be ignored."""
    AttentionInterface.register(ATTENTION_NAME, kvq_attention_forward)
    AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)


def _plain(states: torch.Tensor) -> torch.Tensor:
    return states.materialize() if isinstance(states, PackedStates) else states


def _is_set(option: object) -> bool:
    return option is not None and option is not False


def _additive_mask(
    mask: torch.Tensor | None, query: torch.Tensor, keys: torch.Tensor, *, is_causal: bool
) -> torch.Tensor | None:
    """Return the mask as eager attention adds it, with the causal one written out where SDPA needs none."""
    if mask is None and is_causal and query.shape[2] > 1:
        mask = torch.ones(query.shape[2], keys.shape[2], dtype=torch.bool, device=query.device)
        mask = mask.tril(keys.shape[2] - query.shape[2])[None, None]
    if mask is None or mask.dtype != torch.bool:
        return mask
    lowest = torch.finfo(query.dtype).min
    return torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, lowest)
