"""`kvq bench`: time and memory of decoding, beside full precision and transformers' quantized caches."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvq.cli.bench_parts import run_plan, time_generation, time_prompts
from kvq.cli.console import print_line
from kvq.cli.given_path import find_config_file
from kvq.cli.outputs import check_outputs, write_output
from kvq.cli.progress import Progress, show_progress
from kvq.cli.usage_errors import usage_errors
from kvq.errors import EvaluationError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from kvq.benchmark.contenders import ContenderChoice
    from kvq.benchmark.run import BenchmarkPlan
    from kvq.benchmark.setting import Setting, Shape

USUAL: dict[str, Any] = {
    "length": [2048, 8192, 32768],
    "batch": [1, 4],
    "dtype": ["float32", "bfloat16"],
    "rounds": 21,
    "flushes": 5,
    "layers": 4,
    "deep": 32,
    "prompt": [2048, 8192],
    "chunk": [512],
    "draft": [5],
    "steps": 512,
}
"""The settings measured unless others are asked for."""
QUICK: dict[str, Any] = {
    "length": [2048],
    "batch": [1],
    "dtype": ["float32"],
    "rounds": 7,
    "flushes": 1,
    "layers": 0,
    "deep": 0,
    "prompt": [],
    "chunk": [],
    "draft": [],
    "steps": 0,
}
"""The settings that `--quick` measures."""
DEEP_LENGTHS = (4096, 16384, 32768)
"""Tokens of history in the random model of many cheap layers."""
MODEL_LENGTHS = (256, 4096, 8192)
"""Tokens of history in a model of the user's, unless others are asked for; as many as fit it of the longest."""
MIN_LENGTH = 64
"""Fewest tokens of history that are measured."""
UNLIMITED = 1 << 20
"""Tokens that a model takes which does not say."""
MAX_THREADS = 1024
SPARE = 512
"""Positions that a run may take behind the history: rounds, and the tokens between flushes."""
_NUMBERS = re.compile(r"\[[-\d.e,\s]+\]")
"""A list of numbers, which stands on one line of the file."""
_QUIET_LIBRARIES = {"KINETO_LOG_LEVEL": "99", "TORCH_CPP_LOG_LEVEL": "ERROR"}
"""The profiler reports each start and stop on stderr unless told otherwise, before torch is imported."""


def bench(
    length: Annotated[
        list[int] | None,
        typer.Option(
            metavar="INTEGER",
            min=MIN_LENGTH,
            help="Tokens of history; repeatable. Default: 2048, 8192, 32768; of a model 256, 4096, 8192.",
        ),
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(metavar="INTEGER", min=1, help="Rows of the batch; repeatable. Default: 1, 4.")
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(metavar="DTYPE", help="float32, bfloat16, float16; repeatable. Default: the first two."),
    ] = None,
    backend: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A backend of kvq; repeatable. Default: all that work here."),
    ] = None,
    config: Annotated[
        list[Path] | None,
        typer.Option("--config", "-c", metavar="FILE", help="A configuration file, instead of backends; repeatable."),
    ] = None,
    bits: Annotated[
        int, typer.Option(metavar="INTEGER", min=2, max=8, help="Bits of keys and values, for kvq and its peers.")
    ] = 4,
    peers: Annotated[bool, typer.Option(help="Measure the quantized caches of transformers too.")] = True,
    rounds: Annotated[
        int | None, typer.Option(metavar="INTEGER", min=3, help="Timed steps of each cache. Default: 21.")
    ] = None,
    flushes: Annotated[
        int | None, typer.Option(metavar="INTEGER", min=0, help="Timed flushes of each cache. Default: 5.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="PATH_OR_ID",
            help="A model, in its dtype, instead of a random one: of transformers, a GGUF file, or 'smollm2'.",
        ),
    ] = None,
    layers: Annotated[
        int | None,
        typer.Option(
            metavar="INTEGER", min=0, help="Also time a whole random model of this many layers; 0: none. Default: 4."
        ),
    ] = None,
    deep: Annotated[
        int | None,
        typer.Option(
            metavar="INTEGER",
            min=0,
            help="Also time a model of this many small layers, at 4,096 to 32,768 tokens; 0: none. Default: 32.",
        ),
    ] = None,
    prompt: Annotated[
        list[int] | None,
        typer.Option(metavar="INTEGER", min=256, help="Prompt length to time the first token for; repeatable."),
    ] = None,
    chunk: Annotated[
        list[int] | None,
        typer.Option(
            metavar="INTEGER", min=2, help="Length of a prompt's chunk to time after the history; repeatable."
        ),
    ] = None,
    draft: Annotated[
        list[int] | None,
        typer.Option(metavar="INTEGER", min=2, help="Draft length to time verification for; repeatable."),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            metavar="INTEGER", min=0, help="Steps in a row, for their median and 99th percentile. Default: 512."
        ),
    ] = None,
    limit: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            min=1,
            help="Time to fill one cache, and again for its flushes; six times that for prompts. A cache expected to "
            "take longer is left out, with the reason; flushes after that time are not measured.",
        ),
    ] = 60,
    threads: Annotated[
        int | None,
        typer.Option(metavar="INTEGER", min=1, max=MAX_THREADS, help="CPU threads. Default: torch's own choice."),
    ] = None,
    device: Annotated[
        str | None, typer.Option(metavar="NAME", help="Such as cuda or cpu. Default: a GPU if there is one.")
    ] = None,
    quick: Annotated[
        bool, typer.Option(help="One layer, 2,048 tokens, batch 1, float32, few rounds: a minute.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write everything measured to this JSON file.")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw time against context: a PNG, SVG or PDF file.")
    ] = None,
) -> None:
    """Time decode steps of each cache against full precision.

    In every round each cache takes one step on the same states. Ratios are taken within a round, against the fastest
    full precision in plain torch: a preallocated buffer whose attention packs the queries. Each ratio has the 95 %
    interval of its median; a difference within it is called a tie. Steps that quantize are measured separately.

    Exit codes: 0 fine; 2 wrong usage, or something is missing.
    """
    given: dict[str, Any] = {"length": length, "batch": batch, "dtype": dtype, "rounds": rounds, "flushes": flushes}
    given |= {"layers": layers, "deep": deep, "prompt": prompt, "bits": bits, "limit": limit, "peers": peers}
    given |= {"chunk": chunk, "draft": draft, "steps": steps}
    asked = {name: value if value is not None else (QUICK if quick else USUAL)[name] for name, value in given.items()}
    with show_progress("loading") as progress:
        with usage_errors():
            if math.isnan(limit):  # which older versions of click take for a number of at least 1
                raise EvaluationError("'--limit' nan is not a number of seconds")
            check_outputs(out, picture)
            _quieten_libraries()
            where = _find_device(device, threads)
            choice = _choose_contenders(backend, config, bits, peers=peers)
            loaded = _load(model, where, asked, given, progress)
            plans = _make_plans(choice, asked, where, loaded)
        options = {**asked, "model": model, "configs": dict(choice.configs)}
        parts = _Parts(where, options, list(plans), out)
        results = {name: run_plan(name, plan, progress, parts.keep) for name, plan in plans.items()}
        if asked["layers"]:
            time_generation(plans["model"], results["model"], asked, progress, parts.keep)
            time_prompts(choice, asked, where, loaded, progress, parts.keep)
    if picture is not None:
        _draw(where, results["layer"], picture)


def _quieten_libraries() -> None:
    """Keep stderr for the bar: the hint about materialized caches has no use here, where they are so on purpose."""
    logging.getLogger("kvq").setLevel(logging.ERROR)
    if "torch" not in sys.modules:
        for name, value in _QUIET_LIBRARIES.items():
            os.environ.setdefault(name, value)


def _find_device(name: str | None, threads: int | None) -> torch.device:
    import torch

    from kvq.evaluation.model_loading import find_device

    if threads is not None:
        torch.set_num_threads(threads)
    return find_device(name)


def _choose_contenders(
    backends: list[str] | None, files: list[Path] | None, bits: int, *, peers: bool
) -> ContenderChoice:
    from kvq.benchmark.contenders import ContenderChoice, backend_configs
    from kvq.config import KVQCacheConfig

    if backends and files:
        raise EvaluationError("--backend and --config cannot be combined; a configuration names its backend itself")
    if files:
        configs = {file.stem: KVQCacheConfig.from_file(find_config_file(file)) for file in files}
        if len(configs) < len(files):
            raise EvaluationError("two configurations have the same file name; rename one, the table needs two names")
    else:
        configs = backend_configs(backends or _usable_backends(bits), bits)
    return ContenderChoice({label: config.to_dict() for label, config in configs.items()}, bits, peers)


def _usable_backends(bits: int) -> list[str]:
    from kvq.registry import available_backends

    infos = available_backends(load=True)
    return [info.name for info in infos if info.spec and info.state == "ready" and bits in info.spec.capabilities.nbits]


def _load(
    name: str | None, device: torch.device, asked: dict[str, Any], given: dict[str, Any], progress: Progress
) -> PreTrainedModel | None:
    """Return the user's model, if there is one; then its dtype and layers are measured, at lengths that fit it."""
    if name is None:
        return None
    from kvq.benchmark.setting import Shape
    from kvq.evaluation.model_loading import describe_model, load_model

    model, _ = load_model(name, device=str(device), on_step=lambda step: progress.advance(step, 0))
    print_line(describe_model(name))
    dtype = str(model.dtype).removeprefix("torch.")
    asked |= {"dtype": [dtype], "layers": Shape.of(model.config).layers, "deep": 0}
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    asked |= choose_lengths(asked, given, longest)
    too_long = [length for length in (*asked["length"], *asked["prompt"]) if longest and length + SPARE > longest]
    if too_long:
        raise EvaluationError(f"{max(too_long):,} tokens and the steps after them exceed the model's {longest:,}")
    return model


def choose_lengths(asked: dict[str, Any], given: dict[str, Any], longest: int | None) -> dict[str, list[int]]:
    """Return the lengths of history and of prompts that are measured in a model of the user's.

    Args:
        asked: the lengths that random models are measured at, or those given.
        given: the lengths that were given, or None.
        longest: tokens that the model takes, or None where it does not say.
    """
    room = (longest or UNLIMITED) - SPARE
    fitting = sorted({max(MIN_LENGTH, min(one, room)) for one in MODEL_LENGTHS})
    prompts = [one for one in asked["prompt"] if one <= room]
    return {
        "length": fitting if given["length"] is None else asked["length"],
        "prompt": prompts if given["prompt"] is None else asked["prompt"],
    }


def _make_plans(
    choice: ContenderChoice, asked: dict[str, Any], device: torch.device, model: PreTrainedModel | None
) -> dict[str, BenchmarkPlan]:
    """Return the plans for one layer, for a whole model, and for a model of many layers that compute little."""
    from kvq.benchmark.baselines import register_packed_attention
    from kvq.benchmark.generation import choose_for_forwards
    from kvq.benchmark.models import ModelTrials
    from kvq.benchmark.run import BenchmarkPlan
    from kvq.benchmark.setting import Shape
    from kvq.benchmark.trial import LayerTrial

    register_packed_attention()
    sizes = {"rounds": asked["rounds"], "flushes": asked["flushes"], "limit_s": asked["limit"]}
    contenders, shape = choice.contenders(), Shape() if model is None else Shape.of(model.config)
    one_layer = _list_settings(replace(shape, layers=1), asked, device)
    plans = {"layer": BenchmarkPlan(contenders, one_layer, make_trial=LayerTrial, **sizes)}
    if asked["layers"]:
        settings = _list_settings(replace(shape, layers=asked["layers"]), asked, device)
        in_models = [one for one in contenders if one.kernel is None]
        plans["model"] = BenchmarkPlan(in_models, settings, make_trial=ModelTrials(model), **sizes)
    if asked["deep"]:
        first = {**asked, "length": list(DEEP_LENGTHS), "batch": asked["batch"][:1], "dtype": asked["dtype"][:1]}
        settings = _list_settings(Shape.deep(asked["deep"]), first, device)
        plans["deep"] = BenchmarkPlan(choose_for_forwards(contenders), settings, make_trial=ModelTrials(), **sizes)
    return plans


def _list_settings(shape: Shape, asked: dict[str, Any], device: torch.device) -> list[Setting]:
    from kvq.benchmark.setting import Setting, find_dtype

    return [
        Setting(shape, length, batch, find_dtype(dtype), device)
        for dtype in asked["dtype"]
        for batch in asked["batch"]
        for length in sorted(asked["length"])
    ]


class _Parts:
    """The results so far; the file has them at any time."""

    def __init__(self, device: torch.device, options: dict[str, Any], names: list[str], out: Path | None) -> None:
        self._device, self._options, self._out = device, options, out
        more = ("forwards", "steps", "first_token") if options["layers"] else ()
        self._parts: dict[str, list[dict[str, Any]]] = {name: [] for name in (*names, *more)}

    def keep(self, name: str, facts: dict[str, Any]) -> None:
        """Add one result to the part of that name, and write the file."""
        from kvq.benchmark.report import describe_run

        self._parts[name].append(facts)
        if self._out is not None:
            document = describe_run(self._device, self._options, self._parts)
            text = json.dumps(document, indent=1, allow_nan=False)
            write_output(self._out, _NUMBERS.sub(lambda found: " ".join(found[0].split()), text) + "\n")


def _draw(device: torch.device, results: list[dict[str, Any]], picture: Path) -> None:
    from kvq.benchmark.machine import describe_machine
    from kvq.benchmark.picture import draw_results

    machine = describe_machine(device)
    with usage_errors():
        draw_results(results, picture, f"One layer on {machine['cpu']}, {machine['threads']} threads")
