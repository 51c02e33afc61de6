"""How a command ends whose options ask for something that is wrong or not there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from kvq.cli.console import print_error
from kvq.errors import BackendError, ConfigError, EvaluationError, ModelError


@contextmanager
def usage_errors() -> Iterator[None]:
    """End the command with one line and exit code 2 if the block raises an error about what was asked for."""
    try:
        yield
    except (EvaluationError, ConfigError, BackendError, ModelError) as error:
        print_error(str(error))
        raise typer.Exit(2) from error
