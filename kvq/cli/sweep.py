"""`kvq sweep`: a grid of configurations over backends, beside transformers' caches, as a table and a Pareto picture."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvq.cli.console import print_line
from kvq.cli.eval_table import ShownRun
from kvq.cli.given_text import check_sizes, check_text, load_text
from kvq.cli.grid_options import (
    Axes,
    Backends,
    Balances,
    Clips,
    GroupSizes,
    Metadata,
    Rotations,
    make_grid,
    parse_bits,
)
from kvq.cli.model_options import (
    GivenDevice,
    GivenDtype,
    GivenModel,
    check_length,
    describe_given_model,
    load_given_model,
)
from kvq.cli.outputs import check_outputs, write_output
from kvq.cli.progress import Progress, show_progress
from kvq.cli.resuming import told_how_to_resume
from kvq.cli.usage_errors import usage_errors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kvq.evaluation.quality.candidates import Candidate
    from kvq.evaluation.quality.plan import EvaluationPlan
    from kvq.evaluation.quality.record import QualityRecord
    from kvq.evaluation.quality.text import TokenText
    from kvq.tuning import Grid
    from kvq.tuning.sweep import SweepGrid


def sweep(
    model: GivenModel,
    backend: Backends = None,
    bits_k: Annotated[
        str | None, typer.Option(metavar="LIST", help="Bits of the keys. Default: 4,3,2.", show_default=False)
    ] = None,
    bits_v: Annotated[
        str | None, typer.Option(metavar="LIST", help="Bits of the values. Default: 4,3,2.", show_default=False)
    ] = None,
    axis: Axes = None,
    group_size: GroupSizes = None,
    rotation: Rotations = None,
    balance: Balances = None,
    clip: Clips = None,
    metadata: Metadata = None,
    window: Annotated[
        list[int] | None,
        typer.Option(metavar="INTEGER", min=0, help="Newest tokens kept exact; repeatable. Default: 32."),
    ] = None,
    config: Annotated[
        list[Path] | None, typer.Option("--config", "-c", metavar="FILE", help="One more configuration; repeatable.")
    ] = None,
    peers: Annotated[bool, typer.Option(help="Measure the quantized caches of transformers too.")] = True,
    text: Annotated[list[Path] | None, typer.Option(metavar="FILE", help="A text file; repeatable.")] = None,
    dataset: Annotated[
        str | None, typer.Option(metavar="ID", help="Instead of a file: a text that `kvq eval --dataset` takes.")
    ] = None,
    sequences: Annotated[int, typer.Option(metavar="INTEGER", min=1, max=100_000, help="Sequences to read.")] = 4,
    length: Annotated[int, typer.Option(metavar="INTEGER", min=160, help="Tokens of each sequence.")] = 768,
    prefill: Annotated[
        int, typer.Option(metavar="INTEGER", min=16, help="First tokens of each, read at once and not scored.")
    ] = 128,
    step: Annotated[int, typer.Option(metavar="INTEGER", min=1, help="Tokens of each later forward.")] = 32,
    batch_size: Annotated[int, typer.Option(metavar="INTEGER", min=1, help="Sequences read together.")] = 2,
    dtype: GivenDtype = "auto",
    device: GivenDevice = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write everything measured to this JSON file.")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw quality against size: a PNG, SVG or PDF file.")
    ] = None,
) -> None:
    """Measure a grid of configurations against full precision, and name those that no other one beats.

    Every combination of the options is a cache, for each backend; what a backend does not have is left out and named.
    transformers' quantized caches are measured beside them. Table, JSON and picture are those of `kvq eval`, and a run
    with --out that was stopped goes on where it was.

    Exit codes: 0 fine; 1 a result cannot be written; 2 wrong usage, or something is missing.
    """
    parts = out.with_name(f"{out.name}.parts") if out is not None else None
    sizes = {"prefill": prefill, "step": step, "batch_size": batch_size}
    with show_progress("loading the model") as progress, usage_errors(), told_how_to_resume(parts):
        check_sizes(length, prefill)
        check_text(text, dataset)
        check_outputs(out, picture)
        keys, values = _parse(bits_k, "--bits-k"), _parse(bits_v, "--bits-v")
        sides = make_grid(backend, keys, axis, group_size, rotation, balance, clip or ["auto"], metadata or ["default"])
        grid = _make_grid(sides, values, window)
        candidates, left_out = grid.candidates()
        candidates += _others(config, peers=peers)
        loaded = load_given_model(model, dtype, device, progress)
        check_length(loaded[0], length)
        plan = _make_plan(
            loaded[0], load_text(text, dataset, loaded[1], sequences=sequences, length=length), candidates, sizes
        )
        shown = ShownRun(plan, describe_given_model(model))
        records = _run(plan, parts, progress, shown)
    _show_rest(records, left_out)
    if out is not None:
        _write(plan, describe_given_model(model), records, left_out, out)
    if picture is not None:
        _draw(records, picture, f"{Path(model).name} on {plan.text.name}")
    if parts is not None:
        shutil.rmtree(parts, ignore_errors=True)


def _parse(text: str | None, option: str) -> tuple[float, ...]:
    from kvq.tuning.sweep import DEFAULT_BITS

    return DEFAULT_BITS if text is None else parse_bits(text, option)


def _make_grid(sides: Grid, bits_v: tuple[float, ...], windows: list[int] | None) -> SweepGrid:
    from kvq.config import KVQCacheConfig
    from kvq.tuning.sweep import SweepGrid

    base = KVQCacheConfig()
    return SweepGrid(sides, bits_v, tuple(windows or (base.residual_length,)), base)


def _others(files: list[Path] | None, *, peers: bool) -> list[Candidate]:
    """Return the configurations of the files, and transformers' caches."""
    from kvq.cli.given_configs import read_configs
    from kvq.evaluation.quality.candidates import list_peers, make_candidate

    own = [make_candidate(label, one) for label, one in read_configs(files).items()]
    return [*own, *list_peers()] if peers else own


def _make_plan(
    model: PreTrainedModel, text: TokenText, candidates: list[Candidate], sizes: dict[str, int]
) -> EvaluationPlan:
    from kvq.evaluation.quality.plan import EvaluationPlan

    for candidate in candidates:
        if not candidate.may_fail and not candidate.is_peer:
            candidate.build(model)  # an error now, and not only after full precision was measured
    return EvaluationPlan(model, text, candidates, None, **sizes)


def _run(plan: EvaluationPlan, parts: Path | None, progress: Progress, shown: ShownRun) -> list[QualityRecord]:
    from kvq.evaluation.quality.run import evaluate

    progress.begin("full precision", plan.units, "forwards")
    shown.begin()
    return evaluate(plan, parts=parts, on_progress=progress.advance, on_record=shown.add)


def _front(records: list[QualityRecord]) -> list[QualityRecord]:
    """Return the caches that no other one beats in bytes and divergence at once."""
    from kvq.evaluation.quality.picture import pareto_front

    return pareto_front([one for one in records if not one.failure], lambda record: record.held_bytes)


def _show_rest(records: list[QualityRecord], left_out: list[str]) -> None:
    from kvq.evaluation.quality.report import list_failures

    print_line()
    print_line(f"no other one is better in bytes and KL at once: {', '.join(one.label for one in _front(records))}")
    for line in (*list_failures(records), *(f"left out: {reason}" for reason in left_out)):
        print_line(line)


def _write(plan: EvaluationPlan, model: str, records: list[QualityRecord], left_out: list[str], out: Path) -> None:
    from kvq.evaluation.quality.report import describe_run

    grid = {"front": [one.label for one in _front(records)], "left_out": left_out}
    found = {**describe_run(plan, model, records), "sweep": grid}
    write_output(out, json.dumps(found, indent=1, allow_nan=False) + "\n")


def _draw(records: list[QualityRecord], picture: Path, title: str) -> None:
    with usage_errors():
        from kvq.evaluation.quality.picture import draw_records

        draw_records(records, picture, title)
