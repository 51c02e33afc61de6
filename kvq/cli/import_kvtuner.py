"""`kvq import-kvtuner`: an allocation that KVTuner has published, as a configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvq.cli.console import print_line
from kvq.cli.given_path import find_config_file
from kvq.cli.outputs import check_outputs, write_output
from kvq.cli.usage_errors import usage_errors


def import_kvtuner(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A YAML file of KVTuner's calibration_presets.")],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The configuration, a YAML file. Default: printed.")
    ] = None,
    scheme: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="How to quantize: defaults, or kivi or per-token, for which the allocations were found.",
        ),
    ] = "defaults",
    backend: Annotated[
        str | None, typer.Option(metavar="NAME", help="The backend. Default: that of the presets.")
    ] = None,
) -> None:
    """Turn bits by layer that KVTuner has published into a configuration.

    Exit codes: 0 fine; 1 the file cannot be written; 2 wrong usage, or the file is missing or wrong.
    """
    with usage_errors():
        check_outputs(out, None)
        path = find_config_file(file)
        from kvq.tuning.kvtuner import read_kvtuner
        from kvq.tuning.search_space import DEFAULT_BACKEND

        config = read_kvtuner(path, scheme=scheme, backend=backend or DEFAULT_BACKEND)
    text = (
        f"# The bits of {path.name}, an allocation of KVTuner (arXiv 2502.04420); scheme: {scheme}.\n{config.to_yaml()}"
    )
    if out is None:
        print_line(text.rstrip())
    else:
        write_output(out, text)
