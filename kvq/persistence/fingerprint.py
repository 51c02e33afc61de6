"""What tells one model, or one release of a backend, from another.

Two models of one shape differ in their weights: a few fixed elements of the first and the last key projection are
compared, since keys and values of one model mean nothing to another.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator

import torch
from packaging.requirements import Requirement
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from kvq.installed import find_version
from kvq.persistence.header import BackendFingerprint, ModelFingerprint, WeightsSample
from kvq.plugin_api.backend_spec import BackendSpec
from kvq.registry import get_registry

MODEL_FACTS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "kv_lora_rank",
    "sliding_window",
    "rope_parameters",
)
"""What is compared of a configuration: by these the states of two models of unlike shape differ."""
SAMPLE_COUNT = 4096
"""Most elements of a weight that are compared, evenly spread, so that each part of a fused projection is among them."""

_KEY_NAMES = (
    # Ranked: a projection of keys alone, of latents that keys come from, of queries, keys and values together.
    re.compile(r"(k_proj|key_proj|k_lin|to_k|wk|key|k)"),
    re.compile(r"(kv_a_proj_with_mqa|kv_a_proj|kv_proj|wkv)"),
    re.compile(r"(query_key_value|qkv_proj|c_attn|wqkv|qkv|in_proj|att_proj|qkvz_proj)", re.IGNORECASE),
)
_SKIPPED = re.compile(r"encoder\.|vision|visual|audio|image|encoder_attn|cross")
"""Modules beside the decoder's self-attention."""


def fingerprint_model(model: PreTrainedModel | PretrainedConfig) -> ModelFingerprint:
    """Return what tells a model from others; of a configuration alone, no weights.

    Args:
        model: the model; a weight that is not in memory (on disk, or without data) is left out.
    """
    whole = model if isinstance(model, PretrainedConfig) else model.config
    config = whole.get_text_config(decoder=True)
    facts = {name: _plain(getattr(config, name, None)) for name in MODEL_FACTS}
    projections = list(find_key_projections(model)) if isinstance(model, nn.Module) else []
    chosen = projections[:: max(1, len(projections) - 1)]
    weights = [
        WeightsSample(name=name, digest=digest) for name, module in chosen if (digest := _digest(module)) is not None
    ]
    return ModelFingerprint(facts={name: fact for name, fact in facts.items() if fact is not None}, weights=weights)


def find_key_projections(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that compute the keys of the decoder's layers, in their order, with their names.

    Where no name is known, every weight matrix of a numbered layer is yielded: the first and the last of them still
    tell two models apart.
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


def fingerprint_backends(specs: Iterable[BackendSpec]) -> dict[str, BackendFingerprint]:
    """Return where backends came from and what versions they run with, by name."""
    known = {info.name: f"{info.origin} {info.version}".strip() for info in get_registry().available_backends()}
    found = {}
    for spec in specs:
        names = sorted({Requirement(text).name for text in spec.requires})
        versions = {name: find_version(name) for name in names}
        found[spec.name] = BackendFingerprint(origin=known.get(spec.name, ""), requires=versions)
    return found


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


def _digest(module: nn.Module) -> str | None:
    """Return a digest of fixed elements of a weight, in whatever dtype it is; None where they cannot be read."""
    weights = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
    weight = module.weight if weights is None else weights["weight"]
    if not isinstance(weight, torch.Tensor) or weight.device.type == "meta":
        return None
    local = weight.to_local() if hasattr(weight, "to_local") else weight
    flat = local.detach().reshape(-1)
    # An odd step, so that it never runs down one column of a matrix.
    sample = flat[:: -(-flat.numel() // SAMPLE_COUNT) | 1].to("cpu")
    values = sample.double() if sample.is_floating_point() else sample.long()
    return hashlib.sha256(repr(local.shape).encode() + values.numpy().tobytes()).hexdigest()


def _plain(value: object) -> object:
    """Return a value of a configuration as JSON would return it."""
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (bool, int, float, str)) else None
