"""Operations on transformers' own layers that they lack or get wrong.

Their states of linear attention know `reorder_cache` but neither repetition nor selection, and layers with both kinds
of state do either to one of them only; before 5.18 a reset turns tokens into zeros instead of forgetting them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from kvq.transformers_seams.layer_kinds import kind_of


def fork_layer(layer: Any) -> Any:
    """Return an independent layer; keys and values are shared where nothing writes to them."""
    return copy.copy(layer) if kind_of(layer).is_never_written else copy.deepcopy(layer)


def moved_layer(layer: Any, device: torch.device) -> Any:
    """Return a layer of transformers with every tensor in it on a device."""
    other = copy.copy(layer)
    for name, value in vars(layer).items():
        if isinstance(value, torch.Tensor):
            setattr(other, name, value.to(device))
        elif isinstance(value, dict):
            moved = {key: one.to(device) if isinstance(one, torch.Tensor) else one for key, one in value.items()}
            setattr(other, name, moved)
        elif isinstance(value, torch.device):
            setattr(other, name, device)
    return other


def select_rows(layer: Any, rows: torch.Tensor) -> None:
    """Reorder the rows: row `i` becomes the former row `rows[i]`, int64 `[B']`; more or fewer than before."""
    if hasattr(layer, "reorder_cache"):
        layer.reorder_cache(rows)


def count_rows(layer: Any) -> int | None:
    """Return the rows of the batch that a layer holds, or None where it holds nothing."""
    return next((one.shape[0] for one in _states(layer) if one is not None and one.numel()), None)


def count_tokens(layer: Any) -> int:
    """Return the tokens that a layer was given, 0 where it gets none."""
    return layer.get_seq_length() if isinstance(layer, CacheLayerMixin) else 0


def has_forgotten(layer: Any) -> bool:
    """Return whether a sliding layer is past its window and has not recorded what a crop would bring back."""
    if not kind_of(layer).slides:
        return False
    return layer.get_seq_length() >= layer.sliding_window and not getattr(layer, "record_past", True)


def reset_layer(layer: Any) -> None:
    """Forget everything that a layer holds; states of another shape may follow."""
    if kind_of(layer).holds_tokens:
        layer.keys = layer.values = None
        layer.is_initialized = False
    if hasattr(layer, "indexer_keys"):
        layer.indexer_keys, layer.is_indexer_initialized = None, False
    layer.reset()
    for name in kind_of(layer).states:
        held = getattr(layer, name)
        if isinstance(held, dict):
            held.update(dict.fromkeys(held))
            known = getattr(layer, f"is_{name}_initialized")
            known.update(dict.fromkeys(known, False))


def carries_sum(layer: Any) -> bool:
    """Return whether a layer holds a state that no crop can put back; transformers crops the rest and leaves that."""
    return kind_of(layer).holds_sums and any(layer.is_recurrent_states_initialized.values())


def crop_carried(carried: Any, tokens_to_remove: int) -> None:
    """Crop what a quantized layer carries.

    Args:
        carried: a layer of transformers without keys and values.
        tokens_to_remove: zero or negative.
    """
    if not hasattr(carried, "indexer_keys"):
        carried.crop(tokens_to_remove)
    elif tokens_to_remove and carried.indexer_keys is not None:
        # Not by `crop`, which before 5.18 wants keys and values.
        positions = getattr(carried, "indexer_position_ids", None)
        carried.indexer_keys = carried.indexer_keys[:, :tokens_to_remove]
        if positions is not None:
            carried.indexer_position_ids = positions[..., :tokens_to_remove]


def carrier_of(layer: Any) -> Any:
    """Return the layer of transformers that holds what a layer has beside keys and values; else the layer itself."""
    carried = getattr(layer, "carried", None)
    return layer if carried is None else carried


def _states(layer: Any) -> Iterator[torch.Tensor | None]:
    for name in kind_of(layer).states or ("keys",):  # a kind that is not listed holds keys, if anything
        states = getattr(layer, name, None)
        yield from states.values() if isinstance(states, dict) else (states,)
