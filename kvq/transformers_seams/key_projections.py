"""Modules of a model, found by the names that models give them: key projections, and where each layer computes.

transformers promises no names. It must not know what they are looked up for.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

_KEY_NAMES = (
    # Ranked: a projection of keys alone, of latents that keys come from, of queries, keys and values together.
    re.compile(r"(k_proj|key_proj|k_lin|to_k|wk|key|k)"),
    re.compile(r"(kv_a_proj_with_mqa|kv_a_proj|kv_proj|wkv)"),
    re.compile(r"(query_key_value|qkv_proj|c_attn|wqkv|qkv|in_proj|att_proj|qkvz_proj)", re.IGNORECASE),
)
_SKIPPED = re.compile(r"encoder\.|vision|visual|audio|image|encoder_attn|cross")
"""Modules beside the decoder's self-attention."""


def find_key_projections(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that compute the keys of the decoder's layers, in their order, with their names.

    Where no name is known, every weight matrix of a numbered layer is yielded: the first and the last of them still
    distinguish two models.
    """
    layers = [(name, module) for name, module in model.named_modules() if _is_matrix(module) and _is_in_decoder(name)]
    for pattern in _KEY_NAMES:
        found = [(name, module) for name, module in layers if pattern.fullmatch(name.rpartition(".")[2])]
        if found:
            yield from found
            return
    yield from layers


def find_layer_devices(model: PreTrainedModel | PretrainedConfig | None, count: int) -> list[torch.device]:
    """Return the device on which each of `count` layers of a model computes."""
    if not isinstance(model, nn.Module):
        return [torch.device("cpu")] * count
    known: dict[int, torch.device] = {}
    default: torch.device = next(model.parameters()).device
    for name, module in find_key_projections(model):
        match = re.search(r"\.(\d+)\.", name)
        if match is not None:
            known.setdefault(int(match[1]), _device_of(module))
    return [known.get(index, default) for index in range(count)]


def _is_matrix(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, torch.Tensor) and weight.dim() == 2 and not isinstance(module, nn.Embedding)


def _is_in_decoder(name: str) -> bool:
    return re.search(r"\.\d+\.", name) is not None and _SKIPPED.search(name) is None


def _device_of(module: nn.Module) -> torch.device:
    # accelerate keeps a weight that is not on its device on "meta" until the forward needs it.
    wanted = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    if wanted is not None:
        return torch.device(wanted)
    device: torch.device = module.weight.device  # type: ignore[assignment]  # see _is_matrix
    return device
