"""What was learned of a model's states on a text, for backends that ask for it: in memory and as a file.

Owns the statistics of all layers, their file and how they are given to one layer. It must not know who collects them,
nor what a backend does with them.
"""

from __future__ import annotations

from kvq.calibration.calibration import Calibration

__all__ = ["Calibration"]
