"""The tables of the demo, from benchmarks/results/demo.json, and the run that writes that file."""

from __future__ import annotations

import inspect
import json
import platform
import re
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from configuration_tables import own_backends
from markdown_table import table

from kvq.cli.demo import demo as demo_command
from kvq.evaluation.demo import DemoRow, list_cases, run_cases
from kvq.evaluation.embedded_model import load_embedded_model
from kvq.evaluation.recall import QUESTION_LENGTH, sample_recall_batch

DEMO_RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "demo.json"

DISTRIBUTIONS = ("torch", "transformers", "optimum-quanto", "hqq")
"""What the figures of the demo depend on, besides kvq."""


def write_demo() -> None:
    """Run the demo and keep its figures."""
    DEMO_RESULTS.parent.mkdir(parents=True, exist_ok=True)
    DEMO_RESULTS.write_text(json.dumps(measure_demo(), indent=2) + "\n")


def measure_demo() -> dict[str, Any]:
    """Run what `kvq demo` runs by default and return its figures, and what they were measured with."""
    options = inspect.signature(demo_command).parameters.items()
    defaults = {name: field.default for name, field in options if field.default is not inspect.Parameter.empty}
    generator = torch.Generator().manual_seed(defaults["seed"])
    batch = sample_recall_batch(defaults["contexts"], defaults["records"], defaults["questions"], generator=generator)
    model, _ = load_embedded_model()
    cases = list_cases([backend.spec for backend in own_backends()])
    rows = []
    for row in run_cases(model, batch, cases):
        rows.append(describe_row(row))
        print(rows[-1], flush=True)
    return {
        "command": "kvq demo",
        "parameters": {name: value for name, value in defaults.items() if value is not None},
        "context_length": batch.context.shape[1],
        "cpu": find_cpu_name(),
        "threads": 1,  # that is what the demo computes on, however many there are
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in ("kvq", *DISTRIBUTIONS)},
        "rows": rows,
    }


def describe_row(row: DemoRow) -> dict[str, Any]:
    """Return one row of the demo as plain values."""
    score, memory = row.score, row.score.memory
    facts = {
        "backend": row.case.backend,
        "bits": row.case.bits,
        "exact_rate": round(score.exact_rate, 6),
        "agreement": round(score.agreement, 6),
        "exact_by_context": [round(share, 6) for share in score.exact_by_context.tolist()],
    }
    if memory is None:
        return facts
    return {
        **facts,
        "effective_bits_key": memory.effective_bits_key,
        "effective_bits_value": memory.effective_bits_value,
        "total_bytes": memory.total_bytes,
        "full_precision_bytes": memory.full_precision_bytes,
    }


def find_cpu_name() -> str:
    """Return the name of the processor, as far as the system tells it."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.is_file() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


def load_demo() -> dict[str, Any]:
    """Return the figures of the latest measured demo."""
    results: dict[str, Any] = json.loads(DEMO_RESULTS.read_text())
    return results


def render_demo() -> str:
    """Return the whole table of the demo."""
    results = load_demo()
    plain_bytes = find_plain_bytes(results)
    rows = [render_demo_row(row, plain_bytes) for row in results["rows"]]
    header = ("cache", "bits", "exact answers", "tokens as in full precision", "bits held, K / V", "held", "smaller")
    given, versions = results["parameters"], results["versions"]
    held_length = results["context_length"] + given["questions"] * QUESTION_LENGTH
    note = (
        f"`kvq demo`: {given['contexts'] * given['questions']} questions about {given['contexts']} contexts of "
        f'{results["context_length"]} tokens, seed {given["seed"]}. "Held" is the size of the cache at the end, '
        f"{held_length:,} tokens of each context; the bits are those of quantized elements with metadata and "
        f"slack. In bfloat16 on one thread of {results['cpu']}; "
        f"{', '.join(f'{name} {versions[name]}' for name in DISTRIBUTIONS)}."
    )
    return f"{table(header, rows, right=(2, 3, 4, 5, 6))}\n\n{note}"


def render_demo_row(row: dict[str, Any], plain_bytes: int) -> Sequence[str]:
    rates = f"{row['exact_rate']:.1%}", f"{row['agreement']:.1%}"
    held = row.get("total_bytes", plain_bytes)
    keys, values = row.get("effective_bits_key", 16), row.get("effective_bits_value", 16)
    ratio = f"{plain_bytes / held:.2f}x"
    return row["backend"], row["bits"], *rates, f"{keys:.2f} / {values:.2f}", f"{held / 2**20:.2f} MiB", ratio


def find_plain_bytes(results: dict[str, Any]) -> int:
    """Return the bytes of the same tokens in full precision."""
    found: int = next(row["full_precision_bytes"] for row in results["rows"] if "full_precision_bytes" in row)
    return found
