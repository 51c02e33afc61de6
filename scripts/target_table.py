"""The speed targets of kvq beside the results of `kvq bench`; see `speed_tables`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gpu_tables import speedups

BUFFER = "buffer, packed queries"
DYNAMIC_PACKED = "DynamicCache, packed queries"
PEER = "transformers quanto 4"
FUSED = "kvq native 4, fused"
EAGER = "kvq hqq 4, eager"
"""It is measured with the first backend by name."""
DEFAULTS = (FUSED, "kvq quanto 4, fused")
"""The caches that targets which name backends are compared with."""
LENGTHS = (8192, 32768)
DTYPES = {"bfloat16": "bf16", "float32": "fp32"}

HQQ = "kvq hqq 4, fused"
TWO_BITS, FOUR_BITS = "kvq 2bit, fused", "kvq 4bit, fused"
MODEL_LENGTHS = (256, 4096, 7680)
"""The longest that leaves room for the steps in a model of 8,192 tokens."""
COLUMNS = ("on 2 threads", "required", "goal", "measured")
LEFT_OUT = "not measured"

Facts = Mapping[str, Any]


def target_rows(runs: Sequence[Facts], gpu_runs: Sequence[Facts] = ()) -> list[tuple[str, str, str, str]]:
    """Return a row for each target; one that the runs do not have says "not measured"."""
    return [
        ("one layer against the buffer, bf16 / fp32", "1.45x / 2x faster", "2.5x / 4x", _join(_layers(runs, BUFFER))),
        (f"one layer against {PEER}", "18x", "30x", _join(_layers(runs, PEER))),
        (f"the eager reference against {PEER}", "3x", "6x", _join(_layers(runs, PEER, EAGER))),
        ("transient memory of a step at 32,768 tokens", "8 MiB", "1 MiB", _join(_transients(runs))),
        (f"a model of 4 layers at 8,192 against {DYNAMIC_PACKED}", "faster", "1.7x", _join(_models(runs))),
        ("512 steps in a row: 99th percentile over median", "at most 2", "", _join(_steps(runs))),
        ("a step at 64 to 1,024 tokens, batch 1 and 8, against DynamicCache", "at most 1.15x", "", _join(_short(runs))),
        ("512 tokens of a prompt behind the history", "at most 1.3x", "", _join(_forwards(runs, is_draft=False))),
        ("5 tokens of a draft behind the history", "at most 1.3x", "", _join(_forwards(runs, is_draft=True))),
        ("Triton on Hopper against bf16 SDPA", "1.3x", "2x", _join(_gpu_speedups(gpu_runs))),
    ]


def class_target_rows(runs: Sequence[Facts], first_call: Facts | None = None) -> list[tuple[str, str, str, str]]:
    """Return a row for each target that holds on every class of processor: times as shares of full precision's.

    Args:
        runs: results of `kvq bench` on one class.
        first_call: result of `scripts/first_call.py`, or None where it was not run.
    """
    layers, models = [run for run in runs if not has_model(run)], [run for run in runs if has_model(run)]
    first = LEFT_OUT if first_call is None else f"{first_call['median_ms']['first step']:.0f} ms"
    return [
        ("one layer at 8,192 tokens, of the buffer's time: bf16, fp32", "0.40, 0.28", "0.28, 0.18",
         _join(_shares(_settings(layers, "layer", LENGTHS[:1]), "to_buffer"))),
        ("SmolLM2 in fp32 at 256, 4,096 and 7,680 tokens, of DynamicCache's time", "1.05, 0.65, 0.5",
         "1.0, 0.55, 0.4", _join(_shares(_settings(models, "model", MODEL_LENGTHS), "to_dynamic"))),
        ("512 steps in a row, hqq: 99th percentile over median", "2", "1.5",
         _join([*_tails(layers, ""), *_tails(models, " (SmolLM2)")])),
        ("a step with a flush over one without, native, one layer at 8,192", "2", "1.5",
         _join(_flushes(_settings(layers, "layer", LENGTHS[:1])))),
        ("a prompt, of DynamicCache's time", "1.05", "", _join(_all_prompts(runs))),
        ("first step of a process, code on disk", "50 ms", "20 ms", first),
    ]  # fmt: skip


def wide_target_rows(runs: Sequence[Facts]) -> list[tuple[str, str, str, str]]:
    """Return a row for each target that is for AVX-512 only."""
    layers = [run for run in runs if not has_model(run)]
    return [
        ("one layer at 32,768 tokens, of the buffer's time: bf16, fp32", "0.22, 0.15", "0.15, 0.10",
         _join(_shares(_settings(layers, "layer", LENGTHS[1:]), "to_buffer"))),
        ("2 bits at 32,768 tokens, of the time of 4 bits", "0.75", "0.6",
         _join(_two_bits(_settings(layers, "layer", LENGTHS[1:])))),
    ]  # fmt: skip


def has_model(run: Facts) -> bool:
    """Return whether a run is of a model of the user's."""
    return bool(run["options"].get("model"))


def _shares(settings: Iterable[Facts], name: str) -> Iterable[str]:
    for facts in settings:
        one = _find(facts, FUSED)
        if one and one[name]:
            yield f"{one[name]['median']:.2f} ({DTYPES[facts['dtype']]} at {facts['length']:,})"


def _two_bits(settings: Iterable[Facts]) -> Iterable[str]:
    for facts in settings:
        two, four = _find(facts, TWO_BITS), _find(facts, FOUR_BITS)
        if two and four and two["step_ms"] and four["step_ms"]:
            yield f"{two['step_ms']['median'] / four['step_ms']['median']:.2f} ({DTYPES[facts['dtype']]})"


def _all_prompts(runs: Sequence[Facts]) -> Iterable[str]:
    for run in runs:
        for facts in run.get("first_token", ()):
            one = _find(facts, FUSED)
            if one and one["first_to_dynamic"]:
                model = "SmolLM2, " if has_model(run) else ""
                yield f"{one['first_to_dynamic']['median']:.2f} ({model}{DTYPES[facts['dtype']]}, {facts['length']:,})"


def _flushes(settings: Iterable[Facts]) -> Iterable[str]:
    for facts in settings:
        one = _find(facts, FUSED)
        if one and one["flush_ms"]:
            yield f"{one['flush_ms']['median'] / one['step_ms']['median']:.2f} ({DTYPES[facts['dtype']]})"


def _tails(runs: Sequence[Facts], suffix: str) -> Iterable[str]:
    return (f"{one['p99_to_median']:.2f}{suffix}" for facts in _all_steps(runs) if (one := _find(facts, HQQ)))


def _all_steps(runs: Sequence[Facts]) -> Iterable[Facts]:
    return _settings(runs, "steps", {facts["length"] for run in runs for facts in run.get("steps", ())})


def _gpu_speedups(runs: Sequence[Facts]) -> Iterable[str]:
    for run in runs:
        ratios = speedups(run)
        yield f"{min(ratios):.2f}x to {max(ratios):.2f}x ({run['device'].partition(',')[0]})"


def _settings(runs: Sequence[Facts], part: str, lengths: Iterable[int] = LENGTHS) -> Iterable[Facts]:
    """Yield the results of a part at batch 1 and some lengths, bfloat16 first."""
    found = [facts for run in runs for facts in run.get(part, ()) if facts["batch"] == 1]
    chosen = [facts for facts in found if facts["length"] in lengths and facts["contenders"]]
    return sorted(chosen, key=lambda facts: (facts["dtype"] != "bfloat16", facts["length"]))


def _find(facts: Facts, label: str) -> Facts | None:
    return next((one for one in facts["contenders"] if one["label"] == label and not one["failure"]), None)


def _layers(runs: Sequence[Facts], other: str, ours: str = FUSED) -> Iterable[str]:
    return _times_faster(_settings(runs, "layer"), ours, other)


def _models(runs: Sequence[Facts]) -> Iterable[str]:
    return _times_faster(_settings(runs, "model", LENGTHS[:1]), FUSED, DYNAMIC_PACKED)


def _times_faster(settings: Iterable[Facts], ours: str, theirs: str) -> Iterable[str]:
    for facts in settings:
        one, other = _find(facts, ours), _find(facts, theirs)
        if one and other and one["step_ms"] and other["step_ms"]:
            faster = other["step_ms"]["median"] / one["step_ms"]["median"]
            yield f"{DTYPES[facts['dtype']]} {faster:.3g}x at {facts['length']:,}"


def _transients(runs: Sequence[Facts]) -> Iterable[str]:
    for facts in _settings(runs, "layer", LENGTHS[1:]):
        one = _find(facts, FUSED)
        if one:
            yield f"{DTYPES[facts['dtype']]} {one['transient_bytes'] / 2**20:.2f} MiB"


def _forwards(runs: Sequence[Facts], *, is_draft: bool) -> Iterable[str]:
    for facts in _settings(runs, "forwards", LENGTHS):
        if bool(facts["rejected"]) is is_draft:
            yield from (f"{figure} at {facts['length']:,}" for figure in _ratios(facts, "to_dynamic"))


def _ratios(facts: Facts, name: str) -> Iterable[str]:
    for label in DEFAULTS:
        one = _find(facts, label)
        if one and one[name]:
            yield f"{_backend(label)} {one[name]['median']:.2f}x"


def _steps(runs: Sequence[Facts]) -> Iterable[str]:
    settings = list(_all_steps(runs))
    for label in DEFAULTS:
        spreads = [one["p99_to_median"] for facts in settings if (one := _find(facts, label))]
        if spreads:
            yield f"{_backend(label)} {min(spreads):.2f} to {max(spreads):.2f}"


def _short(runs: Sequence[Facts]) -> Iterable[str]:
    settings = [facts for run in runs for facts in run.get("model", ()) if facts["length"] <= 1024]
    for label in DEFAULTS:
        found = [one for facts in settings if (one := _find(facts, label)) and one["to_dynamic"]]
        if found:
            medians = [one["to_dynamic"]["median"] for one in found]
            yield f"{_backend(label)} {min(medians):.2f}x to {max(medians):.2f}x"


def _backend(label: str) -> str:
    return label.split()[1]


def _join(figures: Iterable[str]) -> str:
    return ", ".join(figures) or LEFT_OUT
