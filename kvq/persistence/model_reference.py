"""Remembering whose states a cache holds without keeping that model alive."""

from __future__ import annotations

import weakref

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from kvq.transformers_seams.position_offsets import find_offset_holder


class ModelReference:
    """Leads to the model that a cache was built for, as long as it lives.

    A copy of a cache leads to the same model; a pickled one leads nowhere.

    Args:
        model: the model, its configuration, or None.
    """

    def __init__(self, model: PreTrainedModel | PretrainedConfig | None = None) -> None:
        self._found = None if model is None else weakref.ref(model)
        self._offset_holder: weakref.ref[nn.Module] | None = None
        self._was_searched = False

    def find(self) -> PreTrainedModel | PretrainedConfig | None:
        """Return the model, or None where there is none any more."""
        return None if self._found is None else self._found()

    def find_offset_holder(self) -> nn.Module | None:
        """Return the module that keeps the offsets between tokens and positions, or None where there is none."""
        if not self._was_searched:
            holder = find_offset_holder(self.find())
            self._offset_holder = None if holder is None else weakref.ref(holder)
            self._was_searched = True
        return None if self._offset_holder is None else self._offset_holder()

    def __deepcopy__(self, memo: dict[int, object]) -> ModelReference:
        return self

    def __reduce__(self) -> tuple[type[ModelReference], tuple[()]]:
        return ModelReference, ()
