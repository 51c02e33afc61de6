"""`kvq doctor --prove --device cuda`: prove the kernel of a GPU, and write the record of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from kvq.cli.console import print_error, print_fields, print_json, print_line, print_table
from kvq.cli.progress import show_progress

if TYPE_CHECKING:
    import torch

    from kvq.attention.dispatch.kernel import BenchmarkedKernel


def prove_on_device(name: str, output: Path | None, *, as_json: bool) -> None:
    """Compare, tune and time the kernel on a device, write the record, and exit with 1 where the kernel is wrong.

    Args:
        name: the device, as torch names it.
        output: the file to write; by default one in the working directory.
        as_json: print the record, and nothing else.
    """
    from kvq.benchmark.device_proof.record import prove_device, write_record

    device = _find_device(name)
    kernel = _find_kernel(device)
    with show_progress(f"proving {kernel.name} on {name}") as progress:
        record = prove_device(kernel, device, progress)
    try:
        path = write_record(record, output)
    except OSError as error:
        print_error(f"the record cannot be written: {error}")
        raise typer.Exit(1) from error
    if as_json:
        print_json(record)
    else:
        _print_record(record, path)
    if record["wrong"] or not record["compared"]:
        raise typer.Exit(1)


def _find_device(name: str) -> torch.device:
    from kvq.errors import ConfigError
    from kvq.layers.devices import usable_device

    try:
        device = usable_device(name)
    except ConfigError as error:
        print_error(error.faults[0].problem.splitlines()[0])
        raise typer.Exit(2) from error
    if device.type != "cuda":
        print_error(f"--device {name}: only CUDA devices are proved by it; kvq doctor --prove tries all kernels")
        raise typer.Exit(2)
    return device


def _find_kernel(device: torch.device) -> BenchmarkedKernel:
    from kvq.attention.kernels.triton.kernel import TRITON

    reason = TRITON.why_unavailable()
    if reason is not None:
        print_error(f"the kernel of {device} cannot run: {reason}")
        raise typer.Exit(2)
    return TRITON


def _print_record(record: dict[str, Any], path: Path) -> None:
    print_fields(_summarize(record))
    rows = _list_best(record)
    if rows:
        print_line()
        print_table(("rows x tokens", "full precision", "kernel", "full precision / kernel"), rows)
    for one in record["wrong"]:
        print_line(f"wrong: {one['sample']} differs by {one['error']:.1e} (at most {one['tolerance']:.0e})")
    print_line()
    print_line(f"written: {path}")
    print_line("To contribute it, put it into benchmarks/results/ of kvq's repository, or attach it to an issue there.")


def _summarize(record: dict[str, Any]) -> Sequence[tuple[str, str]]:
    error, way, right = record["relative_error"], record["best_way"], record["compared"] - len(record["wrong"])
    fields = [("device", record["device"]), ("kernel", record["kernel"]), ("right", f"{right} of {record['compared']}")]
    if error is not None:
        fields.append(("largest error in float32", f"{error:.1e}"))
    if way is not None:
        fields.append(("best way", ", ".join(f"{key} {value}" for key, value in way.items())))
    return fields


def _list_best(record: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return a row for each size, with the kernel in its best way."""
    way = record["best_way"] or {}
    chosen = [one for one in record["ways"] if "skipped" in one or (way and way.items() <= one.items())]
    return [_row(one) for one in sorted(chosen, key=lambda one: (one["batch"], one["length"]))]


def _row(one: dict[str, Any]) -> tuple[str, ...]:
    size = f"{one['batch']} x {one['length']:,}"
    if "skipped" in one:
        return size, "", "", one["skipped"]
    kernel, full = one["kernel_us"], one["baseline_us"]
    return size, f"{full:.0f} us", f"{kernel:.0f} us", f"{full / kernel:.2f}"
