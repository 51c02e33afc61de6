"""The options that span a grid of settings, of `kvq tune` and `kvq sweep`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvq.errors import EvaluationError

if TYPE_CHECKING:
    from kvq.tuning import Grid

AXES = ("per_channel", "per_token")
ROTATIONS = ("auto", "none", "hadamard")
BALANCES = ("auto", "none", "rms")
METADATA = ("default", "float16", "bfloat16", "float32", "int8")

Backends = Annotated[
    list[str] | None,
    typer.Option(
        "--backend", metavar="NAME", help="A backend that competes; repeatable. Default: that of the presets."
    ),
]
Axes = Annotated[
    list[str] | None,
    typer.Option("--axis", metavar="NAME", help=f"{' or '.join(AXES)}; repeatable. Default: {AXES[0]}."),
]
GroupSizes = Annotated[
    list[int] | None,
    typer.Option("--group-size", metavar="INTEGER", min=2, help="Elements per scale; repeatable. Default: 64."),
]
Rotations = Annotated[
    list[str] | None,
    typer.Option("--rotation", metavar="NAME", help=f"{', '.join(ROTATIONS)}; repeatable. Default: auto."),
]
Balances = Annotated[
    list[str] | None,
    typer.Option("--balance", metavar="NAME", help=f"{', '.join(BALANCES)}; repeatable. Default: auto."),
]
Clips = Annotated[
    list[str] | None,
    typer.Option("--clip", metavar="SHARE", help="auto, none, or the part of a range that is kept; repeatable."),
]
Metadata = Annotated[
    list[str] | None,
    typer.Option("--metadata", metavar="DTYPE", help=f"{', '.join(METADATA)}: of scales and middles; repeatable."),
]


def make_grid(
    backends: list[str] | None,
    bits: tuple[float, ...],
    axes: list[str] | None,
    group_sizes: list[int] | None,
    rotations: list[str] | None,
    balances: list[str] | None,
    clips: list[str] | None,
    metadata: list[str] | None,
) -> Grid:
    """Return the grid that the options span; what is not given is as in `Grid`.

    Raises:
        EvaluationError: a word is not accepted.
    """
    from kvq.tuning import Grid

    for option, given, accepted in (
        ("axis", axes, AXES),
        ("rotation", rotations, ROTATIONS),
        ("balance", balances, BALANCES),
        ("metadata", metadata, METADATA),
    ):
        wrong = [word for word in given or () if word not in accepted]
        if wrong:
            raise EvaluationError(f"--{option} {wrong[0]!r} is not accepted; choose from {', '.join(accepted)}")
    values = {
        "backends": backends,
        "bits": bits,
        "axes": axes,
        "group_sizes": group_sizes,
        "rotations": rotations,
        "balances": balances,
        "clips": [_parse_clip(word) for word in clips or ()],
        "metadata": metadata,
    }
    spans: dict[str, Any] = {name: tuple(dict.fromkeys(some)) for name, some in values.items() if some}
    return Grid(**spans)


def _parse_clip(word: str) -> str | float:
    if word in ("auto", "none"):
        return word
    try:
        share = float(word)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise EvaluationError(f"--clip {word!r} is not accepted; write auto, none, or a part of the range such as 0.9")
    return share


def parse_bits(text: str, option: str = "--bits") -> tuple[float, ...]:
    """Read numbers of bits that are separated by commas.

    Raises:
        EvaluationError: one is not a number above 0.
    """
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or not all(0 < bits < float("inf") for bits in found):
        raise EvaluationError(f"{option} {text!r} is not accepted; write numbers of bits such as 2,3,4")
    return tuple(int(bits) if bits == int(bits) else bits for bits in found)
