"""Step and flush time against context: one picture of a whole run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvq.errors import EvaluationError
from kvq.evaluation.matplotlib_figure import make_figure

_COLOURS = {
    "full precision": ("#333333", "#777777", "#111111"),
    "transformers": ("#b0532b", "#d98b4a", "#8c2d19", "#e0a96d"),
    "kvq": ("#1f5fa8", "#2a9d8f", "#5e3c99", "#4aa3df", "#74a12e", "#8d6fc0"),
}
_MARKERS = {"full precision": "s", "transformers": "^", "kvq": "o"}
_LINES = {"materialized": "--", "eager": ":"}
"""Line style by the form in which a cache of ours is read; the default form has a solid line."""
_QUANTITIES = (("step_ms", "a step without a flush (ms)"), ("flush_ms", "a step with a flush (ms)"))


def draw_results(results: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Draw the results of one part into a PNG or SVG file, a row of axes for each dtype and batch.

    Args:
        results: as `describe_results` returns them.
        path: the file.
        title: text above the picture.

    Raises:
        EvaluationError: matplotlib is not installed, or nothing was measured.
    """
    measured = [facts for facts in results if facts["contenders"]]
    if not measured:
        raise EvaluationError("there is nothing to draw: nothing could be measured")
    groups = sorted({(facts["dtype"], facts["batch"]) for facts in measured})
    figure = make_figure(13, 1.2 + 4.6 * len(groups))
    rows = figure.subplots(len(groups), len(_QUANTITIES), squeeze=False)
    for axes, group in zip(rows, groups, strict=True):
        chosen = [facts for facts in measured if (facts["dtype"], facts["batch"]) == group]
        for one, (quantity, name) in zip(axes, _QUANTITIES, strict=True):
            _draw_axes(one, chosen, quantity, f"{group[0]}, batch {group[1]}: {name}")
    figure.suptitle(title)
    handles, labels = rows[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path, dpi=110)


def series(results: Sequence[Mapping[str, Any]], label: str, quantity: str) -> list[tuple[int, Mapping[str, float]]]:
    """Return length and spread of each result in which a contender has that quantity, shortest first."""
    found = [
        (facts["length"], one[quantity])
        for facts in results
        for one in facts["contenders"]
        if one["label"] == label and one[quantity] is not None
    ]
    return sorted(found, key=lambda point: point[0])


def _draw_axes(axes: Any, results: Sequence[Mapping[str, Any]], quantity: str, name: str) -> None:
    for label, colour, marker in _styles(results):
        points = series(results, label, quantity)
        if not points and quantity != _QUANTITIES[0][0]:
            continue
        lengths = [length for length, _ in points]
        medians = [spread["median"] for _, spread in points]
        below = [spread["median"] - spread["low"] for _, spread in points]
        above = [spread["high"] - spread["median"] for _, spread in points]
        form = label.rpartition(", ")[2]
        axes.errorbar(
            lengths,
            medians,
            yerr=[below, above],
            label=label,
            color=colour,
            marker=marker,
            fillstyle="none" if form in _LINES else "full",
            linestyle=_LINES.get(form, "-"),
            capsize=2,
        )
    lengths = sorted({facts["length"] for facts in results})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.minorticks_on()
    axes.tick_params(axis="x", which="minor", bottom=False)
    axes.set_xlabel("tokens of history")
    axes.set_title(name, fontsize=10)
    axes.grid(alpha=0.25)


def _styles(results: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """Return label, colour and marker of each contender; the forms of one of ours share a colour."""
    seen: dict[str, tuple[str, str, str]] = {}
    names: dict[str, list[str]] = {kind: [] for kind in _COLOURS}
    for facts in results:
        for one in facts["contenders"]:
            kind, stem = one["kind"], one["label"].partition(", ")[0] if one["kind"] == "kvq" else one["label"]
            if stem not in names[kind]:
                names[kind].append(stem)
            colours = _COLOURS[kind]
            colour = colours[names[kind].index(stem) % len(colours)]
            seen.setdefault(one["label"], (one["label"], colour, _MARKERS[kind]))
    return list(seen.values())
