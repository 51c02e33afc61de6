"""A text that a command names: files, or a dataset."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kvq.cli.given_path import exists
from kvq.errors import EvaluationError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from kvq.evaluation.quality.text import TokenText


def check_text(files: list[Path] | None, dataset: str | None, option: str = "--") -> None:
    """Refuse two texts, and a text that is not a file, before minutes of loading a model.

    Args:
        files: the files, or None.
        dataset: name of a dataset, or None.
        option: how the options begin that name them.

    Raises:
        EvaluationError: something is wrong.
    """
    if files and dataset is not None:
        raise EvaluationError(f"give one text: either {option}text or {option}dataset")
    for file in files or ():
        if not exists(file):
            raise EvaluationError(f"{option}text {str(file)!r} does not exist; give the path of a text file")
        if file.is_dir():
            raise EvaluationError(f"{option}text {str(file)!r} is a directory; give a text file in it")


def check_sizes(length: int, prefill: int) -> None:
    """Refuse sequences of which nothing would be scored.

    Raises:
        EvaluationError: the first forward reads all of them.
    """
    if prefill + 1 >= length:
        raise EvaluationError(f"--prefill {prefill} leaves nothing of --length {length} to score")


def load_text(
    files: list[Path] | None, dataset: str | None, tokenizer: PreTrainedTokenizerBase, *, sequences: int, length: int
) -> TokenText:
    """Return sequences of a text.

    Raises:
        EvaluationError: there is no text, or it cannot be read or is too short.
    """
    from kvq.evaluation.quality.text import BUILT_IN_TEXTS, load_dataset, load_files

    if files:
        return load_files(files, tokenizer, sequences=sequences, length=length)
    if dataset is None:
        known = ", ".join(BUILT_IN_TEXTS)
        raise EvaluationError(f"give the text: either --text FILE or --dataset ID (built in: {known})")
    return load_dataset(dataset, tokenizer, sequences=sequences, length=length)
