"""The tables of the presets, and the excerpt of their results that `kvq presets` shows.

    python scripts/preset_tables.py     # write the excerpt from benchmarks/results/quality_presets.json

docs/measurements.md has the command that writes those results.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from markdown_table import table
from quality_tables import RESULTS, TAIL_COLUMNS, compare_rows, quality_rows

from kvq import KVQCacheConfig
from kvq.cli.preset_facts import DEFAULT, HEAD_DIMS, collect_presets
from kvq.config import PRESETS

RESULT = RESULTS / "quality_presets.json"
FRONT_RESULT = RESULTS / "quality_smollm2.json"
"""On another text, beside transformers' caches."""
LONG_RESULT = RESULTS / "quality-smollm2-long.json"
"""A run by name for each length."""
EXCERPT = Path(__file__).resolve().parents[1] / "kvq" / "cli" / "measured_presets.json"
CONDITIONS = ("model", "text", "sequences", "length", "prefill", "step", "dtype", "versions")
BITS = tuple(f"effective bits, head_dim {dim}" for dim in HEAD_DIMS)
MEASURED = (
    "configuration",
    "KL divergence",
    "against defaults",
    "KL, 99 %",
    "perplexity",
    "top-1",
    "KiB held",
    "smaller",
)
FRONT = ("cache", "KL", "perplexity", "top-1", "smaller")
FRONT_ROWS = {
    "8bit": '`preset="8bit"`',
    "4bit": '`preset="4bit"`',
    "3bit": '`preset="3bit"`',
    DEFAULT: "kvq's defaults, 4 bits for keys and 2 for values",
    "transformers hqq 4": "transformers' hqq, 4 bits",
    "transformers quanto 4": "transformers' quanto, 4 bits",
    "transformers quanto 2": "transformers' quanto, 2 bits",
}
FRONT_TEXTS = {"topics-report": "Python's manual"}


def load_result(path: Path = RESULT) -> dict[str, Any]:
    """Return committed results."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def render_excerpt() -> str:
    """Return the conditions, and the divergence of each preset that is still what was measured, as JSON."""
    result = load_result()
    wanted = {name: KVQCacheConfig(preset=name) for name in PRESETS} | {DEFAULT: KVQCacheConfig()}
    kl = {
        record["label"]: record["kl"]["mean"]
        for record in result["records"]
        if record["label"] in wanted and KVQCacheConfig.from_mapping(record["settings"]) == wanted[record["label"]]
    }
    return json.dumps({**{name: result[name] for name in CONDITIONS}, "kl": kl}, indent=2) + "\n"


def render_presets() -> str:
    """Return what each preset stands for, and the bits that it takes."""
    listed = collect_presets()["presets"]
    fields = tuple(f"`{field}`" for field in listed[0]["fields"])
    rows = [
        (
            f"`{one['name']}`",
            *(f"`{value}`" for value in one["fields"].values()),
            *(f"{sum(one['effective_bits'][str(dim)].values()) / 2:.2f}" for dim in HEAD_DIMS),
        )
        for one in listed
    ]
    header = ("`preset`", *fields, *BITS)
    return table(header, rows, right=range(len(header) - len(BITS), len(header)))


def render_measured() -> str:
    """Return the cost of each preset, beside the defaults and the preset of another backend."""
    result = load_result()
    defaults = next(record for record in result["records"] if record["label"] == DEFAULT)
    rows = [_row(record, defaults) for record in result["records"]]
    return f"{describe_run(result)}\n\n{table(MEASURED, rows, right=range(1, len(MEASURED)))}"


def render_front() -> str:
    """Return the small table of the front page: what presets and caches of transformers cost on a real model."""
    result = load_result(FRONT_RESULT)
    records = {record["label"]: record for record in result["records"]}
    rows = [(name, *_front_cells(records[label])) for label, name in FRONT_ROWS.items()]
    scored = result["length"] - result["prefill"]
    told = (
        f"{result['model']}, on {FRONT_TEXTS[result['text']]}: {result['sequences']} texts of {result['length']:,} "
        f"tokens, of which {scored} are read from the cache. KL is the divergence of the next token from that of full "
        'precision; top-1, how often both would say the same token; "smaller" counts all that a cache holds, in '
        f"{result['dtype']} where it is exact; `kvq plan` computes longer texts, of which less is exact."
    )
    return f"{table(FRONT, rows, right=range(1, len(FRONT)))}\n\n{told}"


def render_real_model() -> str:
    """Return all that was measured in the run of the front page, with the columns that it has figures for."""
    result = load_result(FRONT_RESULT)
    return f"{describe_run(result)}\n\n{_table_with_tail(result)}"


def render_long() -> str:
    """Return the same figures at longer contexts, a table for each length."""
    runs = sorted(load_result(LONG_RESULT).values(), key=lambda run: run["length"])
    return "\n\n".join(f"{describe_run(run)} {_name_windows(run)}\n\n{_table_with_tail(run)}" for run in runs)


def _name_windows(result: dict[str, Any]) -> str:
    """Return a sentence about the window that kvq's caches were measured with, which may not be today's default."""
    own = [record["settings"] for record in result["records"] if not record["is_peer"]]
    windows = sorted({settings["residual_length"] for settings in own})
    return f"kvq's caches have a window of {' and '.join(map(str, windows))} tokens."


def _table_with_tail(result: dict[str, Any]) -> str:
    """Return a row for each cache, best first, without the columns that the run has no figures for."""
    rows = quality_rows(result)
    shown = [place for place in range(len(TAIL_COLUMNS)) if any(row[place] != "-" for row in rows)]
    header = [TAIL_COLUMNS[place] for place in shown]
    cells = [[row[place] for place in shown] for row in rows]
    return table(header, cells, right=range(1, len(header)))


def describe_run(result: dict[str, Any]) -> str:
    """Return the sentence above a table of one run."""
    return (
        f"{result['model']} on `{result['text']}`: {_count_texts(result['sequences'])} of {result['length']:,} tokens, "
        f"the last {result['length'] - result['prefill']:,} of each read from the cache in steps of {result['step']}; "
        f"{result['dtype']}."
    )


def _count_texts(count: int) -> str:
    return "1 text" if count == 1 else f"{count} texts"


def _front_cells(record: dict[str, Any]) -> tuple[str, ...]:
    return (
        f"{record['kl']['mean']:.1g}" if record["kl"]["mean"] < 1e-4 else f"{record['kl']['mean']:.4f}",
        f"{record['ppl_change']:+.1%}",
        f"{record['top1']:.1%}",
        f"{record['compression']:.2f}x",
    )


def _row(record: dict[str, Any], defaults: dict[str, Any]) -> tuple[str, ...]:
    return (
        record["label"],
        f"{record['kl']['mean']:.1e} ± {record['kl']['half_width']:.0e}",
        "-" if record is defaults else compare_rows(defaults, record),
        f"{record['kl_p99']:.1e}",
        f"{record['ppl_change']:+.2%}",
        f"{record['top1']:.1%}",
        f"{record['held_bytes'] / 1024:,.0f}",
        f"{record['compression']:.2f}x",
    )


if __name__ == "__main__":
    EXCERPT.write_text(render_excerpt(), encoding="utf-8")
