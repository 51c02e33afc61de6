"""Write docs/models.md: run the checks of tests/models on every kind of model.

python scripts/update_models_page.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers.utils import logging

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "models"))

from checks import examine  # noqa: E402  # of the tests, which are no package
from families import FAMILIES  # noqa: E402
from page import PAGE, render  # noqa: E402


def main() -> None:
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    PAGE.write_text(render([examine(family) for family in FAMILIES.values()]), encoding="utf-8")


if __name__ == "__main__":
    main()
