"""Write plugins/kvq-template as `kvq new-backend template` does; a test compares the two.

python scripts/update_template_plugin.py
"""

from __future__ import annotations

import shutil
from pathlib import Path

from kvq.cli.templates import write_distribution

FOLDER = Path(__file__).parents[1] / "plugins" / "kvq-template"


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    write_distribution(FOLDER, "template", general=False)


if __name__ == "__main__":
    main()
