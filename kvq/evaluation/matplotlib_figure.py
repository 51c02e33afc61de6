"""The figure that pictures are drawn into. matplotlib, of the extra `plot`, is imported when one is made."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvq.errors import EvaluationError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MATPLOTLIB_IS_MISSING = "a picture needs matplotlib, the extra `plot`: pip install '.[plot]' in the checkout of kvq"


def make_figure(width: float, height: float) -> Figure:
    """Return an empty figure of that many inches, which lays out its axes by itself.

    Raises:
        EvaluationError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise EvaluationError(MATPLOTLIB_IS_MISSING) from error
    return Figure(figsize=(width, height), layout="constrained")
