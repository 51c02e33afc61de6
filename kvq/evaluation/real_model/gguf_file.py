"""A model in a GGUF file, which transformers reads into the weights of one of its own classes.

The weights are those that the file holds, in float32 or in the dtype asked for: quantized ones are dequantized.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partialmethod
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from kvq.errors import EvaluationError
from kvq.evaluation.embedded_model import without_progress_bar

SUFFIX = ".gguf"
NEEDED_PACKAGES = ("gguf", "accelerate")
"""What transformers needs to read such a file; the extra `real` has them."""
_OTHER_WEIGHTS = ("*.safetensors", "*.bin")


def find_gguf(path: Path) -> Path | None:
    """Return the GGUF file that a path names: the file itself, or the only one of a folder without other weights.

    Raises:
        EvaluationError: the folder has several, or there is no file of that name with the suffix of one.
    """
    found = _list_gguf(path)
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise EvaluationError(f"{str(path)!r} has several GGUF files; give the path of one of them: {names}")
    if path.suffix.lower() == SUFFIX and not found and not path.is_dir():
        raise EvaluationError(f"{str(path)!r} does not exist; give the path of a GGUF file")
    return found[0] if found else None


def load_gguf(file: Path, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the model of a file, ready to generate, and its tokenizer.

    Args:
        file: a GGUF file.
        dtype: dtype of weights and states.

    Raises:
        EvaluationError: transformers cannot read the file, or a package that it needs for that is missing.
    """
    check_packages()
    with _told_by_one_line(file), _without_bars():
        options = {"gguf_file": file.name, "dtype": dtype, **_find_options()}
        model = AutoModelForCausalLM.from_pretrained(str(file.parent), **options)
        tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    model.name_or_path = str(file)  # transformers names the folder
    return model.eval(), tokenizer


def load_gguf_config(file: Path) -> PretrainedConfig:
    """Return the configuration of the model of a file; no weights are read.

    Raises:
        EvaluationError: transformers cannot read the file, or a package that it needs for that is missing.
    """
    check_packages()
    with _told_by_one_line(file), _without_bars():
        return AutoConfig.from_pretrained(str(file.parent), gguf_file=file.name)


def check_packages() -> None:
    """Check that what transformers needs to read a GGUF file is installed.

    Raises:
        EvaluationError: it is not; the message says what to install.
    """
    missing = [name for name in NEEDED_PACKAGES if find_spec(name) is None]
    if missing:
        raise EvaluationError(
            f"a GGUF file needs {' and '.join(missing)}, the extra `real`: pip install '.[real]' in the checkout of kvq"
        )


def _list_gguf(path: Path) -> list[Path]:
    """Return the file if it is one by its name, or those of a folder without other weights."""
    try:
        is_folder = path.is_dir()
        if is_folder and any(any(path.glob(pattern)) for pattern in _OTHER_WEIGHTS):
            return []
        files = path.iterdir() if is_folder else [path] if path.is_file() else []
        return sorted(file for file in files if file.suffix.lower() == SUFFIX)
    except (OSError, ValueError):  # a text that can name no file, or a folder that cannot be read
        return []


def _find_options() -> dict[str, Any]:
    """Return the options that ask for plain weights, and so for the model's usual attention.

    Versions of transformers that can compute on packed weights have a class for them, and may change the attention too.
    """
    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


@contextmanager
def _told_by_one_line(file: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # foreign code on a file that may be anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise EvaluationError(f"{str(file)!r} cannot be read as a model in GGUF: {reason}") from error


@contextmanager
def _without_bars() -> Iterator[None]:
    """Keep all bars of transformers off the terminal, also the one over the tensors, which has no switch."""
    bar: Any = tqdm
    plain = bar.__init__
    bar.__init__ = partialmethod(plain, disable=True)
    try:
        with without_progress_bar():
            yield
    finally:
        bar.__init__ = plain
