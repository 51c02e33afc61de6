"""Tasks in English, hidden in a text: for real models, which know the words.

Three kinds of RULER (arXiv 2404.06654), small enough for a CPU: several needles (all of them asked for), variable
tracking (what is the value at the end of a chain?), and common words (which word stands most often in a long list?).
At 1,024 tokens SmolLM2-135M gives a token of a needle's code -0.34 nats on average and one of a value -0.79, where a
digit by chance has -2.30. The most common word is hard for it: -1.7, -2.7 and -5.3 in three lists of some 600 tokens,
where a word of the list by chance has about -5: compare caches by its log-probability, over many contexts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from kvq.errors import EvaluationError
from kvq.evaluation import recall
from kvq.evaluation.tasks.task_set import Question, TaskSet, build_task_set

CITIES = ("Lisbon", "Oslo", "Nairobi", "Quito", "Hanoi", "Dublin")
CHAINS = 4
"""Values in a context of variable tracking."""
HOPS = 2
"""How often each value is handed on to another variable."""
COMMON_SHARE = 0.3
"""The share of a list that its common word takes; others stand in it once, or a few times if it is very long."""
LIST_SHARE = 0.75
"""The share of a context that the list takes."""
LEAST_LENGTH = 256
"""Least tokens of a context and its questions."""
_LETTERS = "BCDFGHJKLMNPRSTVWXZ"
_LIST_HEAD = (
    "\nBelow is a list of words. Some of them appear in it much more often than others. "
    "Memorize the ones that appear most often.\n"
)
_LIST_QUESTION = (
    "\nQuestion: What are the most common words in the above list?\nAnswer: The words that appear most often are: 1."
)


@dataclass(frozen=True)
class _Drawn:
    """Pieces of text to hide in this order, at random places or all at the end, and the questions about them."""

    pieces: Sequence[list[int]]
    questions: Sequence[Question]
    at_end: bool = False


def build_english_tasks(
    tokenizer: PreTrainedTokenizerBase, filler: torch.Tensor, *, length: int, contexts: int, seed: int = 0
) -> list[TaskSet]:
    """Return the tasks "several needles", "variable tracking" and "common words".

    Args:
        tokenizer: the model's tokenizer, of a vocabulary that writes English.
        filler: int64 `[N, L]`, a text to hide things in; L is at least the length.
        length: tokens of a context and its questions, at most.
        contexts: contexts of each task.
        seed: seed of names, values and places.

    Raises:
        EvaluationError: the length or the text leaves no room.
    """
    if not LEAST_LENGTH <= length <= filler.shape[1]:
        raise EvaluationError(
            f"tasks of {length} tokens cannot be hidden in a text of {filler.shape[1]}; "
            f"ask for at least {LEAST_LENGTH}, and for no more than the text has"
        )
    writer = _Writer(tokenizer, filler, length, torch.Generator().manual_seed(seed))
    kinds = {"several needles": writer.needles, "variable tracking": writer.chains, "common words": writer.word_list}
    return [writer.write(name, [draw() for _ in range(contexts)]) for name, draw in kinds.items()]


class _Writer:
    """Draws tasks and hides them in a text.

    Args:
        tokenizer: the model's tokenizer.
        filler: int64 `[N, L]`.
        length: tokens of a context and its questions.
        generator: what is drawn comes from it.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, filler: torch.Tensor, length: int, generator: torch.Generator
    ) -> None:
        self._tokenizer = tokenizer
        self._filler = filler
        self._length = length
        self._generator = generator

    def write(self, name: str, drawn: Sequence[_Drawn]) -> TaskSet:
        """Return a task set whose contexts leave room for the longest questions."""
        longest = max(sum(len(one.ask) + len(one.answer) for one in each.questions) for each in drawn)
        contexts = [self._hide(each, self._length - longest) for each in drawn]
        return build_task_set(name, contexts, [each.questions for each in drawn])

    def needles(self) -> _Drawn:
        """Draw a code for each city; all codes are asked for, in another order."""
        codes = {city: self._number() for city in self._shuffle(CITIES)}
        pieces = [self._encode(f"\nThe access code of {city} is {code}.\n") for city, code in codes.items()]
        asked = [self._ask(f"\nThe access code of {city} is", codes[city]) for city in self._shuffle(CITIES)]
        return _Drawn(pieces, asked)

    def chains(self) -> _Drawn:
        """Draw values that are handed on, `VAR B = VAR A`; asked for is the value of the last variable of each."""
        names = self._names(CHAINS * (1 + HOPS))
        chains = {self._number(): [names.pop() for _ in range(1 + HOPS)] for _ in range(CHAINS)}
        lines = [f"\nVAR {chain[0]} = {value}\n" for value, chain in chains.items()]
        for hop in range(HOPS):
            lines += [f"\nVAR {chain[hop + 1]} = VAR {chain[hop]}\n" for chain in chains.values()]
        question = "\nQuestion: what number is VAR {}? It is"
        asked = [self._ask(question.format(chains[value][-1]), value) for value in self._shuffle(tuple(chains))]
        return _Drawn([self._encode(line) for line in lines], asked)

    def word_list(self) -> _Drawn:
        """Draw a list of words, right before the question which of them stands there most often, as in RULER."""
        words = self._shuffle(recall.WORDS)
        count = self._length // 2
        while len(piece := self._encode(_LIST_HEAD + ", ".join(self._list(words, count)))) > LIST_SHARE * self._length:
            count = count * 9 // 10
        return _Drawn([piece], [self._ask(_LIST_QUESTION, words[0])], at_end=True)

    def _list(self, words: Sequence[str], count: int) -> list[str]:
        common = [words[0]] * int(COMMON_SHARE * count)
        return self._shuffle([*common, *(words[1 + place % (len(words) - 1)] for place in range(count - len(common)))])

    def _hide(self, drawn: _Drawn, size: int) -> list[int]:
        """Return `size` tokens of text with the pieces in it."""
        room = size - sum(map(len, drawn.pieces))
        if room < 1:
            raise EvaluationError(f"{self._length} tokens leave no room for a task; ask for more")
        text = self._filler[self._draw(len(self._filler)), :room].tolist()
        if drawn.at_end:
            return [*text, *(token for piece in drawn.pieces for token in piece)]
        places = sorted(1 + self._draw(room) for _ in drawn.pieces)  # the first token, begin of text, stays the first
        found, done = [], 0
        for place, piece in zip(places, drawn.pieces, strict=True):
            found += [*text[done:place], *piece]
            done = place
        return [*found, *text[done:]]

    def _ask(self, question: str, answer: str) -> Question:
        """Return a question, encoded apart from its answer and from what follows that."""
        return Question(self._encode(question), self._encode(f" {answer}"))

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _draw(self, top: int) -> int:
        return int(torch.randint(top, (1,), generator=self._generator))

    def _number(self) -> str:
        return str(10_000 + self._draw(90_000))

    def _names(self, count: int) -> list[str]:
        names: dict[str, None] = {}
        while len(names) < count:
            names["".join(_LETTERS[self._draw(len(_LETTERS))] for _ in range(3))] = None
        return list(names)

    def _shuffle(self, items: Sequence[str]) -> list[str]:
        return [items[place] for place in torch.randperm(len(items), generator=self._generator).tolist()]
