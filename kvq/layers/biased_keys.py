"""Keys with a bias that is large against their spread, which groups inside one token lose.

A bias moves every key of a channel by the same number. Per-channel groups take it up in their offset. A per-token group
spans many channels, so its range, and with it the step of its codes, grows with the largest bias in it: of Qwen2.5
at 4 bits the KL divergence was 0.069 per token and 0.0008 per channel.

Owns the judgement from a model's modules. It must not know who asks, nor warn by itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from kvq.config import ResolvedLayer
from kvq.layers.metadata_dtypes import are_bytes
from kvq.plugin_api.granularity import Granularity
from kvq.store.byte_metadata import LARGEST_MID
from kvq.transformers_seams.key_projections import find_key_projections

HALF_RANGE = 3
"""Standard deviations from the middle to the end of a group of some 64 normal numbers, roughly."""
LEAST_GROWTH = 2.0
"""How many times wider a bias makes a group before it is worth a word: one bit is lost then."""
FINE_STEP = 0.5
"""Step of codes, in standard deviations of a channel, that does little harm; without a bias 4 bits have 0.4."""
SAMPLED_CHANNELS = 16
"""Channels of a head whose weights are read for the spread; a head has dozens, and they are alike."""

_KEYS_ALONE = {"k_proj", "key_proj", "k_lin", "to_k", "wk", "key", "k"}
_FUSED_BY_HEAD = {"query_key_value"}
_FUSED_IN_A_ROW = {"qkv_proj", "c_attn", "wqkv", "qkv"}
_NORMS = ("input_layernorm", "self_attn_layer_norm", "ln_1", "input_norm", "attention_norm", "norm1", "norm")
"""Names of what normalizes the input of an attention, beside it in its layer."""


@dataclass(frozen=True)
class KeyBias:
    """The bias of one layer's keys.

    Attributes:
        layer_idx: index of the layer.
        path: the module that computes the keys.
        growth: how many times wider the bias makes a group inside one token, 1 or more, of the head where it is the
            most; None where the weights have no data (a model on the meta device, or packed weights).
    """

    layer_idx: int
    path: str
    growth: float | None


def find_biased_keys(model: PreTrainedModel, least_growth: float = LEAST_GROWTH) -> tuple[KeyBias, ...]:
    """Return the layers whose keys have a large bias, or one of unknown size.

    The input of a projection is taken as normalized, so channel `c` has the standard deviation `||W_c||`. Biases
    that are zero are none.

    Args:
        model: its modules are read, nothing is run.
        least_growth: see `KeyBias.growth`.
    """
    found: dict[int, KeyBias] = {}
    for path, module in find_key_projections(model):
        layer_idx = int(next(iter(re.findall(r"\.(\d+)\.", path)), 0))
        bias = _local(getattr(module, "bias", None))
        if bias is None or layer_idx in found or (bias.device.type != "meta" and not bias.any()):
            continue
        keys = _find_keys(model, path, module, bias)
        if keys is None:
            continue
        growth = _measure_growth(*keys)
        if growth is None or growth >= least_growth:
            found[layer_idx] = KeyBias(layer_idx, path, growth)
    return tuple(found.values())


def explain_biased_keys(biases: Iterable[KeyBias], layers: Mapping[int, ResolvedLayer]) -> str | None:
    """Return a warning about keys with a large bias whose groups lie inside tokens, or whose middles are bytes.

    Args:
        biases: the model's key biases, as `find_biased_keys` returns them.
        layers: what holds for each quantized layer, by index.

    Returns:
        One line, or None where there is nothing to warn of.
    """
    present = [bias for bias in biases if bias.layer_idx in layers]
    inside = [bias for bias in present if _is_hurt_inside_tokens(bias, layers[bias.layer_idx])]
    if inside:
        return _explain_tokens(inside, layers)
    in_bytes = [bias for bias in present if _is_hurt_in_bytes(bias, layers[bias.layer_idx])]
    return _explain_bytes(in_bytes) if in_bytes else None


def _explain_tokens(hurt: Sequence[KeyBias], layers: Mapping[int, ResolvedLayer]) -> str:
    known = [bias.growth for bias in hurt if bias.growth is not None]
    size = f"up to {max(known):.0f} times wider" if known else "wider, by how much only the weights tell"
    settings = layers[hurt[0].layer_idx].key
    has_channels = Granularity.PER_CHANNEL in settings.backend.capabilities.granularities
    remedy = "write axis_key: per_channel" if has_channels else "choose a backend with per_channel groups for the keys"
    return (
        f"the keys of layers {_join_indices(hurt)} have a bias ({hurt[0].path}.bias), which makes the per_token groups "
        f"of axis_key {size} and coarser by as much; {remedy}, or measure"
    )


def _explain_bytes(hurt: Sequence[KeyBias]) -> str:
    return (
        f"the keys of layers {_join_indices(hurt)} have a bias ({hurt[0].path}.bias), too large for middles of groups "
        "in a byte each; write metadata_dtype: float16, or measure"
    )


def _join_indices(biases: Sequence[KeyBias]) -> str:
    return ", ".join(str(bias.layer_idx) for bias in biases[:8]) + f" and {len(biases) - 8} more" * (len(biases) > 8)


def _is_hurt_inside_tokens(bias: KeyBias, layer: ResolvedLayer) -> bool:
    if layer.full_precision or layer.key.granularity is not Granularity.PER_TOKEN:
        return False
    if bias.growth is None:
        return True
    return bias.growth * 2 * HALF_RANGE / max(1.0, 2**layer.key.nbits - 1) >= FINE_STEP


def _is_hurt_in_bytes(bias: KeyBias, layer: ResolvedLayer) -> bool:
    """Return whether the step of middles in bytes is half of that of the codes or more."""
    has_middles = layer.key.backend.uses_group_size  # a representation of its own has none
    if bias.growth is None or layer.full_precision or not has_middles or not are_bytes(layer.key):
        return False
    step = 2 * HALF_RANGE / (2**layer.key.nbits - 1)
    return (bias.growth - 1) * HALF_RANGE / LARGEST_MID >= step / 2


def _find_keys(
    model: PreTrainedModel, path: str, module: nn.Module, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """Return bias `[H, D]` and weights `[H, sampled, inputs]` of the keys.

    None if the layer's output is not the keys themselves.
    """
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_attention_heads", None) or 0
    size = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0)
    if not size or bias.numel() % size:
        return None
    rows = _find_rows(path.rpartition(".")[2].lower(), bias.numel() // size, heads)
    if rows is None:
        return None
    weight = _readable_weight(module, bias)
    if weight is not None:
        weight = weight.unflatten(0, (-1, size))[rows][:, :: max(1, size // SAMPLED_CHANNELS)].float()
        norm = _find_norm(model, path, weight.shape[-1])
        weight = weight if norm is None else weight * norm.float()
    return bias.unflatten(0, (-1, size))[rows], weight


def _find_rows(name: str, count: int, heads: int) -> list[int] | None:
    """Return which of the `count` heads that a projection computes are keys.

    What is none of these is a latent that is normalized later, or a layout that is not known here.
    """
    if name in _KEYS_ALONE:
        return list(range(count))
    key_heads, odd = divmod(count - heads, 2)
    if name not in _FUSED_BY_HEAD | _FUSED_IN_A_ROW or odd or key_heads < 1 or heads % key_heads:
        return None
    if name in _FUSED_IN_A_ROW:
        return list(range(heads, heads + key_heads))
    width = heads // key_heads + 2  # the queries of a group, its key, its value
    return [group * width + width - 2 for group in range(key_heads)]


def _readable_weight(module: nn.Module, bias: torch.Tensor) -> torch.Tensor | None:
    """Return the weights `[outputs, inputs]`, or None where they are packed or have no data."""
    weight = _local(module.weight)
    if weight is None or weight.device.type == "meta" or not weight.is_floating_point() or weight.dim() != 2:
        return None
    if type(module).__name__ == "Conv1D":
        weight = weight.T
    return weight if weight.shape[0] == bias.numel() else None


def _find_norm(model: PreTrainedModel, path: str, inputs: int) -> torch.Tensor | None:
    """Return the weights of what normalizes the input of a projection, `[inputs]`, or None."""
    layer = model.get_submodule(re.sub(r"(\.\d+)\..*", r"\1", path))
    weights = (_local(getattr(getattr(layer, name, None), "weight", None)) for name in _NORMS)
    return next(
        (one for one in weights if one is not None and one.numel() == inputs and one.device.type != "meta"), None
    )


def _measure_growth(bias: torch.Tensor, weight: torch.Tensor | None) -> float | None:
    if weight is None or bias.device.type == "meta":
        return None
    spread = weight.norm(dim=-1).square().mean(dim=-1).sqrt()
    growth = 1 + bias.float().abs().amax(dim=-1) / (HALF_RANGE * spread).clamp_min(1e-30)
    return float(growth.max())


def _local(tensor: object) -> torch.Tensor | None:
    """Return what this process holds of a tensor, or None for something else."""
    if not isinstance(tensor, torch.Tensor):
        return None
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.detach() if isinstance(local, torch.Tensor) else None
