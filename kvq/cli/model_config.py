"""The configuration of a model that a command names: a folder, a GGUF file, an id on the hub, or one that kvq knows.

Heavy: it imports transformers.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

from transformers import AutoConfig, PretrainedConfig
from transformers.utils import logging

from kvq.cli.console import one_line
from kvq.cli.given_path import exists, expand
from kvq.errors import EvaluationError, ModelError
from kvq.evaluation.model_loading import EMBEDDED_NAME, SMOLLM2_NAME, find_model_path
from kvq.evaluation.real_model.gguf_file import find_gguf, load_gguf_config
from kvq.evaluation.real_model.smollm2 import OnStep


def load_model_config(model: str, on_step: OnStep = lambda step: None) -> PretrainedConfig:  # noqa: ARG005
    """Return the configuration of a model; no weights are read, and no code of the model's own is run.

    Args:
        model: a folder, a GGUF file or a folder with one, an id on the hub, `embedded` or `smollm2`.
        on_step: called with a sentence before each step of `smollm2`'s first use.

    Raises:
        ModelError: there is none, the hub cannot be reached, or transformers does not know the model.
    """
    logging.set_verbosity_error()
    try:
        model = find_model_path(model, on_step)
        path = expand(model)
        gguf = find_gguf(path)
        if gguf is not None:
            return load_gguf_config(gguf)
    except EvaluationError as error:
        raise ModelError(str(error)) from error
    try:
        with contextlib.redirect_stdout(sys.stderr):
            return AutoConfig.from_pretrained(str(path) if exists(path) else model, trust_remote_code=False)
    except Exception as error:  # foreign code, and files of others: missing, unreachable, broken, unknown
        raise ModelError(_explain(model, path, error)) from error


def _explain(model: str, path: Path, error: Exception) -> str:
    cause = one_line(str(error)).partition(". ")[0].rstrip(".")
    if not exists(path):
        return (
            f"{model!r} is not a folder, and the hub gave no configuration of that name ({cause}); give a "
            f"folder with a config.json, a GGUF file, an id on the hub, {EMBEDDED_NAME!r} or {SMOLLM2_NAME!r}"
        )
    if path.is_dir() and not (path / "config.json").is_file():
        return f"{model!r} has no config.json; give the folder of a model of transformers"
    return f"{model!r}: the configuration cannot be used: {cause}"
