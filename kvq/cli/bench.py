"""`kvq bench`: how long decoding takes and what it holds, beside full precision and transformers' quantized caches."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from kvq.cli.console import get_console, print_error, print_line, print_table
from kvq.errors import BackendError, ConfigError, EvaluationError

if TYPE_CHECKING:
    import torch

    from kvq.benchmark.contenders import Contender
    from kvq.benchmark.run import Plan

QUICK: dict[str, Any] = {"length": [2048], "batch": [1], "dtype": ["float32"], "rounds": 7, "flushes": 1}
"""What `--quick` measures."""
_QUIET_LIBRARIES = {"KINETO_LOG_LEVEL": "99", "TORCH_CPP_LOG_LEVEL": "ERROR"}
"""The profiler reports each start and stop on stderr unless told otherwise, before torch is imported."""


def bench(
    length: Annotated[
        list[int] | None, typer.Option(min=256, help="Tokens of history; may be given several times.")
    ] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Rows; may be given several times.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="float32, bfloat16 or float16; several times.")] = None,
    backend: Annotated[
        list[str] | None, typer.Option(help="A backend of kvq; may be given several times. All that work unless given.")
    ] = None,
    config: Annotated[
        list[Path] | None, typer.Option("--config", "-c", help="A configuration, in place of backends; several times.")
    ] = None,
    bits: Annotated[int, typer.Option(min=2, max=8, help="Of keys and values, for kvq and its peers.")] = 4,
    peers: Annotated[bool, typer.Option(help="Measure the quantized caches of transformers too.")] = True,
    rounds: Annotated[int | None, typer.Option(min=3, help="Timed steps of each cache (21).")] = None,
    flushes: Annotated[int | None, typer.Option(min=0, help="Timed flushes of each cache (5).")] = None,
    limit: Annotated[float, typer.Option(min=1, help="Seconds that filling one cache, or its flushes, may take.")] = 60,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; torch's own choice unless given.")] = None,
    device: Annotated[str | None, typer.Option(help="Such as cuda or cpu; a GPU where there is one.")] = None,
    quick: Annotated[bool, typer.Option(help="2,048 tokens, batch 1, float32, few rounds: under two minutes.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write everything measured to this JSON file.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw time against context into this PNG file.")] = None,
) -> None:
    """Measure what one decode step takes with each cache, on the same states, side by side.

    In every round each cache takes one step; ratios are taken within a round, against full precision in a preallocated
    buffer whose attention packs the queries: the fastest that plain torch has. A ratio stands with the 95 % interval of
    its median; a difference within it is called a tie. Steps that quantize are measured apart.

    Exit codes: 0 fine; 2 wrong usage, or something that is not there.
    """
    given = {"length": length, "batch": batch, "dtype": dtype, "rounds": rounds, "flushes": flushes}
    asked = _choose({**given, "bits": bits, "limit": limit, "threads": threads, "peers": peers}, quick=quick)
    with _usage_errors():
        _check_files(out, picture)
        _quieten_libraries()
        where = _find_device(device, threads)
        contenders = _list_contenders(backend, config, bits, peers=peers)
        plan = _make_plan(contenders, asked, where)
    layer = _run(plan)
    _finish(where, {**asked, "contenders": [one.label for one in contenders]}, {"layer": layer}, out, picture)


def _choose(asked: dict[str, Any], *, quick: bool) -> dict[str, Any]:
    """Return the options with what was not given filled in."""
    usual = {
        "length": [2048, 8192, 32768],
        "batch": [1, 4],
        "dtype": ["float32", "bfloat16"],
        "rounds": 21,
        "flushes": 5,
    }
    defaults = QUICK if quick else usual
    return {name: value if value is not None else defaults.get(name) for name, value in asked.items()}


@contextmanager
def _usage_errors() -> Iterator[None]:
    """End the command with exit code 2 and one line where what was asked for is wrong or not there."""
    try:
        yield
    except (EvaluationError, ConfigError, BackendError) as error:
        print_error(str(error))
        raise typer.Exit(2) from error


def _check_files(*files: Path | None) -> None:
    """Notice before the minutes of measuring that a file could not be written after them."""
    for file in files:
        if file is not None and (file.is_dir() or not os.access(file.absolute().parent, os.W_OK)):
            raise EvaluationError(f"{str(file)!r} cannot be written")


def _quieten_libraries() -> None:
    if "torch" not in sys.modules:
        for name, value in _QUIET_LIBRARIES.items():
            os.environ.setdefault(name, value)


def _find_device(name: str | None, threads: int | None) -> torch.device:
    import torch

    from kvq.evaluation.model_loading import find_device

    if threads is not None:
        torch.set_num_threads(threads)
    return find_device(name)


def _list_contenders(
    backends: list[str] | None, files: list[Path] | None, bits: int, *, peers: bool
) -> list[Contender]:
    from kvq.benchmark.contenders import backend_configs, list_baselines, list_own, list_peers
    from kvq.config import KVQCacheConfig

    if backends and files:
        raise EvaluationError("--backend and --config cannot be combined; a configuration names its backend itself")
    if files:
        configs = {file.stem: KVQCacheConfig.from_file(file) for file in files}
    else:
        configs = backend_configs(backends or _usable_backends(bits), bits)
    return [*list_baselines(), *(list_peers(bits) if peers else ()), *list_own(configs)]


def _usable_backends(bits: int) -> list[str]:
    from kvq.registry import available_backends

    infos = available_backends(load=True)
    return [info.name for info in infos if info.spec and info.state == "ready" and bits in info.spec.capabilities.nbits]


def _make_plan(contenders: Sequence[Contender], asked: dict[str, Any], device: torch.device) -> Plan:
    from kvq.benchmark.baselines import register_packed_attention
    from kvq.benchmark.run import Plan
    from kvq.benchmark.setting import Setting, Shape, find_dtype

    register_packed_attention()
    settings = [
        Setting(Shape(), length, batch, find_dtype(dtype), device)
        for dtype in asked["dtype"]
        for batch in asked["batch"]
        for length in sorted(asked["length"])
    ]
    return Plan(contenders, settings, rounds=asked["rounds"], flushes=asked["flushes"], limit_s=asked["limit"])


def _run(plan: Plan) -> list[dict[str, Any]]:
    """Measure, and print each table as soon as it is complete."""
    from kvq.benchmark.report import COLUMNS, describe_results, list_failures, table_rows, title
    from kvq.benchmark.run import run

    found = []
    with _progress(plan.work) as on_progress:
        for result in run(plan, on_progress):
            (facts,) = describe_results([result])
            found.append(facts)
            print_line(title(facts))
            print_table(COLUMNS, table_rows(facts))
            for failure in list_failures(facts):
                print_line(failure)
            print_line()
    return found


@contextmanager
def _progress(work: int) -> Iterator[Callable[[str, int], None]]:
    """Show a bar with the time left."""
    left = TextColumn("left"), TimeRemainingColumn()
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), *left
    with Progress(*columns, console=get_console(stderr=True), transient=True) as progress:
        task = progress.add_task("filling", total=work)
        yield lambda label, done: progress.update(task, description=label, advance=done)


def _finish(
    device: torch.device,
    options: dict[str, Any],
    parts: dict[str, list[dict[str, Any]]],
    out: Path | None,
    picture: Path | None,
) -> None:
    from kvq.benchmark.picture import draw_results
    from kvq.benchmark.report import describe_run

    document = describe_run(device, options, parts)
    if out is not None:
        out.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    if picture is not None:
        machine = document["machine"]
        with _usage_errors():
            draw_results(parts["layer"], picture, f"One layer on {machine['cpu']}, {machine['threads']} threads")
