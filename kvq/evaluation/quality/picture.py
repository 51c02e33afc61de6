"""Quality against size: one picture of all records, with the Pareto front marked."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kvq.errors import EvaluationError
from kvq.evaluation.matplotlib_figure import make_figure
from kvq.evaluation.quality.record import QualityRecord

_OURS, _PEER, _FRONT = "#1f5fa8", "#b0532b", "#1f5fa8"
_LINES = 36
"""Lines of labels that fit beside the points, about."""
_LEAST = 1e-12
"""Drawn in place of a divergence of 0 on the logarithmic axis."""


def draw_records(records: Sequence[QualityRecord], path: Path, title: str) -> None:
    """Draw KL divergence against effective bits and against held bytes into a PNG or SVG file.

    Raises:
        EvaluationError: matplotlib is not installed, or nothing was measured.
    """
    shown = [record for record in records if not record.failure]
    if not shown:
        raise EvaluationError("there is nothing to draw: no cache could be measured")
    figure = make_figure(13, 6.5)
    left, right = figure.subplots(1, 2, sharey=True)
    _draw_axes(left, shown, lambda record: record.effective_bits, "bits held for each element, window included")
    _draw_axes(right, shown, lambda record: record.held_bytes / 2**20, "MiB held for one sequence")
    left.set_ylabel("KL divergence of the next token from full precision (nats)")
    figure.suptitle(title)
    figure.legend(handles=_legend(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=120)


def pareto_front(records: Sequence[QualityRecord], size: Callable[[QualityRecord], float]) -> list[QualityRecord]:
    """Return the records that no other one beats in size and divergence at once, smallest first."""
    front: list[QualityRecord] = []
    for record in sorted(records, key=lambda one: (size(one), one.kl.mean)):
        if not front or record.kl.mean < front[-1].kl.mean:
            front.append(record)
    return front


def _draw_axes(axes: Any, records: Sequence[QualityRecord], size: Callable[[QualityRecord], float], name: str) -> None:
    front = pareto_front(records, size)
    axes.plot([size(one) for one in front], [one.kl.mean for one in front], color=_FRONT, alpha=0.35, linewidth=6)
    for record in records:
        spread = record.kl.half_width if record.kl.half_width == record.kl.half_width else 0
        low = min(spread, 0.9 * record.kl.mean)  # on a logarithmic axis nothing may reach zero
        axes.errorbar(
            size(record),
            record.kl.mean,
            yerr=[[low], [spread]],
            marker="s" if record.is_peer else "o",
            color=_PEER if record.is_peer else _OURS,
            capsize=2,
        )
        _draw_tail(axes, size(record), record)
    _label_points(axes, records, size)
    axes.set_yscale("log")
    axes.set_xlabel(name)
    axes.margins(x=0.18, y=0.08)
    axes.grid(alpha=0.25)


def _draw_tail(axes: Any, place: float, record: QualityRecord) -> None:
    """Draw the 99th and the 99.9th percentile above the mean, where they were measured."""
    color = _PEER if record.is_peer else _OURS
    tail = [number for number in (record.kl_p99, record.kl_p999) if math.isfinite(number)]
    if tail:
        axes.plot([place] * len(tail), tail, color=color, alpha=0.35, marker="_", linewidth=1)


def _label_points(axes: Any, records: Sequence[QualityRecord], size: Callable[[QualityRecord], float]) -> None:
    """Write each name beside its point, on the side that has room, above the names that are already there."""
    sizes = [size(record) for record in records]
    heights = [math.log(max(record.kl.mean, _LEAST)) for record in records]
    right, width = min(sizes) + 0.9 * (max(sizes) - min(sizes)), max(sizes) - min(sizes) or 1
    written: list[tuple[float, float]] = []
    for height, place, record in sorted(zip(heights, sizes, records, strict=True), key=lambda entry: entry[:2]):
        line = (height - min(heights)) / (max(heights) - min(heights) or 1) * _LINES
        while any(abs(place - x) < 0.3 * width and abs(line - y) < 1 for x, y in written):
            line += 0.25
        written.append((place, line))
        raised = line - (height - min(heights)) / (max(heights) - min(heights) or 1) * _LINES
        axes.annotate(
            record.label,
            (place, record.kl.mean),
            xytext=(-7 if place > right else 7, 4 + 11 * raised),
            textcoords="offset points",
            ha="right" if place > right else "left",
            fontsize=8,
        )


def _legend() -> list[Any]:
    from matplotlib.lines import Line2D

    return [
        Line2D([], [], color=_OURS, marker="o", linestyle="", label="kvq"),
        Line2D([], [], color=_PEER, marker="s", linestyle="", label="transformers' QuantizedCache"),
        Line2D([], [], color=_FRONT, alpha=0.35, linewidth=6, label="Pareto front of the means"),
        Line2D([], [], color="gray", alpha=0.5, marker="_", linewidth=1, label="99 % and 99.9 % of the tokens"),
    ]
