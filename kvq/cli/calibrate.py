"""`kvq calibrate`: statistics of a model's states on a text, for backends that ask for them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvq.cli.console import print_error, print_line
from kvq.cli.given_text import check_text, load_text
from kvq.cli.model_options import (
    GivenDevice,
    GivenDtype,
    GivenModel,
    check_length,
    describe_given_model,
    load_given_model,
)
from kvq.cli.outputs import check_outputs
from kvq.cli.progress import show_progress
from kvq.cli.usage_errors import usage_errors
from kvq.errors import CalibrationError

if TYPE_CHECKING:
    from kvq.calibration import Calibration


def calibrate(
    model: GivenModel,
    text: Annotated[list[Path] | None, typer.Option(metavar="FILE", help="A text file to read; repeatable.")] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            metavar="ID", help="Instead: a text that `kvq eval --dataset` takes. Default: topics-calibration."
        ),
    ] = None,
    sequences: Annotated[int, typer.Option(metavar="INTEGER", min=1, max=10_000, help="Sequences of the text.")] = 4,
    length: Annotated[int, typer.Option(metavar="INTEGER", min=16, help="Tokens of each sequence.")] = 640,
    batch_size: Annotated[int, typer.Option(metavar="INTEGER", min=1, help="Sequences read together.")] = 2,
    dtype: GivenDtype = "auto",
    device: GivenDevice = None,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The file to write.")] = Path("calibration.safetensors"),
) -> None:
    """Collect statistics of a model's keys, values and queries, for `rounding_k: error_feedback` and some backends.

    `kvq backends NAME` says whether a backend asks for them. The model reads the text once, in full precision. The file
    goes into a configuration, `calibration: FILE`; it fits this model alone, and is refused for another one.

    Exit codes: 0 fine; 1 the file cannot be written; 2 wrong usage, or something is missing.
    """
    with show_progress("loading the model") as progress, usage_errors():
        check_text(text, dataset)
        check_outputs(out, None)
        loaded, tokenizer = load_given_model(model, dtype, device, progress)
        check_length(loaded, length)
        from kvq.calibrating import calibrate as collect
        from kvq.evaluation.quality.text import default_calibration_text

        if dataset is None and not text:
            dataset = default_calibration_text(tokenizer)
        read = load_text(text, dataset, tokenizer, sequences=sequences, length=length)
        found = collect(loaded, read.sequences, text=read.name, batch_size=batch_size, watcher=progress)
    _write(found, out)
    print_line(
        f"{out}: {len(found.layers)} layers of {describe_given_model(model)}, {found.tokens:,} tokens of {found.text}, "
        f"digest {found.digest}"
    )


def _write(found: Calibration, out: Path) -> None:
    try:
        found.save(out)
    except CalibrationError as error:
        print_error(str(error))
        raise typer.Exit(1) from error
