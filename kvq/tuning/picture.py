"""A picture of the answer: what each layer and side costs alone, what each one got, and the front."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from kvq.config.field_types import SIDES
from kvq.evaluation.matplotlib_figure import make_figure
from kvq.tuning.answer import TunedCache, name_uniform
from kvq.tuning.side_setting import SideSetting

_LEAST = 1e-12
"""Drawn in place of a divergence of 0 on a logarithmic scale."""


def draw_answer(answer: TunedCache, path: Path, title: str) -> None:
    """Draw heat maps of layers by sides, and divergence against size, into a PNG, SVG or PDF file.

    Raises:
        EvaluationError: matplotlib is not installed.
    """
    figure = make_figure(13, 7.5)
    upper, lower = np.asarray(figure.subfigures(2, 1, height_ratios=(1, 1.25)))
    top, bottom = upper.subplots(2, 1, sharex=True)
    shown = _middle_setting(answer)
    costs = _costs_of(answer, shown)
    _draw_map(
        upper,
        top,
        np.log10(np.maximum(costs, _LEAST)),
        f"KL of each side alone at {shown.nbits:g} bits, log10",
        "{:.1f}",
    )
    _draw_map(upper, bottom, _bits_of(answer), "bits chosen", "{:g}")
    bottom.set_xticks(range(len(answer.plan.space.groups)), [_name(group) for group in answer.plan.space.groups])
    bottom.set_xlabel("layer")
    _draw_front(lower.subplots(), answer)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def _middle_setting(answer: TunedCache) -> SideSetting:
    """Return the setting that the map shows: at 3 bits where there is one, else the one with the fewest."""
    settings = sorted(answer.plan.space.keys, key=lambda one: one.nbits)
    return next((one for one in settings if one.nbits == 3), settings[0])


def _costs_of(answer: TunedCache, setting: SideSetting) -> Any:
    groups = answer.plan.space.groups
    return np.array([[answer.single_effect(group, side, setting) for group in groups] for side in SIDES])


def _bits_of(answer: TunedCache) -> Any:
    pairs = [answer.tuned.assignment[group[0]] for group in answer.plan.space.groups]
    return np.array(
        [[one.nbits if one else np.nan for one in row] for row in zip(*((p.key, p.value) for p in pairs), strict=True)]
    )


def _draw_map(figure: Any, axes: Any, numbers: Any, label: str, form: str) -> None:
    image = axes.imshow(numbers, aspect="auto", cmap="viridis")
    axes.set_yticks((0, 1), ("keys", "values"))
    middle = (np.nanmin(numbers) + np.nanmax(numbers)) / 2
    for (row, column), number in np.ndenumerate(numbers):
        color = "black" if number > middle else "white"
        axes.text(column, row, form.format(number), ha="center", va="center", fontsize=7, color=color)
    axes.set_title(label, loc="left", fontsize=10)
    figure.colorbar(image, ax=axes, pad=0.01)


def _draw_front(axes: Any, answer: TunedCache) -> None:
    sizes = [point.bits for point in answer.front]
    axes.plot(sizes, [max(point.measured, _LEAST) for point in answer.front], marker="o", label="front, measured")
    predicted = [max(point.predicted, _LEAST) for point in answer.front]
    axes.plot(sizes, predicted, linestyle=":", label="front, predicted by the sum of single effects")
    named = [(answer.tuned, "*", "tuned"), *((one, "s", f"uniform {name_uniform(one)}") for one in answer.uniforms)]
    for point, marker, label in named:
        axes.plot([point.bits], [max(point.measured, _LEAST)], marker=marker, markersize=11, linestyle="", label=label)
    axes.set_yscale("log")
    axes.set_xlabel(f"bits held for each element at {answer.plan.goal.context:,} tokens")
    axes.set_ylabel(f"KL on {answer.plan.text.name}")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)


def _name(layers: tuple[int, ...]) -> str:
    return str(layers[0]) if len(layers) == 1 else f"{layers[0]}-{layers[-1]}"
