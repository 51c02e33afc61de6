"""The text that quality is measured on: files, built-in texts or a dataset, as token sequences of one length."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from kvq.errors import EvaluationError
from kvq.evaluation import recall
from kvq.evaluation.stdlib_text import read_stdlib
from kvq.evaluation.topics_text import TOPICS_PARTS, read_topics

RECALL_SEEDS = {"recall-calibration": 1, "recall-report": 0}
STDLIB_TEXTS = ("stdlib-calibration", "stdlib-report")
TOPICS_TEXTS = tuple(f"topics-{part}" for part in TOPICS_PARTS)
BUILT_IN_TEXTS = (*TOPICS_TEXTS, *STDLIB_TEXTS, *RECALL_SEEDS)
"""Texts that `--dataset` has without a download; each has one part to choose settings on, one to report on."""
MAX_RECORDS = 160
"""Most records of a recall text: as many as the embedded model was trained for."""


@dataclass(frozen=True)
class TokenText:
    """Token sequences to be read by the model.

    Attributes:
        name: the name of their source.
        sequences: int64 `[N, L]`, on the CPU.
        scored: bool `[L]`, the tokens that can be predicted; the others are not scored.
    """

    name: str
    sequences: torch.Tensor
    scored: torch.Tensor

    @property
    def digest(self) -> str:
        """A fingerprint of the tokens."""
        return hashlib.sha256(self.sequences.numpy().tobytes()).hexdigest()[:16]


def load_files(paths: Sequence[Path], tokenizer: PreTrainedTokenizerBase, *, sequences: int, length: int) -> TokenText:
    """Return evenly spaced sequences of text files, in UTF-8.

    Args:
        paths: the files, in order.
        tokenizer: the model's tokenizer.
        sequences: number of sequences (N).
        length: tokens of each (L), the begin-of-text token included if the tokenizer has one.

    Raises:
        EvaluationError: a file cannot be read, or they are too short.
    """
    return _cut(" ".join(path.name for path in paths), _read(paths), tokenizer, sequences, length)


def load_dataset(name: str, tokenizer: PreTrainedTokenizerBase, *, sequences: int, length: int) -> TokenText:
    """Return sequences of a built-in text or of a dataset of the hub, by the name that `--dataset` takes.

    Args:
        name: one of `BUILT_IN_TEXTS`, or `ID[:CONFIGURATION[:SPLIT]]` of a dataset with a column `text`.
        tokenizer: the model's tokenizer.
        sequences: number of sequences (N).
        length: tokens of each (L).

    Raises:
        EvaluationError: there is no such dataset, it cannot be reached, or it is too short.
    """
    if name in RECALL_SEEDS:
        return _sample_recall(name, tokenizer, sequences, length)
    if name in TOPICS_TEXTS:
        return _cut(name, _read_topics(name), tokenizer, sequences, length)
    if name in STDLIB_TEXTS:
        part: Any = name.removeprefix("stdlib-")
        return _cut(name, (text for _, text in read_stdlib(part)), tokenizer, sequences, length)
    return _cut(name, _read_hub(name), tokenizer, sequences, length)


def is_recall_tokenizer(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether a tokenizer knows the words of the recall task and nothing else."""
    return len(tokenizer) == len(recall.VOCABULARY) and tuple(
        tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    ) == tuple(recall.VOCABULARY)


def default_calibration_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the name of the built-in text that settings are chosen on where a user names none."""
    return "recall-calibration" if is_recall_tokenizer(tokenizer) else "topics-calibration"


def _read(paths: Sequence[Path]) -> Iterator[str]:
    for path in paths:
        try:
            yield path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise EvaluationError(f"{str(path)!r} cannot be read as text in UTF-8: {error}") from error


def _read_topics(name: str) -> Iterator[str]:
    part: Any = name.removeprefix("topics-")
    return (text for _, text in read_topics(part))


def _read_hub(name: str) -> Iterator[str]:
    """Yield the texts of a dataset of the hub."""
    known = f"built in are {', '.join(BUILT_IN_TEXTS)}; for a file use --text"
    try:
        import datasets
    except ImportError as error:
        message = f"dataset {name!r} is not built in, and reading others needs `pip install datasets`; {known}"
        raise EvaluationError(message) from error
    dataset, configuration, split = [*name.split(":"), None, None][:3]
    open_dataset: Callable[..., Any] = datasets.load_dataset
    try:
        rows = open_dataset(dataset, configuration or None, split=split or "test")
    except Exception as error:  # of many libraries: network, hub, file formats
        raise EvaluationError(f"dataset {name!r} cannot be loaded ({error}); {known}") from error
    if "text" not in rows.column_names:
        raise EvaluationError(f"dataset {name!r} has the columns {rows.column_names}, but no 'text'")
    yield from rows["text"]


def _cut(name: str, texts: Iterator[str], tokenizer: PreTrainedTokenizerBase, sequences: int, length: int) -> TokenText:
    """Encode texts one after another and take evenly spaced sequences, each led by the begin-of-text token."""
    if is_recall_tokenizer(tokenizer):
        raise EvaluationError(
            f"the embedded model knows the words of its own task only and cannot read {name!r}; "
            f"use --dataset {' or '.join(RECALL_SEEDS)}"
        )
    prefix = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    tokens: list[int] = []
    for text in texts:
        tokens.extend(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    own = length - len(prefix)
    if len(tokens) < sequences * own:
        raise EvaluationError(
            f"{name} has {len(tokens)} tokens, but {sequences} sequences of {length} were asked for; "
            "give more text, or ask for fewer or shorter ones"
        )
    starts = torch.linspace(0, len(tokens) - own, sequences).long().tolist()
    cut = torch.tensor([[*prefix, *tokens[start : start + own]] for start in starts])
    return TokenText(name, cut, torch.ones(length, dtype=torch.bool))


def _sample_recall(name: str, tokenizer: PreTrainedTokenizerBase, sequences: int, length: int) -> TokenText:
    """Draw documents of the recall task: records, then as many questions about them as there is room for.

    Records and names are random and cannot be predicted: only the answers are scored.
    """
    if not is_recall_tokenizer(tokenizer):
        raise EvaluationError(f"the text {name!r} is made of the words of the embedded model; use another text")
    records = min(MAX_RECORDS, -(-(length - 1) // (recall.RECORD_LENGTH + recall.QUESTION_LENGTH)))
    generator = torch.Generator().manual_seed(RECALL_SEEDS[name])
    batch = recall.sample_recall_batch(sequences, records, records, generator=generator)
    tokens = torch.cat([batch.context, batch.questions.flatten(1)], dim=1)
    if tokens.shape[1] < length:
        raise EvaluationError(f"a text of {name!r} has at most {tokens.shape[1]} tokens; ask for shorter ones")
    context = batch.context.shape[1]
    place = (torch.arange(tokens.shape[1]) - context) % recall.QUESTION_LENGTH
    answers = (torch.arange(tokens.shape[1]) >= context) & (place >= 2)
    return TokenText(name, tokens[:, :length], answers[:length])
