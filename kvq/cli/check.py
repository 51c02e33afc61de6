"""`kvq check`: whether a configuration file is right, or whether a backend keeps the contract."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvq.cli.console import print_error, print_line, print_table, print_warning
from kvq.cli.given_path import exists, find_config_file
from kvq.cli.progress import show_progress
from kvq.errors import BackendError, ConfigError

if TYPE_CHECKING:
    from kvq.cli.config_summary import ConfigSummary, SideSummary


def check(
    target: Annotated[str, typer.Argument(metavar="FILE|NAME", help="A YAML or JSON configuration, or a backend.")],
    head_dim: Annotated[
        int, typer.Option("--head-dim", metavar="INTEGER", min=1, help="For FILE: elements of one head of the model.")
    ] = 128,
    only: Annotated[
        list[str] | None, typer.Option("--only", metavar="NAME", help="For NAME: run only this check; repeatable.")
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", metavar="KEY=VALUE", help="For NAME: an option of the backend; repeatable."),
    ] = None,
    bits: Annotated[
        list[float] | None,
        typer.Option("--bits", metavar="NUMBER", help="For NAME: only codes of so many bits; repeatable."),
    ] = None,
    fast: Annotated[
        bool, typer.Option("--fast", help="For NAME: only the fewest and the most bits, in each direction of groups.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For NAME: print JSON, and nothing else, on stdout.")] = False,
) -> None:
    """Check a configuration file, or a backend against the contract.

    FILE: prints every fault at once, with its place. The backends are built: a missing library is a fault, and so are
    groups that would take as much memory as full precision.

    NAME: runs the checks of kvq.testing at every width and granularity of the backend (a minute or more; --fast takes
    less). A check is shown as soon as it has been run on all of them. Ctrl-C ends the run, with what is known by then.
    An argument that has a suffix or a slash, or exists, is a file.

    Exit codes: 0 no faults; 1 the file has faults, or the backend fails a check; 2 there is no such file or backend;
    130 the run was interrupted.

    Keys of --json: "backend", "passed" (true or false; false if it was interrupted), "interrupted", and "results", a
    list of objects with "check", "case", "outcome" ("passed", "failed" or "not applicable") and "reason".
    """
    if _is_name(target):
        from kvq.cli.contract import check_backend

        check_backend(target, only=only or [], options=option or [], nbits=bits or [], fast=fast, as_json=as_json)
        return
    _refuse_backend_options(
        target, {"--only": only, "--option": option, "--bits": bits, "--fast": fast, "--json": as_json}
    )
    path = find_config_file(target)
    try:
        with show_progress(f"reading {target}"):
            summary = _summarize(path, head_dim)
    except (ConfigError, BackendError) as error:
        faults = [str(fault) for fault in error.faults] if isinstance(error, ConfigError) else [str(error)]
        print_error(f"{target} has {len(faults)} fault{'s' if len(faults) > 1 else ''}", faults)
        raise typer.Exit(1) from error
    for warning in summary.warnings:
        print_warning(warning)
    _print_summary(target, summary, head_dim)


def _is_name(text: str) -> bool:
    """Return whether the argument means a backend; names have neither dots nor slashes in them."""
    return text.replace("-", "_").isidentifier() and not exists(Path(text))


def _refuse_backend_options(target: str, given: dict[str, object]) -> None:
    """End the command if an option was given that only a backend has: a program would wait for JSON in vain."""
    unused = [name for name, value in given.items() if value]
    if unused:
        print_error(f"{' and '.join(unused)} can be given for a backend only, and {target!r} is a file")
        raise typer.Exit(2)


def _summarize(path: Path, head_dim: int) -> ConfigSummary:
    from kvq.config.files import load_mapping

    values = load_mapping(path)
    # A file that is not YAML or JSON is refused before the imports of the rest, which take seconds.
    from kvq.cli.config_summary import summarize_mapping

    return summarize_mapping(values, str(path), head_dim)


def _print_summary(file: str, summary: ConfigSummary, head_dim: int) -> None:
    config = summary.config
    print_line(f"{file}: a valid configuration")
    print_line(f"the newest {config.residual_length} and the first {config.sink_length} tokens of each row stay exact")
    print_line()
    columns = (
        "layers",
        "side",
        "backend",
        "bits",
        "granularity",
        "group size",
        "rotation",
        "balance",
        "clip",
        "rounding",
        "effective bits",
    )
    print_table(columns, [_row(side, others=bool(config.layers)) for side in summary.sides])
    print_line()
    print_line(f"effective bits: codes and metadata per stored element, at head_dim {head_dim}")


def _row(one: SideSummary, *, others: bool) -> tuple[str, ...]:
    layers = one.layers or ("all others" if others else "all")
    if one.settings is None:
        return layers, f"{one.side}s", "full precision", *["-"] * 8
    bits = "unknown" if one.effective_bits is None else f"{one.effective_bits:.3f}"
    own = one.settings
    return (
        layers,
        f"{one.side}s",
        own.backend.name,
        f"{own.nbits:g}",
        str(own.granularity),
        str(own.group_size) if own.backend.uses_group_size else "-",
        one.rotation,
        one.balance,
        one.clip,
        own.rounding,
        bits,
    )
