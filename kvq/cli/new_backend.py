"""`kvq new-backend`: a distribution with a backend that works, to start one's own from."""

from __future__ import annotations

from typing import Annotated, NoReturn

import typer
import yaml

from kvq.cli.console import print_error, print_line
from kvq.cli.given_path import exists, expand


def new_backend(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The backend's name: what users write as `backend=`.")],
    general: Annotated[
        bool,
        typer.Option("--general", help="One that stores tensors of its own, not codes of `scale * code + offset`."),
    ] = False,
    folder: Annotated[str, typer.Option("--folder", metavar="DIR", help="Where to write the folder kvq-NAME.")] = ".",
) -> None:
    """Write a distribution with a backend that works: plugin, options, quantizer, tests, configuration, README.

    It rounds to the largest magnitude until you change the numbers. Install it, and `kvq check NAME` holds it to the
    contract.

    Exit codes: 0 written; 2 the name cannot be used, or the folder is there already or cannot be written.
    """
    from kvq.cli.templates import NAME_PATTERN, find_owner, write_distribution

    if not NAME_PATTERN.fullmatch(name):
        _refuse(f"{name!r} is not a name; it begins with a letter and has lower-case letters, digits, '-' and '_'")
    if yaml.safe_load(name) != name:
        _refuse(f"the name {name!r} means {yaml.safe_load(name)!r} in YAML, where users write it; choose another one")
    if (owner := find_owner(name)) is not None:
        _refuse(f"the name {name!r} belongs to {owner}; choose another one")
    parent = expand(folder)
    if not exists(parent) or not parent.is_dir():
        _refuse(f"--folder {folder!r} is not a folder; make it first")
    target = parent / f"kvq-{name}"
    if exists(target):
        _refuse(f"{str(target)!r} is there already; move it, or choose another --folder or name")
    try:
        written = write_distribution(target, name, general=general)
    except OSError as error:
        _refuse(f"{str(target)!r} cannot be written: {error.strerror or error}")
    for path in written:
        print_line(str(path))
    print_line()
    print_line(f"next: pip install -e {target}; kvq check {name}; kvq demo --backend {name}")
    print_line(f"the numbers are decided in {target / 'src' / f'kvq_{name}'.replace('-', '_') / 'quantizer.py'}")


def _refuse(problem: str) -> NoReturn:
    print_error(problem)
    raise typer.Exit(2)
