"""Results of single batches on disk, from which a run that was stopped goes on."""

from __future__ import annotations

from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any

import torch

from kvq.evaluation.quality.candidates import Candidate
from kvq.evaluation.quality.free_running import Divergence
from kvq.evaluation.quality.metrics import TokenScores
from kvq.evaluation.quality.needle import NeedleScore
from kvq.evaluation.quality.record import BatchResult

_PLAIN = ("held_bytes", "full_precision_bytes", "errors_by_distance")


class Parts:
    """A folder with a file for each cache and batch; it keeps nothing without a folder.

    Args:
        folder: the folder, or None.
        digest: a fingerprint of all that the results depend on but the caches.
    """

    def __init__(self, folder: Path | None, digest: str) -> None:
        self._folder = folder
        self._digest = digest

    def find(self, candidate: Candidate, index: int) -> BatchResult | None:
        """Return the result of an earlier run, or None."""
        path = self._path(candidate, index)
        return None if path is None or not path.is_file() else _restore(torch.load(path, weights_only=True))

    def keep(self, candidate: Candidate, index: int, result: BatchResult) -> None:
        """Write a result atomically: its file is whole, or there is none."""
        path = self._path(candidate, index)
        if path is None:
            return
        save_whole(_describe(result), path)

    def _path(self, candidate: Candidate, index: int) -> Path | None:
        return self._folder / f"{self._digest}-{candidate.digest}-{index}.pt" if self._folder else None


def save_whole(content: object, path: Path) -> None:
    """Write tensors and plain values by way of another file: the file is whole, or there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    torch.save(content, unfinished)
    unfinished.replace(path)


def _describe(result: BatchResult) -> dict[str, Any]:
    return {
        **{name: getattr(result, name) for name in _PLAIN},
        "scores": asdict(result.scores),
        "bits": list(result.bits),
        "needles": [[tuple(score) for score in pair] for pair in result.needles],
        "divergences": [astuple(one) for one in result.divergences],
    }


def _restore(kept: dict[str, Any]) -> BatchResult:
    return BatchResult(
        scores=TokenScores(**kept["scores"]),
        bits=tuple(kept["bits"]),
        needles=[(NeedleScore(*ours), NeedleScore(*plain)) for ours, plain in kept["needles"]],
        divergences=[Divergence(*one) for one in kept["divergences"]],
        **{name: kept[name] for name in _PLAIN},
    )
