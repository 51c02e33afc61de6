"""The environment variables that attention reads, and what an empty one means: that it is not set.

Must not know what they are read for.
"""

from __future__ import annotations

import os

KERNEL_VARIABLE = "KVQ_ATTENTION_KERNEL"
"""Names the kernel to use wherever it can run, benchmarked or not; "auto" by default."""
TRIALS_VARIABLE = "KVQ_KERNEL_TRIALS"
""""off": no kernel is tried on this machine, and verdicts of earlier trials are not read; "on" by default."""
COMPILER_VARIABLES = ("KVQ_CC", "CC")
"""Name the C compiler with its arguments; the first that is set counts."""
FLAGS_VARIABLE = "KVQ_KERNEL_CFLAGS"
"""Compiler flags in place of those for the processor at hand, e.g. "-march=x86-64"."""

ON_OFF = {"on": True, "1": True, "true": True, "yes": True, "off": False, "0": False, "false": False, "no": False}
"""Values of a switch, in upper or lower case."""


def read_variable(name: str) -> str | None:
    """Return the value of a variable, stripped; None if it is unset or empty."""
    return os.environ.get(name, "").strip() or None
