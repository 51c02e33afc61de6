"""Regenerate what README.md takes from the code: the blocks between `<!-- begin: NAME -->` and `<!-- end: NAME -->`.

    python scripts/update_readme.py             # write README.md
    python scripts/update_readme.py --check     # exit code 1 if it is not up to date
    python scripts/update_readme.py --measure   # run the demo first

The block `demo` comes from benchmarks/results/demo.json, which `--measure` writes and which is committed, since the run
takes a minute or two; `quality` comes from what scripts/measure_quality.py has written, `speed` from what `make bench`
has. All other blocks are made anew each time.
"""

from __future__ import annotations

import argparse
import inspect
import json
import platform
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from markdown_table import table
from pydantic.fields import FieldInfo
from quality_tables import render_choices, render_quality
from speed_tables import (
    FLUSH_COLUMNS,
    PROMPT_COLUMNS,
    PUBLISHED,
    columns,
    describe_machine,
    flush_rows,
    is_short,
    list_settings,
    load_runs,
    prompt_rows,
    ratio_rows,
    short_columns,
    short_rows,
)
from target_table import COLUMNS as TARGET_COLUMNS
from target_table import target_rows

from kvq import KVQ, KVQCacheConfig, attach, available_backends
from kvq.cli.demo import demo as demo_command
from kvq.evaluation.demo import DemoRow, list_cases, run_cases
from kvq.evaluation.embedded_model import load_embedded_model
from kvq.evaluation.recall import QUESTION_LENGTH, sample_recall_batch

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
DEMO_RESULTS = ROOT / "benchmarks" / "results" / "demo.json"
CONFIGS = ROOT / "examples" / "configs"

DISTRIBUTIONS = ("torch", "transformers", "optimum-quanto", "hqq")
"""What the figures of the demo depend on, besides kvq."""

LENGTHS = (200, 500, 1000, 4096, 16384)
"""Tokens at which the block `lengths` measures."""


def main() -> None:
    arguments = parse_arguments()
    if arguments.measure:
        DEMO_RESULTS.parent.mkdir(parents=True, exist_ok=True)
        DEMO_RESULTS.write_text(json.dumps(measure_demo(), indent=2) + "\n")
    present = README.read_text(encoding="utf-8")
    wanted = update(present)
    if arguments.check and present != wanted:
        sys.exit("README.md is not up to date: run scripts/update_readme.py")
    if present != wanted:
        README.write_text(wanted, encoding="utf-8")


def update(text: str) -> str:
    """Return `text` with every block made anew.

    Raises:
        ValueError: a block is unknown or has no end.
    """
    begun = re.findall(r"<!-- begin: (.*?) -->", text)
    for name in begun:
        if name not in BLOCKS:
            raise ValueError(f"README.md has a block {name!r}; known: {', '.join(BLOCKS)}")
        marked = re.compile(f"(<!-- begin: {name} -->\n).*?(<!-- end: {name} -->)", re.DOTALL)
        content = BLOCKS[name]()
        text, count = marked.subn(lambda found, content=content: f"{found[1]}{content}\n{found[2]}", text)
        if count != 1:
            raise ValueError(f"README.md needs the block {name!r} once, with its end")
    return text


def measure_demo() -> dict[str, Any]:
    """Run what `kvq demo` runs by default and return its figures, and what they were measured with."""
    defaults = {name: field.default for name, field in inspect.signature(demo_command).parameters.items()}
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


def own_backends() -> list[Any]:
    """Return the backends of this distribution, whatever else is installed."""
    return [backend for backend in available_backends(load=True) if backend.origin == "kvq"]


def render_demo() -> str:
    """Return the figures of the latest measured demo."""
    results = json.loads(DEMO_RESULTS.read_text())
    plain_bytes = next(row["full_precision_bytes"] for row in results["rows"] if "full_precision_bytes" in row)
    rows = [render_demo_row(row, plain_bytes) for row in results["rows"]]
    header = ("cache", "bits", "exact answers", "tokens as in full precision", "bits held, K / V", "held", "smaller")
    given, versions = results["parameters"], results["versions"]
    held_length = results["context_length"] + given["questions"] * QUESTION_LENGTH
    note = (
        f"`kvq demo`: {given['contexts'] * given['questions']} questions about {given['contexts']} contexts of "
        f"{results['context_length']} tokens, seed {given['seed']}; held is what the cache holds at the end, "
        f"{held_length:,} tokens of each context, and the bits are those of quantized elements with metadata and "
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


def render_lengths() -> str:
    """Return how much smaller the caches of `examples/configs` are, by length."""
    rows = []
    for path in sorted(CONFIGS.glob("*.yaml"), reverse=True):
        ratios = [f"{measure_compression(path, length):.2f}x" for length in LENGTHS]
        rows.append((f"`{path.stem}`", *ratios))
    header = ("configuration", *(f"{length:,} tokens" for length in LENGTHS))
    return table(header, rows, right=range(1, len(header)))


def measure_compression(config: Path, length: int) -> float:
    """Return how many times smaller `length` tokens are than in bfloat16, at head_dim 128."""
    states = torch.randn(1, 1, length, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    cache = KVQ(config)
    cache.update(states, states, 0)
    return cache.memory().compression


def render_speed() -> str:
    """Return what `kvq bench` measured: on a CPU here, on a GPU here; and what others published."""
    parts = []
    for device, place in (("cpu", "a CPU"), ("cuda", "a GPU")):
        runs = load_runs(device)
        parts.append(f"**Measured here, on {place}.**" + ("" if runs else " Nothing yet."))
        parts += [text for run in runs if not is_short(run) for text in render_speed_run(run)]
        parts += [text for run in runs if is_short(run) for text in render_short_run(run)]
    parts += ["What is aimed at, all on the CPU above:", table(TARGET_COLUMNS, target_rows(load_runs("cpu")))]
    parts.append("**Published by others**, not measured here:")
    parts.append(table(("method", "its authors' words on speed"), PUBLISHED))
    return "\n\n".join(parts)


def render_speed_run(run: dict[str, Any]) -> Iterable[str]:
    """Yield the texts and tables of one run: one layer, the whole model, and the cost of a flush."""
    yield describe_machine(run)
    for part, name in (("layer", "One layer"), ("model", "The whole model")):
        settings = list_settings(run, part, batch=1)
        if settings:
            yield f"{name}, batch 1, by tokens of history:"
            yield table(columns(settings), ratio_rows(settings), right=range(1, len(settings) + 1))
    layer = list_settings(run, "layer", batch=1)
    if layer:
        longest = max((facts for facts in layer if facts["dtype"] == "float32"), key=lambda facts: facts["length"])
        yield f"One layer at {longest['length']:,} tokens in float32: flush and memory ({run['memory_tool']})."
        yield table(FLUSH_COLUMNS, flush_rows(longest), right=range(1, len(FLUSH_COLUMNS)))


def render_short_run(run: dict[str, Any]) -> Iterable[str]:
    """Yield the tables of a run at short contexts against `DynamicCache`: the whole model, and prompts."""
    settings = [facts for facts in run["model"] if facts["contenders"]]
    if len(settings) > 1:
        yield f"The whole model at short contexts; {describe_machine(run)}"
        yield table(short_columns(settings), short_rows(settings), right=range(1, len(settings) + 1))
    for facts in run.get("first_token", ()):
        yield f"A prompt of {facts['length']:,} tokens, batch 1, {facts['dtype']}: time to its first tokens."
        yield table(PROMPT_COLUMNS, prompt_rows(facts), right=range(1, len(PROMPT_COLUMNS)))


def render_memory() -> str:
    """Return what `print(cache.memory())` prints after the embedded model has read a context and generated."""
    model, _ = load_embedded_model()
    batch = sample_recall_batch(1, 160, 1, generator=torch.Generator().manual_seed(1))
    with attach(model, layers={"first:1": {"nbits_v": 4}}) as attachment:
        model.generate(batch.context, attention_mask=torch.ones_like(batch.context), max_new_tokens=60)
    lines = [line.rstrip() for line in str(attachment.cache.memory()).splitlines()]
    return "\n".join(["```text", *lines, "```"])


def render_configuration() -> str:
    """Return the fields of the configuration, without the version of its format."""
    rows = [
        (f"`{name}`", f"`{render_default(field)}`", field.description or "")
        for name, field in KVQCacheConfig.model_fields.items()
        if name != "version"
    ]
    return table(("field", "default", "meaning"), rows)


def render_default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    return str(value) if isinstance(value, str) else repr(value)


def render_backends() -> str:
    """Return the backends of this distribution."""
    rows = [
        (
            f"`{backend.name}`",
            ", ".join(f"{bits:g}" for bits in backend.spec.capabilities.nbits),
            ", ".join(f"`{word}`" for word in backend.spec.capabilities.granularities),
            backend.spec.summary,
        )
        for backend in own_backends()
    ]
    return table(("name", "bits", "granularities", "summary"), rows)


BLOCKS: dict[str, Callable[[], str]] = {
    "demo": render_demo,
    "lengths": render_lengths,
    "quality": render_quality,
    "choices": render_choices,
    "speed": render_speed,
    "memory": render_memory,
    "configuration": render_configuration,
    "backends": render_backends,
}
"""What makes each block."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Regenerate the tables of README.md.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if it is not up to date")
    parser.add_argument("--measure", action="store_true", help="run the demo first")
    return parser.parse_args()


if __name__ == "__main__":
    main()
