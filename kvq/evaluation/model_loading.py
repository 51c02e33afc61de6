"""A causal model and its tokenizer: by path, by identifier, in a GGUF file, the embedded one or the real one."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from kvq.errors import EvaluationError
from kvq.evaluation.embedded_model import EMBEDDED_MODEL_PATH, without_progress_bar
from kvq.evaluation.real_model.gguf_file import find_gguf, load_gguf
from kvq.evaluation.real_model.smollm2 import SMOLLM2, OnStep, find_smollm2

EMBEDDED_NAME = "embedded"
SMOLLM2_NAME = "smollm2"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def load_model(
    name: str,
    *,
    dtype: str = "auto",
    device: str | None = None,
    on_step: OnStep = lambda step: None,  # noqa: ARG005
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a model, ready to generate, and its tokenizer.

    Args:
        name: a folder, a GGUF file or a folder with one, an id on the hub, `embedded` or `smollm2`.
        dtype: dtype of weights and states; `auto`: the dtype in which the model was saved, float32 for a GGUF file.
        device: device to load it on; a GPU if there is one, unless given.
        on_step: called with a sentence before each step of `smollm2`'s first use, which takes a minute.

    Raises:
        EvaluationError: there is no such model, it cannot be reached, or dtype or device do not exist.
    """
    if dtype not in ("auto", *DTYPES):
        raise EvaluationError(f"dtype {dtype!r} is not accepted: auto, {', '.join(DTYPES)}")
    target = find_device(device)
    path = find_model_path(name, on_step)
    gguf = find_gguf(Path(path))
    if gguf is not None:
        model, tokenizer = load_gguf(gguf, DTYPES.get(dtype, torch.float32))
        return model.to(target), tokenizer
    try:
        with without_progress_bar():
            model = AutoModelForCausalLM.from_pretrained(path, dtype=DTYPES.get(dtype, "auto"))
            tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise EvaluationError(f"model {name!r} cannot be loaded: {reason}{_where_it_was_looked_for(name)}") from error
    return model.eval().to(target), tokenizer


def find_model_path(name: str, on_step: OnStep = lambda step: None) -> str:  # noqa: ARG005
    """Return what `from_pretrained` takes for a name: the folder of `embedded` or `smollm2`, else the name itself.

    Raises:
        EvaluationError: `smollm2` is not there and cannot be fetched.
    """
    if name == EMBEDDED_NAME:
        return str(EMBEDDED_MODEL_PATH)
    return str(find_smollm2(on_step)) if name == SMOLLM2_NAME else name


def describe_model(name: str) -> str:
    """Return a model's name for a table's heading; `smollm2` with what its weights are, and its licence."""
    return f"{name} ({SMOLLM2.title})" if name == SMOLLM2_NAME else name


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
    return (
        f" (there is no folder {name!r} either; give a path, an id on the hub, {EMBEDDED_NAME!r} or {SMOLLM2_NAME!r})"
    )
