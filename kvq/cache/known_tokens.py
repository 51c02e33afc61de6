"""The tokens behind the states of a cache, and a cache that can be cut back to what a prompt begins with."""

from __future__ import annotations

import torch
from transformers.cache_utils import Cache

from kvq.cache.token_history import TokenHistory
from kvq.errors import CacheStateError


class KnownTokens(Cache):
    """A cache that keeps the ids of its tokens, as far as somebody has told it."""

    _history: TokenHistory | None

    @property
    def token_ids(self) -> torch.Tensor | None:
        """The tokens whose states these are, int64 `[B, T]` on the CPU, as far as they are known; else None.

        A file tells them, or you do. They may go on behind what the cache holds, by the token that comes next; once the
        cache has grown, what is known ends where it grew.
        """
        return None if self._history is None else self._history.known(self.get_seq_length())

    @token_ids.setter
    def token_ids(self, ids: torch.Tensor | None) -> None:
        self._history = None if ids is None else TokenHistory.of(ids, self.get_seq_length())

    def count_matching(self, input_ids: torch.Tensor) -> int:
        """Return how many of the tokens held begin `input_ids` in every row of the batch.

        The cache cannot see the ids that `generate` is given: where a prompt does not begin with what the cache holds,
        the states of other tokens are attended to, without an error. This tells, from `token_ids`.

        Args:
            input_ids: whole numbers `[B, T]`, fewer or more than the cache holds. Padding on the left compares like any
                token: pad as the tokens that are held were padded.

        Raises:
            CacheStateError: the tokens that are held are not known.
            StatesError: the ids are no whole numbers `[B, T]`, or have another batch size than those held.
        """
        if self._history is None:
            raise CacheStateError(
                "the cache does not know the tokens that it holds: save it with token_ids=..., or set cache.token_ids"
            )
        return self._history.common_prefix(input_ids, self.get_seq_length())

    def crop_to_prefix(self, input_ids: torch.Tensor) -> int:
        """Forget whatever does not begin `input_ids`, and leave at least the last of them to be fed.

        After it `model.generate(input_ids, past_key_values=cache)` computes the rest only: the next turn of a chat, of
        which the template may have changed earlier turns.

        Args:
            input_ids: as for `count_matching`.

        Returns:
            Tokens that the cache still holds.

        Raises:
            CacheStateError: as `count_matching` and `crop`; the cache is then as it was.
            StatesError: as `count_matching`.
        """
        kept = min(self.count_matching(input_ids), max(0, input_ids.shape[1] - 1))
        removed = self.get_seq_length() - kept
        if removed:
            self.crop(-removed)
        return kept
