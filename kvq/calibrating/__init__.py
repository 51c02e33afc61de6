"""Collecting the statistics of a model's states, which some backends ask for, while it reads a text.

Owns how queries, keys and values are seen. It must not know what a backend does with the statistics.
"""

from __future__ import annotations

from kvq.calibrating.calibrate import calibrate

__all__ = ["calibrate"]
