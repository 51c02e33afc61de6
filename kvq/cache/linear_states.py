"""Convolution, linear-attention and indexer states, delegated to transformers' layers.

Without a model a cache has layers of keys and values only, and says so instead of failing somewhere inside.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.cache_utils import Cache

from kvq.errors import ModelError
from kvq.layers.transformers_layers import carrier_of


class CarriedStates(Cache):
    """A cache that hands such states to transformers' layers, and refuses them where it knows no model."""

    _model_config: PretrainedConfig | None
    _known_carriers: tuple[list[Any], Cache] | None = None

    def has_previous_state(self, *args: Any, **kwargs: Any) -> bool:
        """Return whether a layer of linear attention holds a state; as in transformers."""
        known: bool = self._carriers().has_previous_state(*args, **kwargs)
        return known

    def get_conv_state(self, *args: Any, **kwargs: Any) -> torch.Tensor | None:
        """Return a state of a layer with convolutions, or None; as in transformers."""
        state: torch.Tensor | None = self._carriers().get_conv_state(*args, **kwargs)
        return state

    def update_conv_state(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Hand a state to a layer with convolutions; as in transformers."""
        state: torch.Tensor = self._carriers().update_conv_state(*args, **kwargs)
        return state

    def get_recurrent_state(self, *args: Any, **kwargs: Any) -> torch.Tensor | None:
        """Return a state of a layer of linear attention, or None; as in transformers."""
        state: torch.Tensor | None = self._carriers().get_recurrent_state(*args, **kwargs)
        return state

    def update_recurrent_state(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Hand a state to a layer of linear attention; as in transformers."""
        state: torch.Tensor = self._carriers().update_recurrent_state(*args, **kwargs)
        return state

    def update_indexer(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Hand keys to the indexer of a layer of sparse attention; as in transformers."""
        keys: torch.Tensor = self._carriers().update_indexer(*args, **kwargs)
        return keys

    def _carriers(self) -> Cache:
        """Return transformers' cache over the layers that hold such states, at the places of those that carry them.

        Raises:
            ModelError: the cache knows no model.
        """
        self._check_knows_states()
        if (
            self._known_carriers is None or self._known_carriers[0] is not self.layers
        ):  # asked in every layer, each step
            self._known_carriers = self.layers, Cache(layers=[carrier_of(layer) for layer in self.layers])
        return self._known_carriers[1]

    def _check_knows_states(self) -> None:
        if self._model_config is None:
            raise ModelError(
                "this model has layers that carry states of their own (linear attention, convolutions, indexers), of "
                "which a cache without a model does not know: pass `model=`, as in KVQ(config, model=model)"
            )
