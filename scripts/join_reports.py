"""Join JSON reports into one file: `python scripts/join_reports.py OUT name=FILE ...`."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> None:
    target, *named = sys.argv[1:]
    parts = dict(one.split("=", 1) for one in named)
    joined = {name: json.loads(Path(path).read_text(encoding="utf-8")) for name, path in parts.items()}
    Path(target).write_text(json.dumps(joined, indent=1) + "\n", encoding="utf-8")
    print(f"{target}: {', '.join(joined)}")


if __name__ == "__main__":
    main()
