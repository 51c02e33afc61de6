"""Draw the two pictures of README.md from committed results: quality against size, time of a step against context.

    python scripts/draw_front_page.py

Each file names the digest of the figures in it, by which a test finds a picture that is older than its results.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preset_tables import FRONT_RESULT, load_result
from speed_tables import BUFFER, DYNAMIC, list_settings, load_runs

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
SIZE = (7.2, 3.6)
"""Inches."""
OURS, THEIRS, PLAIN, MUTED = "#1f5fa8", "#b4502c", "#222222", "#8a8a8a"

STEP_CURVES = {
    "transformers quanto 4": (THEIRS, "transformers, quanto 4 bit"),
    DYNAMIC: (MUTED, "DynamicCache"),
    BUFFER: (PLAIN, "full precision, fastest in torch"),
    "kvq quanto 4, fused": (OURS, "kvq, quanto 4 bit"),
}
"""The curves of the picture of speed, from above: a color and a label each."""
STEP_DTYPE = "bfloat16"

Points = Mapping[str, Sequence[tuple[float, float]]]


@dataclass(frozen=True)
class Picture:
    """A picture and the figures in it.

    Attributes:
        name: its file below `docs/images`, without the ending.
        collect: returns the points by label.
        draw: draws them on the axes of matplotlib.
    """

    name: str
    collect: Callable[[], Points]
    draw: Callable[[object, Points], None]

    @property
    def path(self) -> Path:
        """The file."""
        return IMAGES / f"{self.name}.svg"

    @property
    def digest(self) -> str:
        """The digest of the figures."""
        return hashlib.sha256(json.dumps(self.collect(), sort_keys=True).encode()).hexdigest()[:16]


def collect_quality() -> Points:
    """Return (times smaller, KL divergence) of each cache on the real model, the one of the table in README.md."""
    records = [record for record in load_result(FRONT_RESULT)["records"] if not record["failure"]]
    return {record["label"]: [(record["compression"], record["kl"]["mean"])] for record in records}


def collect_steps() -> Points:
    """Return (tokens, milliseconds) of one layer at batch 1, by cache, of the first run that has all of them."""
    run = next(run for run in load_runs("cpu") if STEP_CURVES.keys() <= _labels(run))
    settings = [facts for facts in list_settings(run, "layer", batch=1) if facts["dtype"] == STEP_DTYPE]
    points: dict[str, list[tuple[float, float]]] = {label: [] for label in STEP_CURVES}
    for facts in settings:
        for one in facts["contenders"]:
            if one["label"] in points and one["step_ms"]:
                points[one["label"]].append((facts["length"], one["step_ms"]["median"]))
    return points


def _labels(run: Mapping[str, Any]) -> set[str]:
    return {one["label"] for facts in run["layer"] for one in facts["contenders"]}


def draw_quality(axes, points: Points) -> None:  # noqa: ANN001  # matplotlib is optional
    for label, [(smaller, divergence)] in points.items():
        is_peer = label.startswith("transformers")
        color = THEIRS if is_peer else OURS
        axes.plot(smaller, divergence, "s" if is_peer else "o", color=color, markersize=7)
        beside = PLACES.get(label, (8, -3))
        align = "right" if beside[0] < 0 else "left"
        name = label if is_peer else f"kvq, {label}"
        axes.annotate(
            name, (smaller, divergence), beside, textcoords="offset points", fontsize=8, ha=align, color=color
        )
    result = load_result(FRONT_RESULT)
    axes.set_yscale("log")
    sizes = [smaller for [(smaller, _)] in points.values()]
    axes.set_xlim(min(sizes) - 0.4, max(sizes) + 0.25 * (max(sizes) - min(sizes)) + 0.2)
    axes.set_xlabel(f"times smaller than full precision ({result['length']} tokens)")
    axes.set_ylabel("KL divergence (nats)")
    axes.set_title(result["model"].partition("(")[2].rpartition(",")[0], fontsize=9)


PLACES = {
    "transformers hqq 4": (-8, -8),
    "transformers quanto 4": (-8, 2),
    "transformers hqq 2": (8, -8),
    "defaults": (8, 2),
    "3bit": (8, -8),
}
"""Points from a marker to its label, where labels would lie upon each other; to the left if negative."""


def draw_steps(axes, points: Points) -> None:  # noqa: ANN001  # matplotlib is optional
    for label, (color, name) in STEP_CURVES.items():
        lengths, times = zip(*points[label], strict=True)
        axes.plot(lengths, times, "o-", color=color, markersize=4)
        axes.annotate(
            name, (lengths[-1], times[-1]), (8, -3), textcoords="offset points", fontsize=8, color=color, va="center"
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlim(lengths[0] / 1.3, lengths[-1] * 9)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.minorticks_off()
    axes.set_xlabel(f"tokens in the cache (one layer, {STEP_DTYPE}, 2 CPU threads)")
    axes.set_ylabel("one decode step (ms)")


PICTURES = (
    Picture("quality", collect_quality, draw_quality),
    Picture("speed", collect_steps, draw_steps),
)


def main() -> None:
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot

    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "kvq", "font.family": "sans-serif", "font.size": 9})
    mpl.rcParams["font.sans-serif"] = ["DejaVu Sans", "Verdana", "sans-serif"]
    for picture in PICTURES:
        figure, axes = pyplot.subplots(figsize=SIZE, layout="constrained")
        picture.draw(axes, picture.collect())
        axes.grid(alpha=0.2)
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(picture.path, metadata={"Date": None, "Creator": None, "Description": picture.digest})
        pyplot.close(figure)


if __name__ == "__main__":
    main()
