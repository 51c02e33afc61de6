"""How a command ends if its options are wrong, or name something that is missing: the errors that it prints."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from kvq.cli.console import print_error
from kvq.errors import BackendError, CalibrationError, ConfigError, EvaluationError, ModelError


@contextmanager
def usage_errors() -> Iterator[None]:
    """End the command with exit code 2 if the block raises an error about the user's options; print it."""
    try:
        yield
    except (EvaluationError, ConfigError, BackendError, CalibrationError, ModelError) as error:
        print_usage_error(error)
        raise typer.Exit(2) from error


def print_usage_error(error: Exception) -> None:
    """Print an error as one line; several faults of a configuration as one line each."""
    if isinstance(error, ConfigError) and len(error.faults) > 1:
        faults = [str(fault) for fault in error.faults]
        print_error(f"{error.source or 'the configuration'} has {len(faults)} faults", faults)
    else:
        print_error(str(error))
