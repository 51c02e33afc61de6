"""The recall task of the embedded model: a long context of records, then questions about them.

Owns the vocabulary, the generator and the scoring of the synthetic task. It must not know caches, backends or models:
training (`scripts/train_recall_model.py`), the demo and the tests all draw their text from here.

A record is `Name word word word word .`; every name and every answer occurs in the context exactly once. A question
repeats a name, `? Name`, and the answer is right only if all four words come back in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

ANSWER_LENGTH = 4
"""Words in the answer to one question."""
RECORD_LENGTH = ANSWER_LENGTH + 2
"""Tokens in one record: the name, the answer and the full stop."""
QUESTION_LENGTH = ANSWER_LENGTH + 3
"""Tokens in one answered question: the question mark, the name, the answer and the full stop."""

PAD, BOS, QUESTION, STOP = range(4)
_SPECIAL_TOKENS = ("<pad>", "<bos>", "?", ".")
_NAME_COUNT = 240

WORDS = """
acorn amber anchor apple apron arrow aspen autumn badge bagel baker bamboo banjo barn basil basin basket beach
beacon beaver bell bench berry birch bird biscuit blanket bloom boat bonnet book boot bottle bowl branch brass bread
breeze brick bridge brook broom bubble bucket bugle butter button cabin cable cactus camel canal candle canoe canvas
canyon card carpet carrot castle cedar cello chain chair chalk cherry chest chimney cider circle clay cliff clock
cloud clover coast coat cobble coffee comet compass copper coral cork corner cotton cradle crane crater crayon creek
cricket crown crystal curtain daisy dawn deer delta desert desk diamond dice dome donkey door dragon drawer drum dune
dust eagle easel ember engine falcon fan feather fence fern ferry fiddle field fig flame flask flint flute foam fog
forest fork fossil fountain fox frost garden garlic gate ginger glacier globe glove goat gold goose grain grape gravel
guitar hammer harbor harp hat hawk hazel heron hill hinge honey hook horn horse ice inlet iron island ivory ivy jacket
jade jar jelly jewel jungle kernel kettle key kite knot ladder lake lamp lantern laurel leaf lemon lens lily lime
linen lion locket loom lotus lynx magnet mango maple marble market mask meadow melon mill mint mirror mist moon moss
mountain mug needle nest nickel night oak oasis oat ocean olive onion orbit orchid otter owl paddle palm panda paper
parrot pasture path peach pearl pebble pencil pepper piano pigeon pillow pine pirate planet plum pocket pond
""".split()  # noqa: SIM905 - a list of quoted words is harder to read
"""Common English nouns, of which answers are made."""

_ONSETS = "bdfghjklmnprstvz"
_VOWELS = "aeiou"


def _build_names() -> list[str]:
    """Return `_NAME_COUNT` distinct pronounceable names such as `Bado`, in a fixed order."""
    first = [onset + vowel for onset in _ONSETS for vowel in _VOWELS]
    second = [onset + vowel for onset in "dklmnr" for vowel in "aeo"]
    pairs = [(a + b).capitalize() for b in second for a in first]
    return pairs[:: len(pairs) // _NAME_COUNT][:_NAME_COUNT]


VOCABULARY: tuple[str, ...] = (*_SPECIAL_TOKENS, *_build_names(), *WORDS)
"""Every token of the task; the position is the token id."""
_FIRST_NAME = len(_SPECIAL_TOKENS)
_FIRST_WORD = _FIRST_NAME + _NAME_COUNT


@dataclass(frozen=True)
class RecallBatch:
    """Contexts and the questions about them.

    Attributes:
        context: int64 `[B, 1 + records * RECORD_LENGTH]`, a begin-of-text token and the records.
        questions: int64 `[B, Q, QUESTION_LENGTH]`, each `? name answer .`.
    """

    context: torch.Tensor
    questions: torch.Tensor

    @property
    def answers(self) -> torch.Tensor:
        """The right answers, int64 `[B, Q, ANSWER_LENGTH]` (a view of `questions`)."""
        return self.questions[..., 2 : 2 + ANSWER_LENGTH]


def sample_recall_batch(batch_size: int, records: int, questions: int, *, generator: torch.Generator) -> RecallBatch:
    """Draw contexts of `records` records and `questions` questions about different records of each.

    Raises:
        ValueError: `records` exceeds the number of names, or `questions` exceeds `records`.
    """
    if not 0 < questions <= records <= _NAME_COUNT:
        raise ValueError(f"need 0 < questions <= records <= {_NAME_COUNT}, got {questions=} and {records=}")
    order = torch.rand(batch_size, _NAME_COUNT, generator=generator).argsort(dim=1)
    names = _FIRST_NAME + order[:, :records, None]
    words = torch.randint(_FIRST_WORD, len(VOCABULARY), (batch_size, records, ANSWER_LENGTH), generator=generator)
    lines = torch.cat([names, words, torch.full_like(names, STOP)], dim=-1)
    asked = torch.rand(batch_size, records, generator=generator).argsort(dim=1)[:, :questions]
    repeated = lines.gather(1, asked[..., None].expand(-1, -1, RECORD_LENGTH))
    marks = torch.full((batch_size, questions, 1), QUESTION)
    begin = torch.full((batch_size, 1), BOS)
    return RecallBatch(torch.cat([begin, lines.flatten(1)], dim=1), torch.cat([marks, repeated], dim=-1))


def decode_tokens(token_ids: Sequence[int]) -> str:
    """Return the text of `token_ids` as a person would type it, e.g. `Bado otter lamp fig oak.`."""
    return " ".join(VOCABULARY[token] for token in token_ids).replace(" .", ".")
