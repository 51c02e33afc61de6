"""The command line: its commands, and how an error ends one.

Every command's module is imported here, which `kvq --help` needs. It imports heavy things, torch above all, inside its
functions.
"""

from __future__ import annotations

import errno
import io
import sys
from typing import Annotated

import typer

from kvq import __version__
from kvq.cli.backends import backends
from kvq.cli.bench import bench
from kvq.cli.calibrate import calibrate
from kvq.cli.check import check
from kvq.cli.console import print_error
from kvq.cli.demo import demo
from kvq.cli.doctor import doctor
from kvq.cli.eval import evaluate
from kvq.cli.export import export
from kvq.cli.import_kvtuner import import_kvtuner
from kvq.cli.new_backend import new_backend
from kvq.cli.plan import plan
from kvq.cli.presets import presets
from kvq.cli.sweep import sweep
from kvq.cli.tune import tune
from kvq.errors import KVQError

app = typer.Typer(
    name="kvq",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # an unexpected error keeps Python's own traceback
    rich_markup_mode=None,  # plain help, the same in a terminal and in a file
)

# One line a command, in the order of the help.
app.command()(demo)
app.command("eval")(evaluate)
app.command()(calibrate)
app.command()(tune)
app.command()(sweep)
app.command("import-kvtuner")(import_kvtuner)
app.command()(export)
app.command()(bench)
app.command()(backends)
app.command()(presets)
app.command()(check)
app.command("new-backend")(new_backend)
app.command()(plan)
app.command()(doctor)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kvq {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Quantize the KV cache of Hugging Face transformers.

    Exit codes: 0 fine; 1 the thing checked is wrong or cannot be used; 2 wrong usage.
    """
    del version


def main() -> None:
    """Run the command line; an error of kvq ends as one line on stderr and exit code 1."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a plugin's summary may not fit the terminal's encoding
    try:
        app(prog_name="kvq")
    except KVQError as error:
        print_error(str(error))
        sys.exit(1)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print_error(f"the output could not be written: {error.strerror}")
        sys.stdout = io.StringIO()  # or Python tries once more to write it at its end, and complains
        sys.exit(1)
