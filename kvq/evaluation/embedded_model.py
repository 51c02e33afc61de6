"""The small recall model that ships with kvq, for the demo, the tests and offline examples."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

EMBEDDED_MODEL_PATH = Path(str(files("kvq.evaluation"))) / "recall_model"
"""Folder with weights, configuration, tokenizer and model card; a path that `from_pretrained` takes."""


def load_embedded_model(dtype: torch.dtype = torch.bfloat16) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the embedded model, ready to generate, and its tokenizer; nothing is downloaded.

    Args:
        dtype: dtype of weights and states.
    """
    with without_progress_bar():
        model = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL_PATH, dtype=dtype).eval()
    return model, AutoTokenizer.from_pretrained(EMBEDDED_MODEL_PATH)


@contextmanager
def without_progress_bar() -> Iterator[None]:
    """Keep the progress bar of `from_pretrained`, too short to be of use, off the terminal."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
