"""The small recall model that ships with kvq, for the demo, the tests and offline examples."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

EMBEDDED_MODEL_PATH = Path(str(files("kvq.evaluation"))) / "recall_model"
"""Folder with weights, configuration, tokenizer and model card; a path that `from_pretrained` takes."""


def load_embedded_model(dtype: torch.dtype = torch.bfloat16) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the embedded model, ready to generate, and its tokenizer; nothing is downloaded.

    Args:
        dtype: of weights and states.
    """
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL_PATH, dtype=dtype).eval()
    return model, AutoTokenizer.from_pretrained(EMBEDDED_MODEL_PATH)
