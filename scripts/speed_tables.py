"""The tables of docs/speed.md, from the files that `kvq bench --out benchmarks/results/speed-*.json` has written."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from gpu_tables import load_gpu_runs, render_gpu_runs
from markdown_table import table
from target_table import COLUMNS as TARGET_COLUMNS
from target_table import class_target_rows, has_model, target_rows, wide_target_rows

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
BUFFER = "buffer, packed queries"
DYNAMIC = "DynamicCache"
SHORT_LENGTH = 1024
"""Tokens up to which a run counts as one of short contexts."""
PUBLISHED = (
    (
        "KIVI ([arXiv 2402.02750](https://arxiv.org/abs/2402.02750))",
        "2.35x to 3.47x the throughput, at up to 4x the batch, on a GPU",
    ),
    (
        "KVQuant ([arXiv 2401.18079](https://arxiv.org/abs/2401.18079))",
        "up to about 1.7x against fp16 matrix-vector products, for LLaMA-7B on a GPU",
    ),
)
"""What the authors say; nothing of it was measured here."""


def render_speed() -> str:
    """Return the results of `kvq bench` on a CPU and on a GPU, the targets, and the words of others."""
    parts = []
    for device, place in (("cpu", "a CPU"), ("cuda", "a GPU")):
        runs = load_runs(device)
        parts.append(f"**Measured here, on {place}.**")
        parts += render_gpu_runs() if device == "cuda" else ()
        widths = [run for run in runs if not has_model(run) and compares_widths(run)]
        plain = [run for run in runs if not has_model(run) and run not in widths]
        parts += [text for run in plain if not is_short(run) for text in render_speed_run(run)]
        parts += [text for run in plain if is_short(run) for text in render_short_run(run)]
        parts += [text for run in widths for text in render_width_run(run)]
        parts += [text for run in runs if has_model(run) for text in render_model_run(run)]
    runs = load_runs("cpu")
    wide, narrow = [run for run in runs if is_wide(run)], [run for run in runs if has_avx2_alone(run)]
    random_models = [run for run in wide if not has_model(run)]
    parts += ["Targets, with AVX-512:", table(TARGET_COLUMNS, target_rows(random_models, load_gpu_runs()))]
    parts += ["Targets as shares of the time of full precision, with AVX-512:"]
    with_steps = [*wide, _load("steps-smollm2.json")]
    parts.append(table(TARGET_COLUMNS, [*wide_target_rows(wide), *class_target_rows(with_steps)]))
    parts += ["The same, with AVX2:", table(TARGET_COLUMNS, class_target_rows(narrow, _load("first-call.json")))]
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
    deep = list_settings(run, "deep", batch=1)
    if deep:
        yield f"A model of {deep[0]['shape']['layers']} layers that compute little, batch 1, by tokens of history:"
        yield table(columns(deep), ratio_rows(deep), right=range(1, len(deep) + 1))
    layer = list_settings(run, "layer", batch=1)
    if layer:
        longest = max((facts for facts in layer if facts["dtype"] == "float32"), key=lambda facts: facts["length"])
        yield f"One layer at {longest['length']:,} tokens in float32: flush and memory ({run['memory_tool']})."
        yield table(FLUSH_COLUMNS, flush_rows(longest), right=range(1, len(FLUSH_COLUMNS)))
    yield from render_prompts(run)


def render_short_run(run: dict[str, Any]) -> Iterable[str]:
    """Yield the tables of a run at short contexts against `DynamicCache`: the whole model, and prompts."""
    settings = [facts for facts in run["model"] if facts["contenders"]]
    if len(settings) > 1:
        yield f"The whole model at short contexts; {describe_machine(run)}"
        yield table(short_columns(settings), short_rows(settings), right=range(1, len(settings) + 1))
    yield from render_prompts(run)


def render_width_run(run: dict[str, Any]) -> Iterable[str]:
    """Yield the table of a run that compares numbers of bits."""
    settings = list_settings(run, "layer", batch=1)
    yield f"One layer, batch 1, by width and tokens of history; {describe_machine(run)}"
    yield table(columns(settings), ratio_rows(settings), right=range(1, len(settings) + 1))


def render_model_run(run: dict[str, Any]) -> Iterable[str]:
    """Yield the tables of a run of one model against `DynamicCache`, and of its prompts."""
    settings = list_settings(run, "model", batch=1)
    yield f"{run['options']['model']} as a whole, {settings[0]['dtype']}; {describe_machine(run)}"
    yield table(short_columns(settings), short_rows(settings), right=range(1, len(settings) + 1))
    yield from render_prompts(run)


def render_prompts(run: dict[str, Any]) -> Iterable[str]:
    """Yield a table for each length of prompt."""
    for facts in run.get("first_token", ()):
        yield f"A prompt of {facts['length']:,} tokens, batch 1, {facts['dtype']}: time to its first tokens."
        yield table(PROMPT_COLUMNS, prompt_rows(facts), right=range(1, len(PROMPT_COLUMNS)))


def load_runs(device: str) -> list[dict[str, Any]]:
    """Return the runs that were made on a type of device, those with AVX-512 first, in the order of their files.

    Runs with many layers leave out single layers, which another run has beside more caches.
    """
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("speed-*.json"))]
    found = [{**run, "layer": []} if run.get("deep") else run for run in runs if run["machine"]["device"] == device]
    return sorted(found, key=lambda run: not is_wide(run))


def _load(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return found


def describe_machine(run: dict[str, Any]) -> str:
    """Return the sentence above a table."""
    machine, versions = run["machine"], run["machine"]["versions"]
    instructions = f" with {machine['instructions']}" if "instructions" in machine else ""
    processor = f"{machine['threads']} threads of {machine['cpu']}{instructions}"
    where = machine["gpu"]["name"] if "gpu" in machine else processor
    return (
        f"{where}; torch {versions['torch']}, transformers {versions['transformers']}; medians of "
        f"{run['options']['rounds']} rounds, each ratio with the 95 % interval of its median."
    )


def list_settings(run: dict[str, Any], part: str, batch: int) -> list[dict[str, Any]]:
    """Return the measured results of a part at one batch size, by dtype and length."""
    found = [facts for facts in run.get(part, ()) if facts["batch"] == batch and facts["contenders"]]
    return sorted(found, key=lambda facts: (facts["dtype"] != "float32", facts["length"]))


def is_short(run: dict[str, Any]) -> bool:
    """Return whether a run is about contexts so short that quantizing has hardly begun."""
    return max(facts["length"] for facts in run.get("model") or run["layer"]) <= SHORT_LENGTH


def is_wide(run: dict[str, Any]) -> bool:
    """Return whether a run is of a processor with AVX-512."""
    return run["machine"].get("instructions", "").startswith("AVX512")


def has_avx2_alone(run: dict[str, Any]) -> bool:
    """Return whether a run is of a processor with AVX2 and no AVX-512."""
    return bool(run["machine"].get("instructions") == "AVX2")


def compares_widths(run: dict[str, Any]) -> bool:
    """Return whether a run is of one backend at several numbers of bits."""
    widths = {(config["backend"], config["nbits_k"]) for config in run["options"]["configs"].values()}
    return len(widths) > len({backend for backend, _ in widths})


def short_columns(settings: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """Return the header of the table of short contexts."""
    names = (f"{facts['length']:,}, batch {facts['batch']}" for facts in settings)
    return ("time of a step, against DynamicCache", *names)


def short_rows(settings: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Return a row for each contender: its time relative to that of `DynamicCache`, under each setting."""
    labels = list(dict.fromkeys(one["label"] for facts in settings for one in facts["contenders"]))
    by_setting = [{one["label"]: one for one in facts["contenders"]} for facts in settings]
    return [(label, *(_to_dynamic(found[label]) for found in by_setting)) for label in labels]


def _to_dynamic(one: dict[str, Any]) -> str:
    ratio = one["to_dynamic"]
    if one["label"] == DYNAMIC:
        return f"1 ({_milliseconds(one['step_ms']['median'])} ms)"
    return f"{ratio['median']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})" if ratio else "-"


def prompt_rows(facts: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return what the time from a prompt to its first and second token is with each contender."""
    return [
        (
            one["label"],
            f"{one['cold_ms']['first'] / 1e3:.2f}",
            f"{one['warm_ms']['first']['median'] / 1e3:.2f}",
            _first_to_dynamic(one),
            _milliseconds(one["warm_ms"]["second"]["median"]),
        )
        for one in facts["contenders"]
        if one["warm_ms"]
    ]


PROMPT_COLUMNS = ("cache", "first token cold, s", "warm, s", "against DynamicCache", "second token warm, ms")


def _first_to_dynamic(one: dict[str, Any]) -> str:
    ratio = one["first_to_dynamic"]
    if one["label"] == DYNAMIC or ratio is None:
        return "1" if one["label"] == DYNAMIC else "-"
    return f"{ratio['median']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})"


def columns(settings: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """Return the header of a table of ratios."""
    names = (f"{facts['dtype']}, {facts['length']:,}" for facts in settings)
    return ("time of a step, against the buffer", *names)


def ratio_rows(settings: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Return a row for each contender: its time relative to the buffer's, under each setting."""
    labels = list(dict.fromkeys(one["label"] for facts in settings for one in facts["contenders"]))
    by_setting = [{one["label"]: one for one in facts["contenders"]} for facts in settings]
    return [(label, *(_ratio(found.get(label)) for found in by_setting)) for label in labels]


def _ratio(one: dict[str, Any] | None) -> str:
    if one is None or one["step_ms"] is None:
        return "-"
    if one["label"] == BUFFER:
        return f"1 ({_milliseconds(one['step_ms']['median'])} ms)"
    ratio = one["to_buffer"]
    text = f"{ratio['median']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})"
    return f"{text} tie" if one["is_tie"] else text


def flush_rows(facts: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return what else a step takes under one setting: flush, its share of every step, transient and held memory."""
    return [
        (
            one["label"],
            _milliseconds(one["step_ms"]["median"]),
            _milliseconds(one["flush_ms"]["median"]) if one["flush_ms"] else "-",
            _milliseconds(one["amortized_ms"]),
            f"{one['transient_bytes'] / 2**20:.2f} MiB",
            f"{one['held_bytes'] / 2**20:.2f} MiB",
        )
        for one in facts["contenders"]
        if one["step_ms"]
    ]


FLUSH_COLUMNS = ("cache", "step, ms", "step with a flush, ms", "with its share, ms", "transient", "held")


def _milliseconds(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"
