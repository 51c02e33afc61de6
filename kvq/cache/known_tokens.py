"""The tokens behind the states of a cache, and a cache that can be cut back to what a prompt begins with."""

from __future__ import annotations

import torch
from transformers.cache_utils import Cache

from kvq.cache.token_history import TokenHistory
from kvq.errors import CacheStateError


class KnownTokens(Cache):
    """A cache that keeps the ids of its tokens, as far as they are known."""

    _history: TokenHistory | None

    @property
    def token_ids(self) -> torch.Tensor | None:
        """The tokens whose states these are, int64 `[B, T]` on the CPU, as far as they are known; else None.

        They come from a file or from you. They may go on behind the tokens held, by the token that comes next; once the
        cache has grown, they end where it grew. Where tokens were evicted from a layer, none are known any more.
        """
        known = self._known()
        return None if known is None else known.known(self.get_seq_length())

    @token_ids.setter
    def token_ids(self, ids: torch.Tensor | None) -> None:
        self._history = None if ids is None else TokenHistory.of(ids, self.get_seq_length())

    def count_matching(self, input_ids: torch.Tensor) -> int:
        """Return how many of the tokens held begin `input_ids` in every row of the batch.

        The cache cannot see the ids that `generate` is given: where a prompt does not begin with the tokens held,
        the model attends to the states of other tokens, without an error. This compares the prompt with `token_ids`.

        Args:
            input_ids: whole numbers `[B, T]`, fewer or more than the cache holds. Padding on the left compares like any
                token: pad as the tokens that are held were padded.

        Raises:
            CacheStateError: the tokens that are held are not known.
            StatesError: the ids are not whole numbers `[B, T]`, or have another batch size than those held.
        """
        known = self._known()
        if known is None:
            raise CacheStateError(
                "the cache does not know the tokens that it holds: save it with token_ids=..., or set cache.token_ids"
            )
        return known.common_prefix(input_ids, self.get_seq_length())

    def crop_to_prefix(self, input_ids: torch.Tensor) -> int:
        """Forget all tokens that do not begin `input_ids`, and leave at least the last of these to be fed.

        After it `model.generate(input_ids, past_key_values=cache)` computes the rest only: the next turn of a chat, of
        which the template may have changed earlier turns.

        Args:
            input_ids: the prompt, as for `count_matching`.

        Returns:
            Tokens that the cache still holds.

        Raises:
            CacheStateError: raised by `count_matching` or `crop`; the cache is then as it was.
            StatesError: raised by `count_matching`.
        """
        kept = min(self.count_matching(input_ids), max(0, input_ids.shape[1] - 1))
        removed = self.get_seq_length() - kept
        if removed:
            self.crop(-removed)
        return kept

    def _known(self) -> TokenHistory | None:
        """Return the ids, unless a layer has evicted tokens: then those held are not the first ones."""
        has_evicted = any(getattr(layer, "evicted_length", 0) for layer in self.layers)
        return None if has_evicted else self._history
