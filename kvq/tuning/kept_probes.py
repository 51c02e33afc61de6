"""Divergences of probes on disk, from which a run that was stopped goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from kvq.evaluation.quality.parts import save_whole
from kvq.tuning.side_setting import Assignment


class KeptProbes:
    """A folder with a file for each probe; it keeps nothing without a folder.

    Args:
        folder: the folder, or None.
        conditions: all that the results depend on but the assignment, as plain values.
    """

    def __init__(self, folder: Path | None, conditions: Mapping[str, Any]) -> None:
        self._folder = folder
        self._digest = _digest(conditions)

    def find(self, assignment: Assignment) -> torch.Tensor | None:
        """Return the divergences `[N, S]` of an earlier run, or None."""
        path = self._path(assignment)
        if path is None or not path.is_file():
            return None
        found: torch.Tensor = torch.load(path, weights_only=True)
        return found

    def keep(self, assignment: Assignment, divergences: torch.Tensor) -> None:
        """Write the divergences of a probe: its file is whole, or there is none."""
        path = self._path(assignment)
        if path is not None:
            save_whole(divergences, path)

    def _path(self, assignment: Assignment) -> Path | None:
        if self._folder is None:
            return None
        named = {
            str(index): [side and side.to_dict() for side in (pair.key, pair.value)]
            for index, pair in assignment.items()
        }
        return self._folder / f"probe-{self._digest}-{_digest(named)}.pt"


def _digest(values: object) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
