"""A cache of transformers whose states are those that an engine would read back."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from transformers import DynamicCache, PretrainedConfig

from kvq.exporting.engine import EngineSetting
from kvq.exporting.state_format import StateFormat


class EmulatedCache(DynamicCache):
    """Rounds the states of every token to an engine's formats when they arrive, and holds them in full precision.

    As in the engines, every query reads the rounded states, of its own token too. A format with constants takes them
    from the first states of each layer, as a calibration on a prompt would find them. Only numbers are emulated, not
    memory: the bytes held are those of full precision.

    Args:
        model_config: the model's configuration, or None.
        setting: the formats of keys and values.
        kept: layers that stay in full precision.
    """

    def __init__(
        self, model_config: PretrainedConfig | None, setting: EngineSetting, kept: Collection[int] = ()
    ) -> None:
        super().__init__(config=model_config)
        self._setting = setting
        self._kept = frozenset(kept)
        self._formats: dict[int, tuple[StateFormat, StateFormat]] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add states as they will be read; see `DynamicCache.update`."""
        if layer_idx not in self._kept:
            keys, values = self._find_formats(layer_idx, key_states, value_states)
            key_states, value_states = _round(keys, key_states), _round(values, value_states)
        states: tuple[torch.Tensor, torch.Tensor] = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return states

    def _find_formats(
        self, layer_idx: int, key_states: torch.Tensor, value_states: torch.Tensor
    ) -> tuple[StateFormat, StateFormat]:
        if layer_idx not in self._formats:
            key, value = self._setting.key, self._setting.value
            self._formats[layer_idx] = key.calibrated(key_states.float()), value.calibrated(value_states.float())
        return self._formats[layer_idx]


def _round(state_format: StateFormat, states: torch.Tensor) -> torch.Tensor:
    return state_format.rounded(states.float()).to(states.dtype)
