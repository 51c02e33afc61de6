"""What tuning is worth on a real model, from committed results: the table of docs/tuning.md.

    python scripts/tuned_tables.py --collect RECORD.json ... --eval EVAL.json     # writes the excerpt that is committed

A record is what `kvq tune --record` writes, the other file what `kvq eval --out` wrote on the tuned configurations,
those with equal settings in all layers, and a cache of transformers.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markdown_table import table
from preset_tables import describe_run
from quality_tables import RESULTS

RESULT = RESULTS / "tuned-smollm2.json"
COLUMNS = ("cache", "bits an element", "KL divergence", "of uniform", "text by text", "KL predicted", "held", "smaller")
EVAL_FIELDS = ("label", "is_peer", "kl", "kl_by_sequence", "held_bytes", "effective_bits", "compression", "failure")
POINT_FIELDS = ("bits", "bytes", "predicted", "measured")

Facts = Mapping[str, Any]


def collect(records: Sequence[Facts], evaluated: Facts, pairs: Mapping[str, str]) -> dict[str, Any]:
    """Return the excerpt: the answer of each run, the conditions and figures of the evaluation, and what is compared.

    Args:
        records: what `kvq tune --record` wrote.
        evaluated: what `kvq eval --out` wrote.
        pairs: by the label of a tuned configuration, that of the best uniform one in its bytes.
    """
    conditions = {name: value for name, value in evaluated.items() if name != "records"}
    figures = [{name: record[name] for name in EVAL_FIELDS} for record in evaluated["records"]]
    return {
        "runs": [_excerpt(one["tuning"]) for one in records],
        "pairs": dict(pairs),
        **conditions,
        "records": figures,
    }


def render_tuned() -> str:
    """Return the commands, and the table of the evaluation, with its conditions above it."""
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    stem = Path(result["runs"][0]["out"]).stem.rpartition("-")[0]
    predicted = {f"{stem}-{point['bits']:.2f}": point for run in result["runs"] for point in run["front"]}
    predicted |= {Path(run["out"]).stem: run["tuned"] for run in result["runs"]}
    records = {record["label"]: record for record in result["records"]}
    rows = [_row(label, record, records, result["pairs"], predicted) for label, record in records.items()]
    commands = "\n".join(f"$ {run['command']}" for run in result["runs"])
    calibration = result["runs"][0]
    return (
        f"{describe_run(result)} Chosen on `{calibration['calibration']}`, {calibration['calibration_sequences']} "
        f"texts of {calibration['calibration_length']} tokens, which share nothing with these:\n\n"
        f"```console\n{commands}\n```\n\n{table(COLUMNS, rows, right=range(1, len(COLUMNS)))}"
    )


def _excerpt(tuning: Facts) -> dict[str, Any]:
    kept = ("command", "calibration", "calibration_sequences", "calibration_length", "before_exchanges")
    words = tuning["command"].split()
    return {
        **{name: tuning[name] for name in kept},
        "out": words[words.index("--out") + 1],
        "tuned": {name: tuning["tuned"][name] for name in POINT_FIELDS},
        "front": [{name: point[name] for name in POINT_FIELDS} for point in tuning["front"]],
    }


def _row(
    label: str, record: Facts, records: Mapping[str, Facts], pairs: Mapping[str, str], predicted: Mapping[str, Facts]
) -> tuple[str, ...]:
    name = f"transformers {label.removeprefix('transformers ')}" if record["is_peer"] else f"`{label}`"
    held = f"{record['held_bytes'] / 1024:,.0f} KiB"
    ratio, spread = "-", "-"
    if label in pairs:
        uniform = records[pairs[label]]
        ratio = f"{record['kl']['mean'] / uniform['kl']['mean']:.2f}x"
        each = [ours / theirs for ours, theirs in zip(record["kl_by_sequence"], uniform["kl_by_sequence"], strict=True)]
        spread = f"{min(each):.2f}x to {max(each):.2f}x"
    own = f"{predicted[label]['predicted']:.4f}" if label in predicted else "-"
    bits = f"{record['effective_bits']:.2f}"
    return name, bits, f"{record['kl']['mean']:.4f}", ratio, spread, own, held, f"{record['compression']:.2f}x"


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the excerpt of the results that is committed.")
    parser.add_argument("--collect", nargs="+", type=Path, required=True, metavar="RECORD", help="of kvq tune --record")
    parser.add_argument("--eval", type=Path, required=True, metavar="FILE", help="of kvq eval --out")
    parser.add_argument(
        "--pair", nargs=2, action="append", default=[], metavar="LABEL", help="a tuned and a uniform one"
    )
    arguments = parser.parse_args()
    records = [json.loads(path.read_text(encoding="utf-8")) for path in arguments.collect]
    found = collect(records, json.loads(arguments.eval.read_text(encoding="utf-8")), dict(arguments.pair))
    RESULT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
