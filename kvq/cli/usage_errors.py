"""How a command ends if its options are wrong, or name something that is missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from kvq.cli.console import print_error
from kvq.errors import BackendError, ConfigError, EvaluationError, ModelError


@contextmanager
def usage_errors() -> Iterator[None]:
    """End the command with one line and exit code 2 if the block raises an error about the user's options."""
    try:
        yield
    except (EvaluationError, ConfigError, BackendError, ModelError) as error:
        print_error(str(error))
        raise typer.Exit(2) from error
