"""`kvq presets`: the configurations that have a name, their bits, and what was measured with them."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from kvq.cli.console import print_json, print_line, print_table


def presets(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")] = False,
) -> None:
    """List the presets: their fields, their effective bits and the divergence that was measured.

    The bits are computed from the codec that a cache would use, codes and metadata together. The divergence (KL) comes
    from a run of `kvq eval` on the model and the text named below the table: yours will differ.

    Exit code: 0.

    Keys of --json: "presets", a list of objects with "name", "fields", "effective_bits" (by head_dim, then "key" and
    "value") and "kl" (mean divergence in nats, null where none was measured); "default", such an object for the
    configuration without a preset, whose "name" is null; and "measured", the conditions: "model", "text", "sequences",
    "length", "prefill", "step", "dtype" and "versions".
    """
    from kvq.cli.preset_facts import collect_presets

    facts = collect_presets()
    if as_json:
        print_json(facts)
    else:
        _print(facts)


def _print(facts: dict[str, Any]) -> None:
    listed = [*facts["presets"], facts["default"]]
    dims = list(listed[0]["effective_bits"])
    steps = ("rotation K / V", "balance K / V", "clip K / V", "metadata")
    columns = ("preset", "backend", "bits K / V", "granularity K / V", "group size", *steps)
    print_table(
        (*columns, *(f"head_dim {dim}" for dim in dims), "KL"),
        [(*_describe(one), *(_join_bits(one["effective_bits"][dim]) for dim in dims), _kl(one)) for one in listed],
    )
    measured = facts["measured"]
    print_line()
    print_line("head_dim: effective bits of keys / values, codes and metadata per stored element")
    print_line(
        f"KL: {measured['model']} on {measured['text']}, {measured['sequences']} sequences of {measured['length']:,} "
        f"tokens, {measured['length'] - measured['prefill']:,} of each read from the cache in steps of "
        f"{measured['step']}; {measured['dtype']}"
    )


def _describe(one: dict[str, Any]) -> tuple[str, ...]:
    fields = one["fields"]
    return (
        one["name"] or "none",
        fields["backend"],
        f"{fields['nbits_k']:g} / {fields['nbits_v']:g}",
        f"{fields['axis_key']} / {fields['axis_value']}",
        str(fields["q_group_size"]),
        f"{fields['rotation_k']} / {fields['rotation_v']}",
        f"{fields['balance_k']} / {fields['balance_v']}",
        f"{fields['clip_k']} / {fields['clip_v']}",
        str(fields["metadata_dtype"] or "default"),
    )


def _join_bits(bits: dict[str, float]) -> str:
    return f"{bits['key']:.2f} / {bits['value']:.2f}"


def _kl(one: dict[str, Any]) -> str:
    return "-" if one["kl"] is None else f"{one['kl']:.1e}"
