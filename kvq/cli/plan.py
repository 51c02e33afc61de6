"""`kvq plan`: the memory that a cache will take, from the model's configuration alone."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from kvq.cli.console import print_error, print_json, print_line, print_table, print_warning
from kvq.cli.given_path import find_config_file
from kvq.cli.progress import show_progress
from kvq.cli.usage_errors import print_usage_error
from kvq.errors import BackendError, ConfigError, ModelError
from kvq.units import parse_bytes

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from kvq.config import KVQCacheConfig
    from kvq.planning import CachePlan


DTYPES = ("bfloat16", "float16", "float32")


def plan(
    model: Annotated[
        str,
        typer.Option(
            metavar="MODEL",
            help="A folder with a config.json, a GGUF file, an id on the hub, 'embedded' or 'smollm2'.",
        ),
    ],
    context: Annotated[int, typer.Option(min=1, max=1 << 24, metavar="INTEGER", help="Tokens of the prompt.")],
    config: Annotated[
        str | None,
        typer.Option(metavar="FILE", show_default=False, help="The cache's configuration: YAML or JSON."),
    ] = None,
    batch: Annotated[
        int, typer.Option(min=1, metavar="INTEGER", help="Rows of the batch, each with --context tokens.")
    ] = 1,
    gpu_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", show_default=False, help="Memory of the device, e.g. 24GiB.")
    ] = None,
    weights_memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", show_default=False, help="Memory of quantized weights, e.g. 5.5GiB."),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="DTYPE",
            show_default=False,
            help=f"Dtype of weights and states: {', '.join(DTYPES)}. Default: the model's.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")] = False,
) -> None:
    """Plan a model's cache: its bytes, and the context that fits.

    The table shows what each layer gets and why. Only the model's configuration is read, no weights. The bytes are
    those that `cache.memory()` counts after a prompt of that many tokens. The largest context leaves room for the
    weights, and for the room that generation allocates ahead. The last line lists the memory that is not counted.

    Exit codes: 0 fine; 1 the cache cannot serve this model; 2 wrong usage, or the model or the file is missing or
    wrong.

    Keys of --json: "model", "context", "batch", "dtype", "total_bytes", "full_precision_bytes", "compression",
    "horizon" (tokens generated after the prompt), "later_bytes", "later_full_precision_bytes" and "peak_bytes" (up to
    then, on the device), "num_parameters", "weights_bytes", "gpu_memory_bytes", "fits" and "largest_context" (null
    without --gpu-memory), "is_search_bounded" (more than "largest_context" would fit), "unsupported", "warnings",
    "notes", "left_out", and "layers", a list with "layer_idx", "kind", "reason", bytes as above, "offloaded_bytes",
    "key" and "value" (null, or "num_heads", "head_dim", "backend", "nbits", "granularity", "group_length",
    "rotation", "balance", "clip", "rounding", "effective_bits"; null from "backend" on in full precision).
    """
    with _exit(2, ValueError):
        sizes = [None if size is None else parse_bytes(size) for size in (gpu_memory, weights_memory)]
    if dtype not in (None, *DTYPES):
        print_error(f"--dtype {dtype!r} is not accepted; choose one of {', '.join(DTYPES)}")
        raise typer.Exit(2)
    with _exit(2, ConfigError, BackendError), _told():
        settings = _read_config(config)
    with _exit(2, ModelError):
        described = _read_model(model)
    with _exit(1, ConfigError, BackendError, ModelError), _told():
        made = _make(described, settings, context, batch, dtype, sizes)
    if as_json:
        print_json(made.to_dict())
    else:
        _print_plan(made)


@contextlib.contextmanager
def _exit(code: int, *errors: type[Exception]) -> Iterator[None]:
    """Turn errors of these types into one line, or one for each fault, and an exit code."""
    try:
        yield
    except errors as error:
        print_usage_error(error)
        raise typer.Exit(code) from error


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Print kvq's warnings as lines, and keep a plugin's output off stdout."""
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        yield
    for one in caught:
        if one.category is UserWarning:
            print_warning(str(one.message))


def _read_config(file: str | None) -> KVQCacheConfig:
    from kvq.config import KVQCacheConfig

    return KVQCacheConfig() if file is None else KVQCacheConfig.from_file(find_config_file(file))


def _read_model(model: str) -> PretrainedConfig:
    from kvq.cli.model_config import load_model_config

    with show_progress("reading the model's configuration") as progress:
        return load_model_config(model, on_step=lambda step: progress.advance(step, 0))


def _make(
    model_config: PretrainedConfig,
    config: KVQCacheConfig,
    context: int,
    batch: int,
    dtype: str | None,
    sizes: list[int | None],
) -> CachePlan:
    import torch

    from kvq.planning import plan as make_plan

    return make_plan(
        model_config,
        config,
        context=context,
        batch=batch,
        dtype=None if dtype is None else getattr(torch, dtype),
        gpu_memory=sizes[0],
        weights_bytes=sizes[1],
    )


def _print_plan(made: CachePlan) -> None:
    from kvq.planning.cache_plan import COLUMNS

    print_line(f"{made.model}, {made.headline()}")
    print_line()
    print_table(COLUMNS, made.rows())
    print_line()
    for line in made.lines():
        print_line(line)
