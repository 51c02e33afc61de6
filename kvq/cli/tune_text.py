"""The texts of `kvq tune`: one to choose on, another one to verify on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from kvq.cli.given_text import check_text, load_text
from kvq.cli.model_options import check_length

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
        sequences: sequences of the calibration text.
        held_out_sequences: sequences of the held-out text.
        length: tokens of each sequence.
    """

    files: list[Path] | None
    dataset: str | None
    held_out_files: list[Path] | None
    held_out_dataset: str | None
    sequences: int
    held_out_sequences: int
    length: int

    def check(self) -> None:
        """Refuse what contradicts itself, and files that are none, before minutes of loading a model.

        Raises:
            EvaluationError: something is wrong.
        """
        check_text(self.files, self.dataset)
        check_text(self.held_out_files, self.held_out_dataset, "--held-out-")


def load_texts(
    options: TextOptions, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[TokenText, TokenText]:
    """Return the calibration text and the held-out text.

    Without a held-out text of its own, it is the -report part of a built-in one, or further sequences of the same text.

    Raises:
        EvaluationError: a text cannot be read, is too short, or longer than the model reads.
    """
    from kvq.evaluation.quality.text import default_calibration_text

    check_length(model, options.length)
    dataset = options.dataset
    if dataset is None and not options.files:
        dataset = default_calibration_text(tokenizer)
    other = options.held_out_dataset
    if other is None and not options.held_out_files and dataset is not None and dataset.endswith(CALIBRATION):
        other = dataset.removesuffix(CALIBRATION) + REPORT
    if other is None and not options.held_out_files:
        count = options.sequences + options.held_out_sequences
        whole = load_text(options.files, dataset, tokenizer, sequences=count, length=options.length)
        return _split(whole, options.sequences)
    return (
        load_text(options.files, dataset, tokenizer, sequences=options.sequences, length=options.length),
        load_text(
            options.held_out_files, other, tokenizer, sequences=options.held_out_sequences, length=options.length
        ),
    )


def _split(text: TokenText, count: int) -> tuple[TokenText, TokenText]:
    """Return the first sequences of a text, and the others."""
    first, others = text.sequences[:count], text.sequences[count:]
    return replace(text, name=f"{text.name}, beginning", sequences=first), replace(
        text, name=f"{text.name}, rest", sequences=others
    )
