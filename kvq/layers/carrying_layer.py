"""What a quantized layer holds beside keys and values, as transformers' own layer of such states.

States of linear attention are sums of all tokens, of a fixed size; an indexer has one short key a token. Neither is
quantized. Models and caches of transformers reach them through the layer.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin


class CarryingLayer(CacheLayerMixin):
    """A layer of keys and values, and of what `carried` holds.

    Attributes:
        carried: a layer of transformers that holds no keys and values, or None where there is nothing beside them.
    """

    carried: Any
    _records_past = False

    @property
    def is_croppable(self) -> bool:
        """Whether a crop can put the layer back: not where it carries a sum of all tokens."""
        return self.carried is None or bool(getattr(self.carried, "is_croppable", True))

    @property
    def record_past(self) -> bool:
        """Whether `update` keeps what a `crop` may bring back, until that says what stays."""
        return self._records_past

    @record_past.setter
    def record_past(self, value: bool) -> None:
        self._records_past = value
        if hasattr(self.carried, "record_past"):
            self.carried.record_past = value

    @property
    def conv_states(self) -> Any:
        """The states of convolutions, by their index; older models read them here."""
        return self.carried.conv_states

    @property
    def recurrent_states(self) -> Any:
        """The states of linear attention, by their index; older models read them here."""
        return self.carried.recurrent_states

    @property
    def indexer_position_ids(self) -> torch.Tensor | None:
        """The positions that a model keeps in its first layer with an indexer."""
        positions: torch.Tensor | None = self.carried.indexer_position_ids
        return positions

    @indexer_position_ids.setter
    def indexer_position_ids(self, positions: torch.Tensor | None) -> None:
        self.carried.indexer_position_ids = positions
