"""The configuration of a model that a command names: a folder, an id on the hub, or the embedded model.

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
from kvq.errors import ModelError
from kvq.evaluation.embedded_model import EMBEDDED_MODEL_PATH

EMBEDDED = "embedded"
"""The name of the model that ships with kvq."""


def load_model_config(model: str) -> PretrainedConfig:
    """Return the configuration of a model; no weights are read, and no code of the model's own is run.

    Args:
        model: a folder, an id on the hub, or `EMBEDDED`.

    Raises:
        ModelError: there is none, the hub cannot be reached, or transformers does not know the model.
    """
    if model == EMBEDDED:
        model = str(EMBEDDED_MODEL_PATH)
    path = expand(model)
    logging.set_verbosity_error()
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
            f"folder with a config.json, an id on the hub, or {EMBEDDED!r}"
        )
    if path.is_dir() and not (path / "config.json").is_file():
        return f"{model!r} has no config.json; give the folder of a model of transformers"
    return f"{model!r}: the configuration cannot be used: {cause}"
