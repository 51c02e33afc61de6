"""Measure what the settings of a cache are worth, on one text; and what the chosen ones cost, on another.

    python scripts/measure_quality.py grid      # minutes: benchmarks/results/quality_grid_*.json
    python scripts/measure_quality.py report    # longer: benchmarks/results/quality_report_*.json and a picture each

`grid` varies one concern at a time, on the calibration texts of both models that the repository has; settings are
chosen by it. `report` reads the report texts, in steps of 4 tokens, with the chosen settings beside transformers' own
caches. Both go on where they were stopped.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers.cache_utils import Cache

from kvq import KVQ, KVQCacheConfig
from kvq.attention.hint import without_hint
from kvq.evaluation.model_loading import load_model
from kvq.evaluation.quality.candidates import Candidate, count_held_bytes, list_peers, make_candidate
from kvq.evaluation.quality.needle import build_task
from kvq.evaluation.quality.picture import draw_records
from kvq.evaluation.quality.plan import EvaluationPlan
from kvq.evaluation.quality.record import KL_QUANTILES, QualityRecord, compare_kl, judge
from kvq.evaluation.quality.report import describe_run
from kvq.evaluation.quality.run import evaluate
from kvq.evaluation.quality.text import load_dataset

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
CONFIGS = ROOT / "examples" / "configs"
MODEL_NAMES = {"recall": "embedded", "stdlib": "benchmarks/text_model"}
MODELS = {"recall": "embedded", "stdlib": str(ROOT / "benchmarks" / "text_model")}
"""A model for each kind of text."""
LENGTH = 1024
PREFILL = 128
Fields = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("grid", "report"))
    parser.add_argument("--text", choices=tuple(MODELS), action="append", help="one kind of text only")
    parser.add_argument("--parts", type=Path, default=ROOT / "build" / "quality", help="folder for finished results")
    arguments = parser.parse_args()
    torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))))
    for text in arguments.text or MODELS:
        path = RESULTS / f"quality_{arguments.what}_{text}.json"
        found = (measure_grid if arguments.what == "grid" else measure_report)(text, arguments.parts)
        path.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
        print(f"wrote {path.relative_to(ROOT)}", flush=True)


def measure_grid(text: str, parts: Path) -> dict[str, Any]:
    """Return the figures of every setting of the grid, on the calibration text, in steps of 32 tokens.

    That the tokens of a step see each other exactly changes little: the newest 32 are in the window anyway, and a flush
    comes up to 31 tokens later.
    """
    plan = make_plan(text, "calibration", dict(list_grid()), [], sequences=6, step=32, needles=0)
    records = run(plan, parts)
    rows = [short_row(record) for record in records]
    return {**describe_run(plan, MODEL_NAMES[text], []), "records": rows}


def measure_report(text: str, parts: Path) -> dict[str, Any]:
    """Return the figures of the named configurations and of transformers' caches, and compare like with like."""
    named = {path.stem: dict(KVQCacheConfig.from_file(path)) for path in sorted(CONFIGS.glob("k*.yaml"))}
    own = {**named, "k2v4": {"nbits_k": 2, "nbits_v": 4}}
    plan = make_plan(text, "report", own, list(list_peers()), sequences=12, step=4, needles=4)
    matched = match_peers(plan)
    plan.candidates.extend(matched.values())
    records = run(plan, parts)
    by_label = {record.label: record for record in records}
    draw_records(
        records, RESULTS / f"quality_{text}.png", f"{text}: {len(plan.text.sequences)} texts of {LENGTH} tokens"
    )
    pairs = [(candidate.label, peer) for peer, candidate in matched.items()]
    pairs.append(("k4v2", "k2v4"))
    return {
        **describe_run(plan, MODEL_NAMES[text], records),
        "comparisons": [compare(by_label[one], by_label[other]) for one, other in pairs if not by_label[other].failure],
    }


def make_plan(
    text: str,
    part: str,
    own: Mapping[str, Fields],
    peers: Iterable[Candidate],
    *,
    sequences: int,
    step: int,
    needles: int,
) -> EvaluationPlan:
    """Return what to measure on one part of one kind of text."""
    model, tokenizer = load_model(MODELS[text])
    tokens = load_dataset(f"{text}-{part}", tokenizer, sequences=sequences, length=LENGTH)
    task = build_task(tokenizer, tokens.sequences, length=LENGTH, per_depth=needles) if needles else None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*nbits_k.*below.*nbits_v.*")  # measured on purpose
        candidates = [make_candidate(label, KVQCacheConfig(**fields)) for label, fields in own.items()]
    return EvaluationPlan(model, tokens, [*candidates, *peers], task, prefill=PREFILL, step=step, batch_size=12)


def list_grid() -> Iterator[tuple[str, Fields]]:
    """Yield label and fields of every setting, one concern after another."""
    yield from vary("bits", backend=("native", "quanto"), bits=("8/8", "8/4", "4/4", "4/2", "2/4", "2/2"))
    yield from vary("bits", backend=("hqq",), bits=("4/4", "4/2", "2/4", "2/2"))
    yield from vary("bits", bits=("4/3", "3/3", "3/2"))
    granularities = ("per_channel", "per_token")
    yield from vary("granularity", bits=("4/4", "2/2"), axis_key=granularities, axis_value=granularities)
    yield from vary("groups", bits=("4/4", "4/2"), group_key=(32, 64, 128), group_value=(32, 64))
    yield from vary("ends", bits=("4/2",), sink_length=(0, 1, 4, 8), residual_length=(32, 64, 128))
    rotations = ("none", "hadamard")
    yield from vary("rotation", bits=("4/4", "4/2"), rotation_k=rotations, rotation_v=rotations, clip=(False, True))
    yield from vary("metadata", bits=("8/8", "4/4"), metadata_dtype=("bfloat16", "float16", "float32"))


def vary(concern: str, **choices: Iterable[Any]) -> Iterator[tuple[str, Fields]]:
    """Yield every combination of the choices; all other settings are defaults, and the backend is native."""
    for values in itertools.product(*choices.values()):
        chosen = dict(zip(choices, values, strict=True))
        label = f"{concern}: " + " ".join(f"{name}={value}" for name, value in chosen.items())
        yield label, make_fields(**chosen)


def make_fields(
    bits: str, backend: str = "native", group_key: int = 64, group_value: int = 64, clip: bool = False, **fields: Any
) -> Fields:
    nbits_k, nbits_v = map(int, bits.split("/"))
    fields |= {"backend": backend, "nbits_k": nbits_k, "nbits_v": nbits_v}
    fields["q_group_size"] = {"key": group_key, "value": group_value}
    if clip:
        fields["backend_options"] = {"native": {"clip": "mse"}}
    return fields


def match_peers(plan: EvaluationPlan) -> dict[str, Candidate]:
    """Return for each integer peer a cache of ours with its backend and bits, and the window that holds equal bytes."""
    states = plan.model.config
    tokens = torch.zeros(1, states.num_key_value_heads, LENGTH - 1, states.head_dim, dtype=plan.model.dtype)
    matched = {}
    for peer in plan.candidates:
        options = peer.settings.get("transformers", {})
        if peer.is_peer and "nbits" in options:
            wanted = fill(peer.build(plan.model), tokens, plan.step)
            fields = {"backend": options["backend"], "nbits_k": options["nbits"], "nbits_v": options["nbits"]}
            held = {
                length: fill(KVQ(model=plan.model, **fields, residual_length=length), tokens, LENGTH)
                for length in range(0, 129, 8)
            }
            best = min(held, key=lambda length: abs(held[length] - wanted))
            label = f"kvq as {peer.label.removeprefix('transformers ')}"
            matched[peer.label] = make_candidate(label, KVQCacheConfig(**fields, residual_length=best))
    return matched


def fill(cache: Cache, states: torch.Tensor, step: int) -> int:
    """Return the bytes that the first layer of a cache holds after a text was read in steps behind the prompt."""
    pieces = [states[:, :, :PREFILL], *states[:, :, PREFILL:].split(step, dim=2)]
    with without_hint():
        for piece in pieces:
            cache.update(piece, piece, 0)
    return count_held_bytes(cache)


def run(plan: EvaluationPlan, parts: Path) -> list[QualityRecord]:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns) as progress:
        task = progress.add_task("", total=plan.units)
        return evaluate(
            plan, parts=parts, on_progress=lambda label, done: progress.update(task, description=label, advance=done)
        )


def short_row(record: QualityRecord) -> dict[str, Any]:
    """Return what is chosen by."""
    row = record.to_dict()
    sizes = ("bits_key", "bits_value", "effective_bits", "held_bytes")
    return {name: row[name] for name in ("label", "kl", *KL_QUANTILES, "top1", "ppl_change", *sizes, "kl_by_sequence")}


def compare(one: QualityRecord, other: QualityRecord) -> dict[str, Any]:
    """Return by how much the divergence of one exceeds that of the other, with its interval over the texts."""
    difference = compare_kl(one, other)
    return {
        "one": one.label,
        "other": other.label,
        "bytes_ratio": one.held_bytes / other.held_bytes,
        "kl_ratio": one.kl.mean / other.kl.mean,
        "kl_difference": difference.mean,
        "half_width": difference.half_width,
        "verdict": judge(difference),
    }


if __name__ == "__main__":
    main()
