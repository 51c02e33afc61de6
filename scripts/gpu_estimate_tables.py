"""What the compiled Triton programs imply for the time of a step, from benchmarks/results/gpu-compiled.json.

Nothing of it is measured: bytes by the card's bandwidth, instructions by its clock. The sizes of the cards are those of
NVIDIA's data sheets.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gpu_tables import chosen_ways, load_gpu_runs
from markdown_table import table
from quality_tables import RESULTS

RESULT = RESULTS / "gpu-compiled.json"
ROWS, TOKENS, HEADS = 8, 32768, 8
MEASURED = "4 bit"
"""The settings that `kvq doctor --prove --device` measures."""
"""Of the batch; of history; key-value heads."""
COLUMNS = (
    "settings", "compute capability", "registers", "spilled bytes", "instructions per token and head",
    "bytes, us", "instructions, us", "estimate, us", "full precision, us",
)  # fmt: skip
SCHEDULERS = 4
"""Of a multiprocessor; each issues one instruction of one warp a cycle."""


@dataclass(frozen=True)
class Card:
    """A card of one compute capability.

    Attributes:
        name: its name.
        processors: multiprocessors.
        clock_ghz: the highest clock.
        bandwidth: of its memory, GB/s.
    """

    name: str
    processors: int
    clock_ghz: float
    bandwidth: float


CARDS = {
    80: Card("A100 80 GB SXM", 108, 1.41, 2039),
    90: Card("H200", 132, 1.98, 4800),
    120: Card("RTX 5090", 170, 2.41, 1792),
}


@dataclass(frozen=True)
class Estimate:
    """Microseconds of one step of one layer.

    Attributes:
        reading: to read the stored bytes once.
        issuing: to issue the instructions of the loop over the store.
        full_precision: to read keys and values in 16 bits once.
    """

    reading: float
    issuing: float
    full_precision: float

    @classmethod
    def of(cls, program: Mapping[str, Any], head_dim: int, rows: int = ROWS, tokens: int = TOKENS) -> Estimate:
        """Return the estimate for a program, as the result describes it."""
        card, states = CARDS[program["compute_capability"]], rows * HEADS * tokens * head_dim
        issued = rows * HEADS * tokens / program["tile_tokens"] * _per_tile(program)
        return cls(
            reading=states * sum(program["effective_bits"]) / 8 / card.bandwidth / 1e3,
            issuing=issued / (card.processors * SCHEDULERS * card.clock_ghz) / 1e3,
            full_precision=2 * states * 2 / card.bandwidth / 1e3,
        )

    @property
    def total(self) -> float:
        """The longer of reading and issuing."""
        return max(self.reading, self.issuing)


def render_gpu_estimates() -> str:
    """Return what was compiled, the table, and how far an estimate was from the one measurement there is."""
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    cards = ", ".join(
        f"{number / 10:.1f}: {card.name} ({card.processors} multiprocessors, {card.clock_ghz} GHz, "
        f"{card.bandwidth:,.0f} GB/s)"
        for number, card in CARDS.items()
    )
    head_dim = result["shape"]["head_dim"]
    rows = [_row(program, head_dim) for program in result["programs"]]
    return "\n\n".join(
        (
            f"Compiled by triton {result['versions']['triton']}; {ROWS} rows of {TOKENS:,} tokens, {HEADS} key-value "
            f"heads with {result['shape']['queries_per_head']} queries each, head dim {head_dim}, bfloat16. The cards: "
            f"{cards}.",
            table(COLUMNS, rows, right=range(1, len(COLUMNS))),
            _compare(result, head_dim),
        )
    )


def _row(program: Mapping[str, Any], head_dim: int) -> tuple[str, ...]:
    estimate = Estimate.of(program, head_dim)
    return (
        program["settings"],
        f"{program['compute_capability'] / 10:.1f}",
        str(program["registers"]),
        str(program["spilled_bytes"]),
        f"{_per_tile(program) / program['tile_tokens']:.0f}",
        f"{estimate.reading:.0f}",
        f"{estimate.issuing:.0f}",
        f"{estimate.total:.0f}",
        f"{estimate.full_precision:.0f}",
    )


def _per_tile(program: Mapping[str, Any]) -> int:
    """Return the instructions of all warps for one tile."""
    instructions: int = program["instructions_per_tile_and_warp"] * program["warps"]
    return instructions


def _compare(result: Mapping[str, Any], head_dim: int) -> str:
    program = next(one for one in result["programs"] if (one["settings"], one["compute_capability"]) == (MEASURED, 90))
    estimate = Estimate.of(program, head_dim)
    ways = [one for run in load_gpu_runs() for one in chosen_ways(run)]
    measured = next(one for one in ways if (one["batch"], one["length"]) == (ROWS, TOKENS))
    return (
        f"The row of {MEASURED} at 9.0 was [measured](#all-caches) on an H200: "
        f"{measured['kernel_us']:.0f} us, {measured['kernel_us'] / estimate.total:.1f} times the estimate, and "
        f"{measured['baseline_us']:.0f} us for full precision, "
        f"{measured['baseline_us'] / estimate.full_precision:.1f} times its own. So the program neither waits for "
        "memory alone nor issues all the time: it waits for its own results, which no count of instructions shows. "
        "The estimates rank settings and cards; they foretell no time."
    )
