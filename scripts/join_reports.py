"""Join JSON reports into one file: `python scripts/join_reports.py OUT name=FILE ...`.

Paths into this repository lose the part that only this machine has.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    target, *named = sys.argv[1:]
    parts = dict(one.split("=", 1) for one in named)
    joined = {name: json.loads(Path(path).read_text(encoding="utf-8")) for name, path in parts.items()}
    text = json.dumps(joined, indent=1).replace(f"{ROOT}/", "")
    Path(target).write_text(f"{text}\n", encoding="utf-8")
    print(f"{target}: {', '.join(joined)}")


if __name__ == "__main__":
    main()
