"""Turning keys to other positions, by a model's own rotary embedding (RoPE, arXiv 2104.09864).

A key at position p is turned by angles that grow with p. Turning it further by the angles of d makes it the key at
position p + d, wherever the angles depend on the position alone. Whether that holds is tried on the model itself.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from kvq.errors import ModelError
from kvq.transformers_seams.position_offsets import OFFSETS, find_offset_holder
from kvq.transformers_seams.private_names import pass_cache

FIXED_KINDS = ("default", "linear", "llama3", "yarn", "proportional")
"""Kinds of RoPE whose angles do not depend on how long the text is."""
_TRIED_TOKENS = 8
_TRIED_DISTANCE = 37
_TOLERANCES = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 6e-2}
"""Largest relative difference between keys that were turned and those that the model computes there."""


class KeyRotation:
    """Turns the keys of one model.

    Args:
        model: a causal model with weights; it is run on a few tokens, twice.

    Raises:
        ModelError: its keys do not turn with their positions in one known way in all layers.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._name = type(model).__name__
        if not isinstance(model, nn.Module):
            raise ModelError(f"model={self._name}: keys are turned by the model itself; give it, with its weights")
        if find_offset_holder(model) is not None:
            raise ModelError(
                f"{self._name}: images shift the positions of later tokens ({OFFSETS}), and no cache says by how much; "
                "its caches cannot be concatenated"
            )
        self._embedding = _find_embedding(model)
        self._apply = _find_apply(self._embedding)
        try:
            self._check(model)
        except (
            RuntimeError,
            IndexError,
            TypeError,
            ValueError,
        ) as error:  # foreign code with positions it may not take
            if isinstance(error, ModelError):
                raise
            raise ModelError(f"{self._name}: its keys cannot be turned to other positions: {error}") from error

    def shifted(self, keys: torch.Tensor, distance: int) -> torch.Tensor:
        """Return keys as they would be `distance` positions later.

        Args:
            keys: `[B, H, T, D]`; not written to.
            distance: tokens, at least 0.
        """
        if not distance:
            return keys
        wide = keys.float()
        positions = torch.full((1, 1), distance, device=keys.device)
        cos, sin = self._embedding(wide, positions)
        scaling = float(getattr(self._embedding, "attention_scaling", 1.0))
        cos, sin = cos / scaling, sin / scaling  # the keys have been scaled when they came
        turned = wide[..., : cos.shape[-1]]
        turned = self._apply(turned, turned, cos, sin)[1]
        return torch.cat([turned, wide[..., cos.shape[-1] :]], dim=-1).to(keys.dtype)

    @torch.inference_mode()
    def _check(self, model: PreTrainedModel) -> None:
        here, there = (_run(model, start) for start in (0, _TRIED_DISTANCE))
        for index, (layer, moved) in enumerate(zip(here.layers, there.layers, strict=True)):
            if getattr(layer, "keys", None) is None:
                raise ModelError(f"{self._name}: layer {index} holds no keys, which could be turned to other positions")
            found, expected = self.shifted(layer.keys, _TRIED_DISTANCE).float(), moved.keys.float()
            difference = (found - expected).norm() / expected.norm()
            if not difference < _TOLERANCES.get(layer.keys.dtype, 1e-3):
                raise ModelError(
                    f"{self._name}: keys of layer {index} that were turned to other positions differ by "
                    f"{difference:.1%} from those that the model computes there; its positions are not those of one "
                    "rotary embedding, so its caches cannot be concatenated"
                )


def _find_embedding(model: PreTrainedModel) -> Any:
    """Return the module that makes cosines and sines."""
    name = type(model).__name__
    found = {id(module): module for path, module in model.named_modules() if path.rpartition(".")[2] == "rotary_emb"}
    if len(found) != 1:
        raise ModelError(
            f"{name} has {len(found) or 'no'} rotary embeddings{' that differ' if found else ''}, and one is needed to "
            "turn keys to other positions; its caches cannot be concatenated"
        )
    embedding: nn.Module = next(iter(found.values()))
    kind = getattr(embedding, "rope_type", None)
    if kind not in FIXED_KINDS:
        raise ModelError(
            f"{name} has RoPE of the kind {kind!r}; keys can be turned to other positions where it is one of "
            f"{', '.join(FIXED_KINDS)}"
        )
    return embedding


def _find_apply(embedding: nn.Module) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """Return the function of the model's own file that turns queries and keys."""
    found = getattr(sys.modules[type(embedding).__module__], "apply_rotary_pos_emb", None)
    if found is None:
        raise ModelError(
            f"{type(embedding).__module__} has no apply_rotary_pos_emb to turn keys with; caches cannot be concatenated"
        )
    apply: Callable[..., tuple[torch.Tensor, torch.Tensor]] = found
    return apply


def _run(model: PreTrainedModel, start: int) -> DynamicCache:
    """Return the cache of a few tokens that stand at positions from `start` on."""
    cache = DynamicCache()
    count = min(_TRIED_TOKENS, model.config.get_text_config().vocab_size)
    tokens = torch.arange(count, device=model.device)[None]
    positions = torch.arange(start, start + count, device=model.device)[None]
    model(tokens, position_ids=positions, use_cache=True, **pass_cache(model, cache))
    return cache
