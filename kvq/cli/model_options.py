"""The model that a command names: loading it, and what it is called. Heavy: it loads weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvq.cli.progress import Progress
from kvq.errors import EvaluationError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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


def check_length(model: PreTrainedModel, length: int) -> None:
    """Refuse sequences that are longer than the model reads.

    Raises:
        EvaluationError: they are.
    """
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and length > longest:
        raise EvaluationError(f"--length {length} is more than the {longest} positions of the model")
