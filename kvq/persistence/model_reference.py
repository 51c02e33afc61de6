"""Remembering whose states a cache holds without keeping that model alive."""

from __future__ import annotations

import weakref

from transformers import PretrainedConfig, PreTrainedModel


class ModelReference:
    """Leads to the model that a cache was built for, as long as it lives.

    A copy of a cache leads to the same model; a pickled one leads nowhere.

    Args:
        model: the model, its configuration, or None.
    """

    def __init__(self, model: PreTrainedModel | PretrainedConfig | None = None) -> None:
        self._found = None if model is None else weakref.ref(model)

    def find(self) -> PreTrainedModel | PretrainedConfig | None:
        """Return the model, or None where there is none any more."""
        return None if self._found is None else self._found()

    def __deepcopy__(self, memo: dict[int, object]) -> ModelReference:
        return self

    def __reduce__(self) -> tuple[type[ModelReference], tuple[()]]:
        return ModelReference, ()
