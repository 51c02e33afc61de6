"""The model that a command names: the options, loading it, and what it is called."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from kvq.cli.progress import Progress
from kvq.errors import EvaluationError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


GivenModel = Annotated[
    str,
    typer.Option(
        metavar="PATH_OR_ID",
        help="A causal model of transformers, a GGUF file, 'embedded', or 'smollm2': a real model, fetched once.",
    ),
]
GivenDtype = Annotated[str, typer.Option(metavar="DTYPE", help="auto (the model's own), float16, bfloat16 or float32.")]
GivenDevice = Annotated[
    str | None, typer.Option(metavar="NAME", help="Such as cuda or cpu. Default: a GPU if there is one.")
]


def load_given_model(
    model: str, dtype: str, device: str | None, progress: Progress
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the model and its tokenizer; see `load_model`."""
    from kvq.evaluation.model_loading import load_model

    return load_model(model, dtype=dtype, device=device, on_step=lambda step: progress.advance(step, 0))


def describe_given_model(model: str) -> str:
    """Return a model's name for a heading."""
    from kvq.evaluation.model_loading import describe_model

    return describe_model(model)


def find_positions(model: PreTrainedModel) -> int | None:
    """Return the longest sequence that the model reads, in tokens, or None where it does not say."""
    longest: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return longest


def check_length(model: PreTrainedModel, length: int) -> None:
    """Refuse sequences that are longer than the model reads.

    Raises:
        EvaluationError: they are.
    """
    longest = find_positions(model)
    if longest is not None and length > longest:
        raise EvaluationError(f"--length {length} is more than the {longest} positions of the model")
