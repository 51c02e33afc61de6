"""A causal model and its tokenizer, by path, by identifier or the embedded one."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from kvq.errors import EvaluationError
from kvq.evaluation.embedded_model import EMBEDDED_MODEL_PATH, without_progress_bar

EMBEDDED_NAME = "embedded"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def load_model(
    name: str, *, dtype: str = "auto", device: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a model, ready to generate, and its tokenizer.

    Args:
        name: a folder, an id on the hub, or `embedded`.
        dtype: dtype of weights and states; `auto`: the dtype in which the model was saved.
        device: device to load it on; a GPU if there is one, unless given.

    Raises:
        EvaluationError: there is no such model, it cannot be reached, or dtype or device do not exist.
    """
    path = str(EMBEDDED_MODEL_PATH) if name == EMBEDDED_NAME else name
    if dtype not in ("auto", *DTYPES):
        raise EvaluationError(f"dtype {dtype!r} is not accepted: auto, {', '.join(DTYPES)}")
    target = find_device(device)
    try:
        with without_progress_bar():
            model = AutoModelForCausalLM.from_pretrained(path, dtype=DTYPES.get(dtype, "auto"))
            tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise EvaluationError(f"model {name!r} cannot be loaded: {reason}{_where_it_was_looked_for(name)}") from error
    return model.eval().to(target), tokenizer


def find_device(device: str | None) -> torch.device:
    """Return the device of that name; a GPU if there is one, unless given.

    Raises:
        EvaluationError: there is no such device, or none on this machine.
    """
    try:
        target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise EvaluationError(f"device {device!r} is unknown; use e.g. cpu or cuda") from error
    try:
        torch.empty(1, device=target)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise EvaluationError(f"device {device!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return target


def _where_it_was_looked_for(name: str) -> str:
    if Path(name).exists():
        return ""
    return f" (there is no folder {name!r} either; give a path, an id on the hub, or {EMBEDDED_NAME!r})"
