"""`kvq doctor`: check that everything is in order, and say what to do if it is not."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvq.cli.console import print_error, print_fields, print_json, print_line, print_table

if TYPE_CHECKING:
    from kvq.cli.diagnosis import Diagnosis


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")] = False,
    prove: Annotated[
        bool, typer.Option("--prove", help="Try every kernel of attention that can run here, and keep the verdicts.")
    ] = False,
    device: Annotated[
        str | None,
        typer.Option(
            help="With --prove, a CUDA device: compare, tune and time its kernel for some minutes, and write a record."
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="With --device, the record to write. [default: triton-CLASS.json]")
    ] = None,
) -> None:
    """Look for problems: versions, devices, backends.

    Every backend that is ready quantizes one block and reads it back, which imports its library. Kernels of attention
    are only tried with --prove, in about two seconds each; without it, the verdicts so far are shown.

    With --prove --device cuda, nothing else is examined: the Triton kernel is compared with the reference at every
    width and kind of shape, launched in each of some ways, timed against flash attention over a full-precision buffer
    at 4,096 to 131,072 tokens and 1 to 32 rows, and a record to contribute is written; --json prints it.

    Exit codes: 0 everything can be used; 1 a problem stops a backend or the package, or the kernel of --device is
    wrong; 2 --prove was given, but KVQ_KERNEL_TRIALS switches trials off, or is neither on nor off, or --device cannot
    be used.

    Keys of --json: "kvq" ("version", "installed", "location"), "platform", "distributions" (a list with "name",
    "required", "installed", "met"), "devices" (a list with "device", "name" and, where known, "threads" or
    "memory_bytes"), "kernels" (of attention: a list with "device", "name", "default", "reason", "fault", null or how it
    was found wrong here, and "proof", null if none is needed, else with "origin", "measured here", "shipped record" or
    "none", and if there is one, "passing", "relative_error", "speedup", "over", the baseline that it is faster than,
    and of a trial here "own_ms", "other_ms", "checks", "seconds", "made_at"), "backends" (a list with "name", "state",
    "reason", "origin", "version", "works"),
    "environment" (the variables KVQ_PLUGINS, KVQ_BLOCK_PLUGINS, KVQ_ATTENTION_KERNEL, KVQ_KERNEL_TRIALS, KVQ_CC and
    KVQ_KERNEL_CFLAGS where set), "problems" (a list with "severity", "error" or "warning", "problem", "remedy") and
    "usable".
    """
    from kvq.cli.diagnosis import diagnose

    if prove:
        _check_that_trials_are_on()
    if device is not None:
        _prove_on(device, output, prove=prove, as_json=as_json)
        return
    found = diagnose(prove=prove)
    if as_json:
        print_json(found.to_dict())
    else:
        _print_diagnosis(found)
    if not found.is_usable:
        raise typer.Exit(1)


def _prove_on(device: str, output: Path | None, *, prove: bool, as_json: bool) -> None:
    """Prove the kernel of a device; without --prove, refuse."""
    from kvq.cli.device_proof import prove_on_device

    if not prove:
        print_error("--device says where to prove a kernel; give --prove too")
        raise typer.Exit(2)
    prove_on_device(device, output, as_json=as_json)


def _check_that_trials_are_on() -> None:
    """Refuse to try kernels if the user forbids it; torch need not be imported yet."""
    from kvq.attention.machine.variables import ON_OFF, TRIALS_VARIABLE, read_variable

    text = read_variable(TRIALS_VARIABLE)
    if text is None or ON_OFF.get(text.lower()):
        return
    if text.lower() in ON_OFF:
        print_error(f"{TRIALS_VARIABLE} is {text!r}, which switches trials off; unset it to use --prove")
    else:
        print_error(f"{TRIALS_VARIABLE}: {text!r} is neither on nor off; choose one of {', '.join(map(repr, ON_OFF))}")
    raise typer.Exit(2)


def _print_diagnosis(found: Diagnosis) -> None:
    own = [("kvq", found.kvq["version"]), ("at", found.kvq["location"]), ("platform", found.platform)]
    print_fields([*own, *found.environment.items()])
    _print_section(("distribution", "installed", "needed", ""), [_distribution_row(one) for one in found.distributions])
    _print_section(("device", "name", ""), [_device_row(one) for one in found.devices])
    _print_section(("attention", "device", ""), [_kernel_row(one) for one in found.kernels])
    _print_section(("backend", "state", "origin", ""), [_backend_row(one) for one in found.backends])
    print_line()
    for problem in found.problems:
        print_line(f"{problem.severity}: {problem.problem}")
        print_line(f"  {problem.remedy}")
    if not found.problems:
        print_line("no problems found")


def _print_section(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    if rows:
        print_line()
        print_table(columns, rows)


def _distribution_row(one: dict[str, Any]) -> tuple[str, ...]:
    return one["name"], one["installed"] or "-", one["required"] or "-", "ok" if one["met"] else "not met"


def _device_row(one: dict[str, Any]) -> tuple[str, ...]:
    threads = f"threads: {one['threads']}" if "threads" in one else ""
    memory = f"{one['memory_bytes'] / 2**30:.0f} GiB" if "memory_bytes" in one else ""
    return one["device"], one["name"], threads or memory


def _kernel_row(one: dict[str, Any]) -> tuple[str, ...]:
    proof = one["proof"] or {}
    if one["fault"] and not one["reason"]:
        return one["name"], one["device"], f"named by KVQ_ATTENTION_KERNEL, but found wrong here: {one['fault']}"
    if one["reason"] or not proof.get("speedup"):
        return one["name"], one["device"], one["reason"] or "ready"
    pace = f"{proof['speedup']:.1f} times as fast as {proof['over']}"
    when = f", {proof['made_at']}" if "made_at" in proof else ""
    return one["name"], one["device"], f"ready: {pace}, error {proof['relative_error']:.0e} ({proof['origin']}{when})"


def _backend_row(one: dict[str, Any]) -> tuple[str, ...]:
    note = "works" if one["works"] else one["reason"]
    if one["state"] == "ready" and not one["works"]:
        note = "see below"
    return one["name"], one["state"], f"{one['origin']} {one['version']}", note
