"""`kvq eval`: the cost in quality and the savings in memory of configurations, on the user's model and text."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvq.cli.console import print_error, print_line, print_table
from kvq.cli.eval_table import ShownRun
from kvq.cli.eval_tasks import make_tasks, score_plan, show_scores
from kvq.cli.given_text import check_sizes, check_text, load_text
from kvq.cli.model_options import (
    GivenDevice,
    GivenDtype,
    GivenModel,
    check_length,
    describe_given_model,
    find_positions,
    load_given_model,
)
from kvq.cli.outputs import check_outputs, write_output
from kvq.cli.progress import Progress, show_progress
from kvq.cli.resuming import told_how_to_resume
from kvq.cli.usage_errors import usage_errors
from kvq.errors import EvaluationError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kvq.evaluation.quality.candidates import Candidate
    from kvq.evaluation.quality.gate import Condition
    from kvq.evaluation.quality.processes import Processes
    from kvq.evaluation.quality.record import QualityRecord
    from kvq.evaluation.quality.run import EvaluationPlan
    from kvq.evaluation.quality.text import TokenText
    from kvq.evaluation.tasks.run import CacheScores

EMBEDDED = "embedded"
DEFAULT_PREFILL = 128
MAX_SCORED = 1024
"""Tokens at the end of a long sequence that are scored by default: those before are read once for all caches."""
CONTINUATIONS = {"cuda": 512, "cpu": 128}
"""Tokens of a greedy continuation by default: on a CPU one takes as long as reading hundreds in steps."""
MAX_SEQUENCES = 100_000
MAX_NEEDLES = 1000


def evaluate(
    model: GivenModel = EMBEDDED,
    config: Annotated[
        list[Path] | None, typer.Option("--config", "-c", metavar="FILE", help="A configuration file; repeatable.")
    ] = None,
    text: Annotated[list[Path] | None, typer.Option(metavar="FILE", help="A text file; repeatable.")] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            metavar="ID",
            help="Instead of a file: topics-calibration or topics-report (English prose: Python's manual), "
            "stdlib-calibration or stdlib-report (its source), recall-calibration or recall-report (for the embedded "
            "model), or ID[:CONFIGURATION[:SPLIT]] of the hub.",
        ),
    ] = None,
    gate: Annotated[
        str | None,
        typer.Option(
            metavar="CONDITIONS", help="Conditions that every configuration must meet, e.g. 'kl<0.05,top1>0.97'."
        ),
    ] = None,
    sequences: Annotated[
        int, typer.Option(metavar="INTEGER", min=1, max=MAX_SEQUENCES, help="Sequences to read.")
    ] = 16,
    length: Annotated[int, typer.Option(metavar="INTEGER", min=160, help="Tokens of each sequence.")] = 1024,
    prefill: Annotated[
        int | None,
        typer.Option(
            metavar="INTEGER",
            min=16,
            help="First tokens of each, read at once and not scored. Default: 128, or all but the last 1,024.",
        ),
    ] = None,
    step: Annotated[
        int, typer.Option(metavar="INTEGER", min=1, help="Tokens of each later forward; 1: as in generation.")
    ] = 16,
    batch_size: Annotated[int, typer.Option(metavar="INTEGER", min=1, help="Sequences read together.")] = 4,
    needles: Annotated[
        int,
        typer.Option(
            metavar="INTEGER", min=0, max=MAX_NEEDLES, help="Contexts that hide a fact at each of five depths."
        ),
    ] = 4,
    continuation: Annotated[
        int | None,
        typer.Option(
            metavar="INTEGER",
            min=0,
            help="Tokens of a greedy continuation of each sequence. Default: 512 on a GPU, 128 on a CPU, and none of "
            "a text that cannot be predicted.",
        ),
    ] = None,
    tasks: Annotated[
        int,
        typer.Option(
            metavar="INTEGER",
            min=0,
            max=MAX_NEEDLES,
            help="Contexts of each synthetic task, of the length of a sequence: several needles, variable tracking, "
            "common words; 0: none.",
        ),
    ] = 0,
    budget_minutes: Annotated[
        float | None,
        typer.Option(
            metavar="MINUTES",
            min=0,
            help="Read fewer sequences, for all caches, where all would take longer; --tasks come on top.",
        ),
    ] = None,
    peers: Annotated[bool, typer.Option(help="Measure the quantized caches of transformers too.")] = False,
    peer: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Only this one of them, such as quanto-4 or hqq-4; repeatable."),
    ] = None,
    dtype: GivenDtype = "auto",
    device: GivenDevice = None,
    details: Annotated[
        bool, typer.Option("--details", help="Also print KL by position, error by distance, answers by depth.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write everything measured to this JSON file.")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw quality against size: a PNG, SVG or PDF file.")
    ] = None,
) -> None:
    """Measure quality and memory of caches against full precision.

    Every cache reads the same tokens. A text is read in decode-sized steps: a quantized history grows as in generation.
    The first table shows the perplexity and its change, the divergence (KL) of the next-token distribution as a mean
    with its 95 % interval over the sequences, median, 99th and 99.9th percentile, the share of equal most likely
    tokens, and the memory held. The second one shows how sure the model is of facts hidden in the text, and where
    greedy continuations first differ from those in full precision, and how far they drift from there.

    With --out a run that was interrupted, or ran out of its budget, resumes where it stopped. Under `accelerate launch`
    all processes share the work.

    Exit codes: 0 fine; 1 the gate is not met; 2 wrong usage, or something is missing.
    """
    from kvq.evaluation.quality.processes import Processes

    prefill = max(DEFAULT_PREFILL, length - MAX_SCORED) if prefill is None else prefill
    chosen = _TextChoice(text, dataset, sequences, length, needles, continuation)
    with show_progress("loading the model", hidden=not Processes.is_first()) as progress:
        with usage_errors():
            from kvq.evaluation.quality.gate import parse_gate

            conditions = parse_gate(gate) if gate is not None else ()
            check_sizes(length, prefill)
            check_text(text, None)
            check_outputs(out, picture)
            candidates = _load_candidates(config, peers, peer)
            processes = Processes.find()  # before the model is loaded: it chooses the device of this process
            sizes = {"prefill": prefill, "step": step, "batch_size": batch_size}
            loaded = load_given_model(model, dtype, device, progress)
            title = describe_given_model(model)
            plan = _make_plan(loaded, candidates, chosen, sizes)
            task_sets = make_tasks(plan, loaded[1], tasks)
        shown = ShownRun(plan, title) if processes.is_main else None
        parts = out.with_name(f"{out.name}.parts") if out is not None else None
        with told_how_to_resume(parts, quiet=not processes.is_main):
            records = _run(plan, parts, processes, progress, shown, budget_minutes)
            task_scores = score_plan(plan, task_sets, progress) if processes.is_main else []
    if processes.is_main:
        _show_rest(plan, records, details=details)
        show_scores(task_scores)
        if out is not None:
            _write(records, plan, title, out, task_scores)
            _tidy_up(parts, plan, records)
        if picture is not None:
            _draw(records, picture, f"{Path(model).name} on {plan.text.name}")
    _apply_gate(records, conditions, quiet=not processes.is_main)


@dataclass(frozen=True)
class _TextChoice:
    """The options that choose the text."""

    files: list[Path] | None
    dataset: str | None
    sequences: int
    length: int
    needles: int
    continuation: int | None


def _load_candidates(files: list[Path] | None, peers: bool, named: list[str] | None) -> list[Candidate]:
    """Return the candidates of the files, or of the defaults where none is given, and all peers or those named."""
    from kvq.cli.given_configs import read_configs
    from kvq.config import KVQCacheConfig
    from kvq.evaluation.quality.candidates import choose_peers, list_peers, make_candidate

    configs = read_configs(files) or {"defaults": KVQCacheConfig()}
    own = [make_candidate(label, config) for label, config in configs.items()]
    if named:
        return [*own, *choose_peers(named)]
    return [*own, *list_peers()] if peers else own


def _make_plan(
    loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase],
    candidates: list[Candidate],
    chosen: _TextChoice,
    sizes: dict[str, int],
) -> EvaluationPlan:
    from kvq.evaluation.quality.needle import build_task
    from kvq.evaluation.quality.run import EvaluationPlan
    from kvq.evaluation.quality.text import BUILT_IN_TEXTS

    model, tokenizer = loaded
    shape = {"sequences": chosen.sequences, "length": chosen.length}
    if (chosen.files is None) == (chosen.dataset is None):
        raise EvaluationError(
            f"give the text: either --text FILE or --dataset ID (built in: {', '.join(BUILT_IN_TEXTS)})"
        )
    check_length(model, chosen.length)
    text = load_text(chosen.files, chosen.dataset, tokenizer, **shape)
    needles = None
    if chosen.needles:
        needles = build_task(tokenizer, text.sequences, length=chosen.length, per_depth=chosen.needles)
    for candidate in candidates:
        if not candidate.is_peer:
            candidate.build(model)  # an error now, and not only after full precision was measured
    plan = EvaluationPlan(
        model, text, candidates, needles, continuation=_choose_continuation(chosen, model, text), **sizes
    )
    longest = find_positions(model)
    if longest is not None and plan.continuation and plan.prompt_length + plan.continuation > longest:
        raise EvaluationError(
            f"--continuation {plan.continuation} goes beyond the {longest} positions of the model; at --length "
            f"{chosen.length} it follows {plan.prompt_length} tokens"
        )
    return plan


def _choose_continuation(chosen: _TextChoice, model: PreTrainedModel, text: TokenText) -> int:
    if chosen.continuation is not None:
        return chosen.continuation
    if not text.scored.all():  # what cannot be predicted is chosen by chance, in full precision too
        return 0
    return CONTINUATIONS.get(model.device.type, CONTINUATIONS["cuda"])


def _run(
    plan: EvaluationPlan,
    parts: Path | None,
    processes: Processes,
    progress: Progress,
    shown: ShownRun | None,
    minutes: float | None,
) -> list[QualityRecord]:
    from kvq.evaluation.quality.run import Budget
    from kvq.evaluation.quality.run import evaluate as measure

    progress.begin("full precision", -(-plan.units // processes.count), "forwards")
    if shown is not None:
        shown.begin()
    on_record: Callable[[QualityRecord], None] = shown.add if shown is not None else lambda record: None  # noqa: ARG005
    budget = Budget(None if minutes is None else 60 * minutes)
    return measure(
        plan, parts=parts, processes=processes, budget=budget, on_progress=progress.advance, on_record=on_record
    )


def _tidy_up(parts: Path | None, plan: EvaluationPlan, records: list[QualityRecord]) -> None:
    """Remove the finished parts, unless a larger budget may go on from them."""
    from kvq.evaluation.quality.report import count_read

    if parts is not None and count_read(records) in (0, len(plan.text.sequences)):
        shutil.rmtree(parts, ignore_errors=True)


def _show_rest(plan: EvaluationPlan, records: list[QualityRecord], *, details: bool) -> None:
    from kvq.evaluation.quality import report

    further: list[tuple[tuple[str, ...], list[tuple[str, ...]]]] = [(report.TASK_COLUMNS, report.task_rows(records))]
    if details:
        further.append((report.DEPTH_COLUMNS, report.depth_rows(records)))
        further.append((report.DETAIL_COLUMNS, report.detail_rows(records)))
    for columns, rows in further:
        if rows:
            print_line()
            print_table(columns, rows)
    left_out = report.describe_left_out(plan, records)
    for line in (*report.list_ties(records), *report.list_failures(records), *([left_out] if left_out else [])):
        print_line(line)


def _write(
    records: list[QualityRecord], plan: EvaluationPlan, model: str, out: Path, task_scores: list[CacheScores]
) -> None:
    from kvq.evaluation.quality.report import describe_run

    found = describe_run(plan, model, records)
    if task_scores:
        found["tasks"] = {one.label: one.to_dict() for one in task_scores}
    write_output(out, json.dumps(found, indent=1, allow_nan=False) + "\n")


def _draw(records: list[QualityRecord], picture: Path, title: str) -> None:
    with usage_errors():
        from kvq.evaluation.quality.picture import draw_records

        draw_records(records, picture, title)


def _apply_gate(records: list[QualityRecord], conditions: tuple[Condition, ...], *, quiet: bool) -> None:
    """Print the conditions that are not met, and then end the command with exit code 1."""
    from kvq.evaluation.quality.gate import find_failures

    if not conditions:
        return
    own = [record for record in records if not record.is_peer]
    failures = [f"{record.label}: {failure}" for record in own for failure in find_failures(record, conditions)]
    if failures and not quiet:
        print_error("the gate is not met", failures)
    if failures:
        raise typer.Exit(1)
    if not quiet:
        print_line(f"the gate is met: {', '.join(map(str, conditions))}")
