"""`kvq export`: the setting of another engine that is nearest to a configuration, and what it costs."""

from __future__ import annotations

import math
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvq.cli.console import print_json, print_line, print_table
from kvq.cli.given_path import find_config_file
from kvq.cli.given_text import check_sizes, check_text, load_text
from kvq.cli.model_options import GivenDevice, GivenDtype, check_length, load_given_model
from kvq.cli.progress import Progress, show_progress
from kvq.cli.usage_errors import usage_errors
from kvq.errors import EvaluationError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kvq.config import KVQCacheConfig
    from kvq.evaluation.quality.candidates import Candidate
    from kvq.evaluation.quality.plan import EvaluationPlan
    from kvq.evaluation.quality.record import QualityRecord
    from kvq.exporting import CarriedOver, EngineSetting

COLUMNS = ("cache", "bits K", "bits V", "KL", "equal top-1", "perplexity")


def export(
    to: Annotated[
        str, typer.Option(metavar="ENGINE", help="vllm, sglang, llama.cpp, tensorrt-llm or mlx.", show_default=False)
    ],
    config: Annotated[
        Path | None, typer.Option("--config", "-c", metavar="FILE", help="A configuration file. Default: the defaults.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="PATH_OR_ID",
            help="Measure the divergence of the setting on this model, as `kvq eval --model` takes it.",
            show_default=False,
        ),
    ] = None,
    every: Annotated[
        bool, typer.Option("--all", help="Measure every setting of the engine, not only the nearest.")
    ] = False,
    text: Annotated[list[Path] | None, typer.Option(metavar="FILE", help="A text file; repeatable.")] = None,
    dataset: Annotated[
        str | None, typer.Option(metavar="ID", help="Instead: a text that `kvq eval --dataset` takes.")
    ] = None,
    sequences: Annotated[int, typer.Option(metavar="INTEGER", min=1, max=10_000, help="Sequences to read.")] = 2,
    length: Annotated[int, typer.Option(metavar="INTEGER", min=160, help="Tokens of each sequence.")] = 768,
    prefill: Annotated[
        int, typer.Option(metavar="INTEGER", min=16, help="First tokens of each, read at once and not scored.")
    ] = 128,
    step: Annotated[int, typer.Option(metavar="INTEGER", min=1, help="Tokens of each later forward.")] = 32,
    dtype: GivenDtype = "auto",
    device: GivenDevice = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Find the setting of another engine that is nearest to a configuration, and say what is lost.

    The nearest setting is the one whose stored bits of keys and values differ least. With --model its divergence (KL)
    is measured by a cache that rounds states as the engine does, beside the configuration itself: no engine needs to
    be installed. Only numbers are emulated; kernels that round queries too, or accumulate otherwise, differ further.

    Exit codes: 0 fine; 2 wrong usage, or something is missing.
    """
    records: list[QualityRecord] = []
    with usage_errors():
        given = _read_config(config)
        if model is None:
            _check_unmeasured(text, dataset, every=every)
            carried = _carry_over(given, to, None)
        else:
            carried, records = _measure_on(
                model, given, to, text, dataset, (sequences, length, prefill, step), dtype, device, every=every
            )
    if as_json:
        print_json({**carried.to_dict(), **({"measured": [_facts(one) for one in records]} if records else {})})
    else:
        _show(carried)
        _show_records(records, carried)


def _read_config(config: Path | None) -> KVQCacheConfig:
    from kvq.config import KVQCacheConfig

    return KVQCacheConfig() if config is None else KVQCacheConfig.from_file(find_config_file(config))


def _check_unmeasured(text: list[Path] | None, dataset: str | None, *, every: bool) -> None:
    option = "--text" if text else "--dataset" if dataset is not None else "--all" if every else None
    if option is not None:
        raise EvaluationError(f"{option} is about measuring, which needs a model; give --model too")


def _carry_over(config: KVQCacheConfig, to: str, model: PreTrainedModel | None) -> CarriedOver:
    from kvq.cli.sample_block import measure_effective_bits
    from kvq.exporting import carry_over, find_engine

    return carry_over(config, find_engine(to), measure_effective_bits, None if model is None else model.config)


def _measure_on(
    name: str,
    config: KVQCacheConfig,
    to: str,
    text: list[Path] | None,
    dataset: str | None,
    sizes: tuple[int, int, int, int],
    dtype: str,
    device: str | None,
    *,
    every: bool,
) -> tuple[CarriedOver, list[QualityRecord]]:
    """Return the nearest setting for a model, and the records of the caches."""
    from kvq.exporting import find_engine

    sequences, length, prefill, step = sizes
    find_engine(to)  # before a model is loaded
    check_sizes(length, prefill)
    check_text(text, dataset)
    with show_progress("loading the model") as progress:
        model, tokenizer = load_given_model(name, dtype, device, progress)
        carried = _carry_over(config, to, model)
        check_length(model, length)
        chosen = dataset if text or dataset is not None else _default_text(name)
        tokens = load_text(text, chosen, tokenizer, sequences=sequences, length=length)
        plan = _make_plan(model, tokens, _candidates(config, carried, model, every=every), prefill, step)
        return carried, _run(plan, progress)


def _default_text(model: str) -> str:
    from kvq.cli.eval import EMBEDDED

    return "recall-report" if model == EMBEDDED else "topics-report"


def _candidates(
    config: KVQCacheConfig, carried: CarriedOver, model: PreTrainedModel, *, every: bool
) -> list[Candidate]:
    from kvq.evaluation.quality.candidates import make_candidate

    settings = [one for one in carried.engine.settings if one.fits(carried.wanted.head_dim)] if every else []
    own = make_candidate("the configuration", config)
    own.build(model)  # an error now, and not only after full precision was measured
    return [own, *(_emulate(one, carried) for one in settings or [carried.setting])]


def _emulate(setting: EngineSetting, carried: CarriedOver) -> Candidate:
    from kvq.evaluation.quality.candidates import Candidate
    from kvq.exporting import EmulatedCache

    return Candidate(
        setting.label,
        lambda model: EmulatedCache(model.config, setting, carried.skipped),
        {"engine": carried.engine.name, "setting": setting.label, "kept": list(carried.skipped)},
    )


def _make_plan(
    model: PreTrainedModel, text: Any, candidates: list[Candidate], prefill: int, step: int
) -> EvaluationPlan:
    from kvq.evaluation.quality.plan import EvaluationPlan

    return EvaluationPlan(model, text, candidates, None, prefill=prefill, step=step, batch_size=2)


def _run(plan: EvaluationPlan, progress: Progress) -> list[QualityRecord]:
    from kvq.evaluation.quality.run import evaluate

    progress.begin("full precision", plan.units, "forwards")
    return evaluate(plan, on_progress=progress.advance)


def _facts(record: QualityRecord) -> dict[str, Any]:
    return {
        "label": record.label,
        "kl": record.kl.mean,
        "kl_half_width": None if math.isnan(record.kl.half_width) else record.kl.half_width,
        "top1": record.top1,
        "perplexity": record.perplexity,
        "reference_perplexity": record.reference_perplexity,
    }


def _show(carried: CarriedOver) -> None:
    found = carried.to_dict()
    print_line(f"{found['engine']}: {found['setting']}")
    print_line(f"  {shlex.join(carried.list_arguments())}")
    for line in carried.setting.file:
        print_line(f"    {line}")
    for title, lines in (("lost or changed", found["lost"]), ("to know", found["remarks"])):
        if lines:
            print_line(f"{title}:")
        for line in lines:
            print_line(f"  - {line}")
    print_line(f"documented: {found['source']}")


def _show_records(records: list[QualityRecord], carried: CarriedOver) -> None:
    if not records:
        return
    head_dim = carried.wanted.head_dim
    bits = {one.label: (one.key.bits(head_dim), one.value.bits(head_dim)) for one in carried.engine.settings}
    bits[records[0].label] = (carried.wanted.key_bits, carried.wanted.value_bits)
    print_line()
    plain = ("full precision", "-", "-", "-", "-", f"{records[0].reference_perplexity:.4g}")
    print_table(COLUMNS, [plain, *(_row(one, bits[one.label]) for one in records)])


def _row(record: QualityRecord, bits: tuple[float, float]) -> tuple[str, ...]:
    figures = f"{record.kl.mean:.5f}", f"{record.top1:.1%}", f"{record.perplexity:.4g}"
    return record.label, f"{bits[0]:.2f}", f"{bits[1]:.2f}", *figures
