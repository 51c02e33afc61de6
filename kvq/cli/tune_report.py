"""What `kvq tune` prints and writes beside the configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from kvq.cli.console import print_line, print_table, print_warning
from kvq.cli.outputs import write_output

if TYPE_CHECKING:
    from kvq.tuning import TunedCache


def show_answer(answer: TunedCache, model_name: str) -> None:
    """Print the settings of each layer, the front, and what was measured on the held-out text."""
    from kvq.tuning.report import FRONT_COLUMNS, LAYER_COLUMNS, front_rows, layer_rows, list_lines

    print_line(f"{model_name}: {answer.plan.goal}")
    print_line()
    print_table(LAYER_COLUMNS, layer_rows(answer))
    print_line()
    print_table(FRONT_COLUMNS, front_rows(answer))
    print_line()
    for line in list_lines(answer):
        print_line(line)
    for warning in (*answer.warnings, *answer.memory.warnings):
        print_warning(warning)


def write_record(answer: TunedCache, model_name: str, command: str, path: Path) -> None:
    """Write everything measured as JSON, in the form of `kvq eval --out` with `tuning` beside it."""
    from kvq.tuning.report import describe_answer

    found = describe_answer(answer, model_name, command)
    write_output(path, json.dumps(found, indent=1, allow_nan=False) + "\n")


def write_front(answer: TunedCache, model_name: str, command: str, folder: Path) -> None:
    """Write a configuration for each point of the front, named by its bits an element."""
    from kvq.tuning.tuned_file import describe_point

    folder.mkdir(exist_ok=True)
    for point in answer.front:
        write_output(folder / f"{point.bits:.2f}.yaml", describe_point(point, answer, model_name, command))
