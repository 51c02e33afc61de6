"""The texts of `kvq tune`: one to choose on, another one to verify on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from kvq.cli.given_path import exists
from kvq.errors import EvaluationError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kvq.evaluation.quality.text import TokenText

CALIBRATION, REPORT = "-calibration", "-report"


@dataclass(frozen=True)
class TextOptions:
    """The options that choose the texts.

    Attributes:
        files: files of the calibration text.
        dataset: its name, if it is a dataset.
        held_out_files: files of the held-out text.
        held_out_dataset: its name, if it is a dataset.
        sequences: sequences of each.
        length: tokens of each sequence.
    """

    files: list[Path] | None
    dataset: str | None
    held_out_files: list[Path] | None
    held_out_dataset: str | None
    sequences: int
    length: int

    def check(self) -> None:
        """Refuse what contradicts itself, and files that are none, before minutes of loading a model.

        Raises:
            EvaluationError: something is wrong.
        """
        for prefix, files, dataset in (
            ("--", self.files, self.dataset),
            ("--held-out-", self.held_out_files, self.held_out_dataset),
        ):
            if files and dataset is not None:
                raise EvaluationError(f"give one text: either {prefix}text or {prefix}dataset")
            for file in files or ():
                if not exists(file):
                    raise EvaluationError(f"{prefix}text {str(file)!r} does not exist; give the path of a text file")
                if file.is_dir():
                    raise EvaluationError(f"{prefix}text {str(file)!r} is a directory; give a text file in it")


def load_texts(
    options: TextOptions, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[TokenText, TokenText]:
    """Return the calibration text and the held-out text.

    Without a held-out text of its own, it is the -report part of a built-in one, or the second half of the sequences.

    Raises:
        EvaluationError: a text cannot be read, is too short, or longer than the model reads.
    """
    from kvq.evaluation.quality.text import is_recall_tokenizer

    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and options.length > longest:
        raise EvaluationError(f"--length {options.length} is more than the {longest} positions of the model")
    dataset = options.dataset
    if dataset is None and not options.files:
        dataset = "recall-calibration" if is_recall_tokenizer(tokenizer) else "topics-calibration"
    other = options.held_out_dataset
    if other is None and not options.held_out_files and dataset is not None and dataset.endswith(CALIBRATION):
        other = dataset.removesuffix(CALIBRATION) + REPORT
    if other is None and not options.held_out_files:
        return _halve(_load(options.files, dataset, tokenizer, 2 * options.sequences, options.length))
    return (
        _load(options.files, dataset, tokenizer, options.sequences, options.length),
        _load(options.held_out_files, other, tokenizer, options.sequences, options.length),
    )


def _load(
    files: list[Path] | None, dataset: str | None, tokenizer: PreTrainedTokenizerBase, sequences: int, length: int
) -> TokenText:
    from kvq.evaluation.quality.text import load_dataset, load_files

    if files:
        return load_files(files, tokenizer, sequences=sequences, length=length)
    return load_dataset(str(dataset), tokenizer, sequences=sequences, length=length)


def _halve(text: TokenText) -> tuple[TokenText, TokenText]:
    first, second = text.sequences.chunk(2)
    return replace(text, name=f"{text.name}, first half", sequences=first), replace(
        text, name=f"{text.name}, second half", sequences=second
    )
