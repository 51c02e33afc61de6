"""Whether a `generate` can go on from a cache whose tokens were dropped: it takes positions from lengths.

`generate` cuts `input_ids` that are as long as their mask by the length of the cache, which it takes for the number of
tokens that came; and it counts the positions of new tokens in the mask. Both go wrong without an error. It must not
know how tokens are dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from kvq.cache.kvq import KVQ
from kvq.errors import CacheStateError
from kvq.transformers_seams.private_names import find_cache


def check_start(arguments: Mapping[str, Any], generation_config: Any) -> None:
    """Check that a `generate` gives new tokens the positions behind all those that came.

    Args:
        arguments: its arguments by their names.
        generation_config: the one in force, over which arguments win.

    Raises:
        CacheStateError: the cache has dropped tokens, and old ones would be read once more, or positions be wrong.
    """
    cache = find_cache(arguments)
    if not isinstance(cache, KVQ):
        return
    held, came = cache.get_seq_length(), cache.next_position
    reason = None if held >= came else _find_reason(arguments, generation_config, came)
    if reason is not None:
        raise CacheStateError(
            f"generate would go wrong behind this cache, to which {came} tokens came and whose length is {held}: "
            f"{reason}. Pass the new tokens alone, and an attention_mask of {came} tokens, the dropped ones too, and "
            "of the new ones"
        )


def _find_reason(arguments: Mapping[str, Any], generation_config: Any, came: int) -> str | None:
    if arguments.get("prefill_chunk_size", getattr(generation_config, "prefill_chunk_size", None)) is not None:
        return "prefill_chunk_size counts positions from its length"
    if arguments.get("inputs_embeds") is not None:
        return "it cuts inputs_embeds by its length"
    tokens, mask = arguments.get("inputs", arguments.get("input_ids")), arguments.get("attention_mask")
    if not isinstance(tokens, torch.Tensor):
        return None
    if not isinstance(mask, torch.Tensor) or mask.shape[-1] == tokens.shape[-1]:
        return "it cuts input_ids that have no longer attention_mask by its length"
    if arguments.get("position_ids") is not None:
        return None
    first = mask.shape[-1] - tokens.shape[-1]
    return None if first == came else f"by this attention_mask the new tokens begin at position {first}"
