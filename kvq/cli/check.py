"""`kvq check`: whether a configuration file is right, and what it comes to."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvq.cli.console import print_error, print_line, print_table, print_warning
from kvq.errors import BackendError, ConfigError

if TYPE_CHECKING:
    from kvq.cli.config_summary import ConfigSummary, SideSummary

SUFFIXES = (".yaml", ".yml", ".json")


def check(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A configuration: YAML or JSON.")],
    head_dim: Annotated[
        int, typer.Option("--head-dim", min=1, help="Elements of one head of the model that it is meant for.")
    ] = 128,
) -> None:
    """Check a configuration file.

    Every fault is told at once, with its place. The backends are built, so that a library that is missing is a fault,
    and so are groups that would take as much memory as full precision.

    Exit codes: 0 the file is right; 1 it has faults; 2 there is no such file.
    """
    path = _find_file(file)
    try:
        summary = _summarize(path, head_dim)
    except (ConfigError, BackendError) as error:
        faults = [str(fault) for fault in error.faults] if isinstance(error, ConfigError) else [str(error)]
        print_error(f"{file} has {len(faults)} fault{'s' if len(faults) > 1 else ''}", faults)
        raise typer.Exit(1) from error
    for warning in summary.warnings:
        print_warning(warning)
    _print_summary(file, summary, head_dim)


def _summarize(path: Path, head_dim: int) -> ConfigSummary:
    from kvq.config.files import load_mapping

    values = load_mapping(path)
    # What is no YAML or JSON is told before the seconds that it takes to import all that the rest needs.
    from kvq.cli.config_summary import summarize_mapping

    return summarize_mapping(values, str(path), head_dim)


def _find_file(text: str) -> Path:
    """Return the path of an existing file.

    Raises:
        typer.Exit: there is none; the error is printed.
    """
    path = Path(text).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        problem = "is a directory; give a configuration file in it"
    elif path.suffix.lower() in SUFFIXES:
        problem = "does not exist; give the path of a configuration file"
    else:
        problem = f"is no file; give the path of a configuration file ({', '.join(SUFFIXES)})"
    print_error(f"{text!r} {problem}")
    raise typer.Exit(2)


def _print_summary(file: str, summary: ConfigSummary, head_dim: int) -> None:
    config = summary.config
    print_line(f"{file}: a valid configuration")
    print_line(f"the newest {config.residual_length} and the first {config.sink_length} tokens of each row stay exact")
    print_line()
    columns = ("layers", "side", "backend", "bits", "granularity", "group size", "rotation", "effective bits")
    print_table(columns, [_row(side, others=bool(config.layers)) for side in summary.sides])
    print_line()
    print_line(f"effective bits: codes and metadata per stored element, at head_dim {head_dim}")


def _row(one: SideSummary, *, others: bool) -> tuple[str, ...]:
    layers = one.layers or ("all others" if others else "all")
    if one.settings is None:
        return layers, f"{one.side}s", "full precision", *["-"] * 5
    bits = "unknown" if one.effective_bits is None else f"{one.effective_bits:.3f}"
    own = one.settings
    return (
        layers,
        f"{one.side}s",
        own.backend.name,
        f"{own.nbits:g}",
        str(own.granularity),
        str(own.group_size),
        own.rotation,
        bits,
    )
