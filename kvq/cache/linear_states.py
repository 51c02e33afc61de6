"""Convolution, linear-attention and indexer states, delegated to transformers' layers.

Without a model a cache has layers of keys and values only, and says so instead of failing somewhere inside.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.cache_utils import Cache

from kvq.errors import ModelError


class CarriedStates(Cache):
    """A cache that hands such states to transformers' layers, and refuses them where it knows no model."""

    _model_config: PretrainedConfig | None

    def has_previous_state(self, *args: Any, **kwargs: Any) -> bool:
        """Return whether a layer of linear attention holds a state; as in transformers."""
        self._check_knows_states()
        known: bool = super().has_previous_state(*args, **kwargs)
        return known

    def get_conv_state(self, *args: Any, **kwargs: Any) -> torch.Tensor | None:
        """Return a state of a layer with convolutions, or None; as in transformers."""
        self._check_knows_states()
        state: torch.Tensor | None = super().get_conv_state(*args, **kwargs)
        return state

    def update_conv_state(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Hand a state to a layer with convolutions; as in transformers."""
        self._check_knows_states()
        state: torch.Tensor = super().update_conv_state(*args, **kwargs)
        return state

    def get_recurrent_state(self, *args: Any, **kwargs: Any) -> torch.Tensor | None:
        """Return a state of a layer of linear attention, or None; as in transformers."""
        self._check_knows_states()
        state: torch.Tensor | None = super().get_recurrent_state(*args, **kwargs)
        return state

    def update_recurrent_state(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Hand a state to a layer of linear attention; as in transformers."""
        self._check_knows_states()
        state: torch.Tensor = super().update_recurrent_state(*args, **kwargs)
        return state

    def update_indexer(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Hand keys to the indexer of a layer of sparse attention; as in transformers."""
        self._check_knows_states()
        keys: torch.Tensor = super().update_indexer(*args, **kwargs)
        return keys

    def _check_knows_states(self) -> None:
        if self._model_config is None:
            raise ModelError(
                "this model has layers that carry states of their own (linear attention, convolutions, indexers), of "
                "which a cache without a model does not know: pass `model=`, as in KVQ(config, model=model)"
            )
