"""`kvq backends`: every backend, or everything about one."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from kvq.cli.console import print_error, print_fields, print_json, print_line, print_table
from kvq.errors import UnknownBackendError


def backends(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", show_default=False, help="A backend to show in full.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")] = False,
) -> None:
    """List the backends, or show everything about one.

    The list imports the plugins, but not the vendors' libraries. A backend that cannot be used is listed with the
    reason. With NAME the library is imported too, to measure the effective bits of the real codec.

    Exit codes: 0 fine; 1 the backend NAME cannot be used here; 2 there is no backend of that name.

    Keys of --json: "backends", a list of objects with "name", "state" ("ready", "blocked", "conflict", "broken" or
    "missing requirement"), "reason", "origin", "version", "summary", "url", "nbits" and "granularities" (null where
    the plugin cannot be loaded).

    With NAME one such object, and where the plugin can be loaded "device_types" and "states_dtypes" (empty: any),
    "axis_names" (integer axis to granularity), "requirements" ("name", "required", "installed", "met"), "options"
    ("name", "type", "required", "default", "description"), "defaults" (what the backend proposes for fields that are
    not set), "calibration" (whether it asks for statistics of the model), "uses_group_size", "head_dim", "group_size"
    (null where it is not used, one each under "key" and "value" where they differ), and "effective_bits", a list with
    "nbits", "granularity", "key" and "value" (stored bits per element, null where "reason" says why not); "readers", a
    list with "granularity", "kernels" (how each kernel of attention reads what is stored: "codes" as they are, the
    backend's own "FusedScores", "decoded" block by block, or null) and "reasons" (why a kernel does not).
    """
    from kvq.cli.backend_facts import collect_backend, collect_backends

    if name is None:
        listed = collect_backends()
        if as_json:
            print_json({"backends": listed})
        else:
            _print_list(listed)
        return
    try:
        one = collect_backend(name)
    except UnknownBackendError as error:
        print_error(str(error))
        raise typer.Exit(2) from error
    if as_json:
        print_json(one)
    else:
        _print_one(one)
    if one["state"] != "ready":
        raise typer.Exit(1)


def _print_list(facts: list[dict[str, Any]]) -> None:
    if not facts:
        print_line("no backend is installed; `kvq doctor` says what to do")
        return
    rows = [
        (
            one["name"],
            one["state"],
            _join_bits(one["nbits"]),
            ", ".join(one["granularities"] or ()),
            f"{one['origin']} {one['version']}",
            "; ".join(filter(None, (one["reason"], one["summary"]))),
        )
        for one in facts
    ]
    print_table(("name", "state", "bits", "granularities", "origin", "summary"), rows)


def _print_one(facts: dict[str, Any]) -> None:
    rows = [(key, facts[key]) for key in ("name", "state", "reason", "summary", "url") if facts[key]]
    rows.insert(2, ("origin", f"{facts['origin']} {facts['version']}"))
    if facts["nbits"] is None:
        print_fields(rows)
        return
    rows += [
        ("bits", _join_bits(facts["nbits"])),
        ("granularities", ", ".join(facts["granularities"])),
        ("statistics of the model", facts["calibration"]),
        ("defaults", ", ".join(f"{field}: {value}" for field, value in facts["defaults"].items()) or "those of kvq"),
        ("group size", _group_size_text(facts)),
        ("axis names", ", ".join(f"{axis} = {word}" for axis, word in facts["axis_names"].items())),
        ("devices", ", ".join(facts["device_types"]) or "any"),
        ("dtypes of states", ", ".join(facts["states_dtypes"]) or "any"),
    ]
    rows += [("requires", _requirement_text(one)) for one in facts["requirements"]]
    print_fields(rows)
    _print_options(facts)
    _print_effective_bits(facts)
    _print_readers(facts["readers"])


def _print_options(facts: dict[str, Any]) -> None:
    print_line()
    if not facts["options"]:
        print_line("no options")
        return
    print_line(f"options, under backend_options: {{{facts['name']}: ...}}")
    rows = [
        (one["name"], one["type"], "required" if one["required"] else repr(one["default"]), one["description"])
        for one in facts["options"]
    ]
    print_table(("name", "type", "default", "description"), rows)


def _print_effective_bits(facts: dict[str, Any]) -> None:
    print_line()
    if not facts["effective_bits"]:
        print_line("no effective bits: the backend cannot be built here")
        return
    print_line(f"effective bits at head_dim {facts['head_dim']}, group size {_group_size_text(facts)}")
    rows = [
        (f"{one['nbits']:g}", one["granularity"], *(_bits_text(one[side]) for side in ("key", "value")), one["reason"])
        for one in facts["effective_bits"]
    ]
    print_table(("bits", "granularity", "keys", "values", ""), rows)


def _print_readers(readers: list[dict[str, Any]]) -> None:
    if not readers:
        return
    print_line()
    print_line(
        "how kernels of attention read it: codes as they are, the backend's FusedScores, or decoded block by block"
    )
    names = list(dict.fromkeys(name for one in readers for name in one["kernels"]))
    rows = [
        (
            one["granularity"],
            *(one["kernels"].get(name) or "-" for name in names),
            "; ".join(f"{name}: {reason}".removeprefix(": ") for name, reason in one["reasons"].items()),
        )
        for one in readers
    ]
    print_table(("granularity", *names, ""), rows)


def _group_size_text(facts: dict[str, Any]) -> str:
    size = facts["group_size"]
    if size is None:
        return "not used"
    return ", ".join(f"{own} for the {side}s" for side, own in size.items()) if isinstance(size, dict) else str(size)


def _requirement_text(one: dict[str, Any]) -> str:
    found = f"{one['installed']} is installed" if one["installed"] else "not installed"
    return f"{one['name']}{one['required']}: {found}{'' if one['met'] else ', not met'}"


def _bits_text(bits: float | None) -> str:
    return "-" if bits is None else f"{bits:.3f}"


def _join_bits(nbits: list[float] | None) -> str:
    return ", ".join(f"{bits:g}" for bits in nbits or ())
