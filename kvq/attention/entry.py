"""The one way from a query and a quantized layer to an attention output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface

from kvq.attention import ATTENTION_NAME
from kvq.attention.attention_detector import report_model
from kvq.attention.chosen_keys import ARGUMENT, lay_choice_over
from kvq.attention.dispatch.kernel_cache import KernelCache
from kvq.attention.dispatch.kernel_registry import Choice, get_kernel_registry
from kvq.attention.dispatch.request import AttentionRequest
from kvq.attention.dispatch.verification import attend_verified
from kvq.attention.full_precision import SDPA_OPTIONS, attend_full_precision, find_option_beyond, is_causal
from kvq.attention.handle import PackedPair, PackedStates
from kvq.attention.kernels.eager.kernel import REFERENCE
from kvq.attention.padding_mask import kvq_mask
from kvq.attention.step_states import StepStates
from kvq.attention.traced.deferred import DeferredPair, find_pair, settled
from kvq.attention.traced.step import define_step
from kvq.attention.visibility import hide_first

READ_OPTIONS = SDPA_OPTIONS | {"softcap", "s_aux"}
"""Arguments that kernels obey."""
MAX_REMEMBERED_KINDS = 64
"""Kinds of requests that a layer remembers the choice for."""


def attend(
    module: nn.Module, query: torch.Tensor, pair: PackedPair, attention_mask: torch.Tensor | None, **options: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attend to the keys and values of a quantized layer.

    A kernel reads them packed, unless the request has something that no kernel knows; then the layer is dequantized for
    the call.

    Args:
        module: the model's attention module.
        query: `[B, Hq, Tq, D]`.
        pair: keys and values of the layer.
        attention_mask: boolean or additive `[B, 1, Tq, Tk]`, without the tokens that the pair hides; or None for plain
            causal attention.
        **options: the other arguments of the model's attention function.

    Returns:
        The output `[B, Tq, Hq, D_v]`, and the attention weights where the model's eager attention returns them.
    """
    kernel_cache = pair.kernel_cache
    reason = find_reason_to_materialize(query, pair, options)
    if reason is not None:
        kernel_cache.last_reader, kernel_cache.passed_over = f"materialized: {reason}", {}
        keys, values = (side.materialize()[:, :, pair.hidden :] for side in (pair.key, pair.value))
        return attend_full_precision(module, query, keys, values, attention_mask, **options)
    scaling = options.get("scaling")
    request = AttentionRequest(
        query,
        pair,
        attention_mask,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        is_causal=is_causal(module, options),
        softcap=options.get("softcap"),
        sink_logits=options.get("s_aux"),
    )
    if pair.hidden:
        request = hide_first(attention_mask, pair.hidden, request)
    return attend_packed(request, kernel_cache), None


def attend_packed(request: AttentionRequest, kernel_cache: KernelCache) -> torch.Tensor:
    """Return the output `[B, Tq, Hq, D_v]` by the kernel that was chosen for requests of this kind.

    Args:
        request: the call to serve.
        kernel_cache: the layer's.
    """
    if torch.is_autocast_enabled(request.query.device.type):
        # Kernels compute in the dtypes that they choose; autocast would round the sums of the reference.
        with torch.autocast(request.query.device.type, enabled=False):
            return attend_packed(request, kernel_cache)
    kind = request.kind()
    choice: Choice | None = kernel_cache.choices.get(kind)
    registry = get_kernel_registry()
    if choice is not None and not registry.is_distrusted(choice.kernel, request.query.device):
        kernel_cache.last_reader, kernel_cache.passed_over = choice.kernel.name, choice.passed_over
        return choice.kernel.attend(request)
    if len(kernel_cache.choices) >= MAX_REMEMBERED_KINDS:
        kernel_cache.choices.clear()
    choice = registry.choose(request, wanted=kernel_cache.wanted)
    choice, output = attend_verified(choice, REFERENCE, request, registry, wanted=kernel_cache.wanted)
    kernel_cache.choices[kind] = choice
    kernel_cache.last_reader, kernel_cache.passed_over = choice.kernel.name, choice.passed_over
    return output


def find_reason_to_materialize(query: torch.Tensor, pair: PackedPair, options: Mapping[str, Any]) -> str | None:
    """Return why a layer cannot be read packed, in a few words, or None."""
    if not pair.key.store.segments and query.shape[2] > 1:
        return "nothing is quantized yet"
    if options.get("dropout"):
        return "dropout"
    if torch.is_grad_enabled() and (query.requires_grad or (pair.key.new is not None and pair.key.new.requires_grad)):
        return "gradients"
    beyond = find_option_beyond(READ_OPTIONS, options)
    return None if beyond is None else f"argument {beyond!r}"


def kvq_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attend as transformers' attention functions do; `attn_implementation="kvq"` calls this.

    Args:
        module: the model's attention module.
        query: `[B, Hq, Tq, D]`.
        key: a handle of a quantized layer, or plain keys `[B, H, Tk, D]`; in a model that is being compiled also states
            that the cache has yet to take, and in a step that is being recorded what stands for them.
        value: the same for the values.
        attention_mask: the mask that `kvq_mask` made.
        dropout: share of the probabilities that are dropped; in its place as transformers' functions have it, since
            wrappers around them (kvpress) pass it there.
        **options: scaling and any other argument that the model passes.
    """
    options["dropout"] = dropout
    if isinstance(key, StepStates):
        return key.take_query(query, attention_mask, options), None
    pair = find_pair(key, value)
    if pair is not None and _may_step(query, pair, options):
        return _take_step(module, query, pair, attention_mask, options), None
    attended: tuple[torch.Tensor, torch.Tensor | None] = _attend_given(
        module, query, settled(key), settled(value), attention_mask, **options
    )
    return attended


# Under torch.compile a graph breaks here: chunks and addresses are Python's.
@torch.compiler.disable  # type: ignore[untyped-decorator]  # torch leaves it unannotated
def _attend_given(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attend to states that are handles or plain tensors."""
    if options.get(ARGUMENT) is not None:
        causal = is_causal(module, options)
        attention_mask, options = lay_choice_over(attention_mask, options, key.shape[2], causal=causal)
    if isinstance(key, PackedStates) and isinstance(value, PackedStates) and key.pair is value.pair:
        key.check_fresh()
        if key.is_fresh:  # else kernels may know where the chunks were
            return attend(module, query, key.pair, attention_mask, **options)
    config = getattr(module, "config", None)
    if getattr(config, "_attn_implementation", None) == ATTENTION_NAME:
        report_model(key, config)
    return attend_full_precision(module, query, _plain(key), _plain(value), attention_mask, **options)


STEP = define_step(_attend_given)
"""The operation `kvq::step` of torch."""


def _may_step(query: torch.Tensor, pair: DeferredPair, options: Mapping[str, Any]) -> bool:
    """Return whether the operation obeys all of a call."""
    needs_gradients = any(states.requires_grad for states in (query, pair.key, pair.value))
    is_known = not options.get("dropout") and find_option_beyond(READ_OPTIONS, options) is None
    return is_known and not pair.is_taken and not (torch.is_grad_enabled() and needs_gradients)


def _take_step(
    module: nn.Module,
    query: torch.Tensor,
    pair: DeferredPair,
    attention_mask: torch.Tensor | None,
    options: Mapping[str, Any],
) -> torch.Tensor:
    """Let the cache take the states of a pair and attend to the layer, in one operation."""
    pair.is_taken = True
    scaling = options.get("scaling")
    output: torch.Tensor = STEP(
        query,
        pair.key,
        pair.value,
        attention_mask,
        options.get("s_aux"),
        pair.ticket.number,
        pair.layer_idx,
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        is_causal(module, options),
        options.get("softcap"),
    )
    return output


def _plain(states: torch.Tensor) -> torch.Tensor:
    return states.materialize() if isinstance(states, PackedStates) else states


# At import: `attn_implementation="kvq"` may be given when a model is loaded, before there is any cache. Without the
# mask function padding would be ignored.
AttentionInterface.register(ATTENTION_NAME, kvq_attention_forward)
AttentionMaskInterface.register(ATTENTION_NAME, kvq_mask)
