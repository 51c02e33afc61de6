"""Facts that distinguish one model, or one release of a backend, from another.

Two models of one shape differ in their weights: a few fixed elements of the first and the last key projection are
compared, since keys and values of one model mean nothing to another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from packaging.requirements import Requirement
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from kvq.files.model_fingerprint import ModelFingerprint, WeightsSample
from kvq.installed import find_version
from kvq.persistence.header import BackendFingerprint
from kvq.plugin_api.backend_spec import BackendSpec
from kvq.registry import get_registry
from kvq.transformers_seams.key_projections import find_key_projections

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
"""The parts of a configuration that are compared: if they differ, so do the models' states."""
SAMPLE_COUNT = 4096
"""Most elements of a weight that are compared, evenly spread: each part of a fused projection is among them."""


def fingerprint_model(model: PreTrainedModel | PretrainedConfig) -> ModelFingerprint:
    """Return the facts that distinguish a model from others; of a configuration alone, no weights.

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


def fingerprint_backends(specs: Iterable[BackendSpec]) -> dict[str, BackendFingerprint]:
    """Return where backends came from and what versions they run with, by name."""
    known = {info.name: f"{info.origin} {info.version}".strip() for info in get_registry().available_backends()}
    found = {}
    for spec in specs:
        names = sorted({Requirement(text).name for text in spec.requires})
        versions = {name: find_version(name) for name in names}
        found[spec.name] = BackendFingerprint(origin=known.get(spec.name, ""), requires=versions)
    return found


def _digest(module: nn.Module) -> str | None:
    """Return a digest of fixed elements of a weight, in any dtype; None where they cannot be read."""
    weights = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
    weight = module.weight if weights is None else weights["weight"]
    if not isinstance(weight, torch.Tensor) or weight.device.type == "meta":
        return None
    local = weight.to_local() if hasattr(weight, "to_local") else weight
    flat = local.detach().reshape(-1)
    # An odd step: it never runs down one column of a matrix.
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
