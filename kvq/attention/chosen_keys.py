"""Keys that an indexer chose for each query, as a mask.

Models with sparse attention lay their choice over the mask themselves under eager and scaled-dot-product attention. Any
other attention is given the positions as the argument `indices`. It must not know how keys are stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from kvq.attention.visibility import causally_visible

ARGUMENT = "indices"
"""The argument of attention functions that holds the chosen keys: integers `[B, Tq, K]`, negative ones for none."""


def lay_choice_over(
    mask: torch.Tensor | None, options: Mapping[str, Any], length: int, *, causal: bool
) -> tuple[torch.Tensor | None, dict[str, Any]]:
    """Return the mask with all keys hidden that were not chosen, and the arguments without the choice.

    Args:
        mask: boolean or additive, broadcast to `[B, Hq, Tq, Tk]`, or None.
        options: the arguments of an attention function.
        length: keys, Tk.
        causal: whether no query sees later keys where `mask` is None; the queries stand at the last positions.
    """
    left = {name: value for name, value in options.items() if name != ARGUMENT}
    chosen_keys = options.get(ARGUMENT)
    if chosen_keys is None:
        return mask, left
    batch, queries, _ = chosen_keys.shape
    # One column more takes what is no position.
    chosen = torch.zeros((batch, queries, length + 1), dtype=torch.bool, device=chosen_keys.device)
    positions = chosen_keys.long().masked_fill(chosen_keys < 0, length)
    chosen = chosen.scatter_(-1, positions, True)[:, None, :, :length]
    if mask is None and causal:
        mask = causally_visible(queries, length, 0, length, chosen.device)
    if mask is None:
        return chosen, left
    if mask.dtype is torch.bool:
        return mask & chosen, left
    return mask.masked_fill(~chosen, torch.finfo(mask.dtype).min), left
