"""Norms of the projections that make keys and values, for the rule of the paper: more bits where the norm is larger.

"Quantize What Counts: More for Keys, Less for Values" (arXiv 2502.15075) finds larger norms for keys. The rule inverts
on models that normalize their keys, so it is shown beside what was measured, and decides nothing.
"""

from __future__ import annotations

import re

import torch
from transformers import PreTrainedModel

from kvq.transformers_seams.key_projections import find_key_projections

_VALUE_NAMES = {"k_proj": "v_proj", "key_proj": "value_proj", "k_lin": "v_lin", "to_k": "to_v", "wk": "wv"}
_VALUE_NAMES |= {"key": "value", "k": "v"}


def measure_weight_norms(model: PreTrainedModel) -> dict[int, tuple[float, float]]:
    """Return the Frobenius norms of the key and the value projection of each layer, by index.

    Layers whose projections are fused, packed or unknown are left out.
    """
    found: dict[int, tuple[float, float]] = {}
    modules = dict(model.named_modules())
    for path, module in find_key_projections(model):
        parent, _, name = path.rpartition(".")
        other = modules.get(f"{parent}.{_VALUE_NAMES.get(name, '')}")
        index = int(next(iter(re.findall(r"\.(\d+)\.", path)), -1))
        norms = _norm(module), _norm(other)
        if index >= 0 and norms[0] is not None and norms[1] is not None:
            found.setdefault(index, (norms[0], norms[1]))
    return found


def _norm(module: object) -> float | None:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or not weight.is_floating_point() or weight.device.type == "meta":
        return None
    return float(weight.detach().float().norm())
