"""Attention over plain keys and values, where no kernel can read the layer packed.

SDPA where it obeys every argument; else the model's own eager attention, from the file of the attention class or of a
parent class; else the arithmetic of this file, or a refusal. No argument is dropped in silence. It must not know what a
cache is.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Set
from typing import Any

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from kvq.attention.visibility import causally_visible, to_additive
from kvq.errors import ModelError

SDPA_OPTIONS = frozenset({"scaling", "dropout", "is_causal"})
"""Arguments that scaled-dot-product attention obeys; the model's own eager attention is given all others."""
WRITTEN_OUT_OPTIONS = SDPA_OPTIONS | {"softcap", "s_aux", "position_bias", "output_attentions"}
"""Arguments that the arithmetic of this file obeys."""
WITHOUT_EFFECT = frozenset(
    {
        *("sliding_window", "position_ids", "cache_position", "use_cache"),
        *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"),
        *("output_hidden_states", "output_router_logits", "return_dict", "logits_to_keep", "num_items_in_batch"),
        *("token_type_ids", "mm_token_type_ids"),
        *("tokenizer", "assistant_tokenizer"),  # `generate` hands these on, which it takes for `stop_strings`
    }
)
"""Arguments that tell attention nothing beyond query, keys and mask."""


def attend_full_precision(
    module: nn.Module,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attend to plain keys and values.

    Args:
        module: the model's attention module.
        query: `[B, Hq, Tq, D]`, at the last Tq of the Tk positions.
        keys: `[B, H, Tk, D]`.
        values: `[B, H, Tk, D_v]`.
        attention_mask: boolean or additive `[B, 1, Tq, Tk]`, or None for plain causal attention.
        **options: the other arguments of the model's attention function.

    Returns:
        The output `[B, Tq, Hq, D_v]`, and the attention weights `[B, Hq, Tq, Tk]` or None.

    Raises:
        ModelError: an argument would be dropped, since the model has no eager attention of its own.
    """
    if attention_mask is None and is_causal(module, options) and 1 < query.shape[2] < keys.shape[2]:
        # SDPA lays the causal mask at the upper left.
        attention_mask = _causal_mask(query, keys)
    if find_option_beyond(SDPA_OPTIONS, options) is None:
        if query.device.type == "cpu":
            # Models hand over transposed views, over which flash attention on a processor takes an eighth longer.
            keys, values = keys.contiguous(), values.contiguous()
        output: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, keys, values, attention_mask, **options
        )
        return output
    additive = _additive_mask(attention_mask, query, keys, causal=is_causal(module, options))
    eager = _find_eager_attention(module) or _attend_written_out
    attended: tuple[torch.Tensor, torch.Tensor | None] = eager(module, query, keys, values, additive, **options)
    return attended


def is_causal(module: nn.Module, options: Mapping[str, Any]) -> bool:
    """Return whether attention without a mask is causal: the argument of that name, else what the module says."""
    given = options.get("is_causal")
    return bool(getattr(module, "is_causal", True) if given is None else given)


def find_option_beyond(known: Set[str], options: Mapping[str, Any]) -> str | None:
    """Return the first argument that is set, means something to attention and is not known."""
    for name, value in options.items():
        if value is not None and value is not False and name not in known and name not in WITHOUT_EFFECT:
            return name
    return None


def _find_eager_attention(module: nn.Module) -> Callable[..., Any] | None:
    """Return the eager attention in the file of the module's class, or of the nearest one that it inherits from."""
    for kind in type(module).__mro__:
        eager: Callable[..., Any] | None = getattr(sys.modules.get(kind.__module__), "eager_attention_forward", None)
        if eager is not None:
            return eager
    return None


def _attend_written_out(
    module: nn.Module,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    additive: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return output and weights with every argument of `WRITTEN_OUT_OPTIONS` obeyed; refuse any other."""
    beyond = find_option_beyond(WRITTEN_OUT_OPTIONS, options)
    if beyond is not None:
        raise ModelError(
            f"{type(module).__name__} passes {beyond!r} to its attention, which kvq does not know, and no "
            f"`eager_attention_forward` in {type(module).__module__} or the files of its parents obeys it; define one "
            "there, or choose another attention by model.set_attn_implementation(...)"
        )
    scaling, softcap, bias = options.get("scaling"), options.get("softcap"), options.get("position_bias")
    scores = _per_head(query, keys) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    for added in (bias, additive):
        scores = scores if added is None else scores + added
    logits = options.get("s_aux")
    if logits is not None:
        extra = logits.reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1).to(scores)
        scores = torch.cat([scores, extra], dim=-1)
    weights = scores.softmax(dim=-1, dtype=torch.float32)[..., : keys.shape[2]].to(query.dtype)
    weights = nn.functional.dropout(weights, options.get("dropout") or 0.0, training=module.training)
    return _per_head(weights, values.transpose(2, 3)).transpose(1, 2).contiguous(), weights


def _per_head(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return `left @ right^T`, `[B, Hq, Tq, X]` of `[B, Hq, Tq, Y]` and `[B, H, X, Y]`; query heads share one of H."""
    packed = left.unflatten(1, (right.shape[1], -1)).flatten(2, 3)
    product: torch.Tensor = (packed @ right.transpose(2, 3)).unflatten(2, (-1, left.shape[2])).flatten(1, 2)
    return product


def _causal_mask(query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor | None:
    """Return which token each query sees, bool `[1, 1, Tq, Tk]`, or None where each sees all."""
    length = keys.shape[2]
    return causally_visible(query.shape[2], length, 0, length, query.device)


def _additive_mask(
    mask: torch.Tensor | None, query: torch.Tensor, keys: torch.Tensor, *, causal: bool
) -> torch.Tensor | None:
    """Return the mask as eager attention adds it, with the causal one written out where SDPA needs none."""
    if mask is None and causal:
        mask = _causal_mask(query, keys)
    if mask is None or mask.dtype != torch.bool:
        return mask
    return to_additive(mask, query.dtype, torch.finfo(query.dtype).min)
