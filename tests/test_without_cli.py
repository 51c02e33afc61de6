"""What works where the extra `cli` is not installed: the library, and one line from the command."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BLOCKED = "import sys; sys.modules['rich'] = sys.modules['typer'] = None; "
"""From here on an import of either fails as where it is not installed."""

LIBRARY = """
import torch
from kvq import KVQ, attach
from kvq.evaluation.embedded_model import load_embedded_model
from kvq.planning import plan

model, tokenizer = load_embedded_model()
inputs = tokenizer("a b c", return_tensors="pt")
with attach(model) as attachment:
    model.generate(**inputs, max_new_tokens=4)
print(attachment.cache.memory())
print(plan(model.config, context=1000))
print(KVQ().memory()._repr_html_())
"""


def run_without(code, *arguments):
    return subprocess.run(
        [sys.executable, "-c", BLOCKED + code, *arguments], capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.costly
def test_the_library_generates_and_prints_its_tables():
    done = run_without(f"exec({LIBRARY!r})")
    assert done.returncode == 0, done.stderr
    assert "held" in done.stdout
    assert done.stdout.count("┏") == 3


@pytest.mark.parametrize("arguments", [(), ("--version",), ("doctor",)])
def test_the_command_says_what_it_needs_in_one_line(arguments):
    done = run_without("import runpy; runpy.run_module('kvq', run_name='__main__')", *arguments)
    assert done.stdout == ""
    assert done.stderr == "error: the command line needs the extra `cli`: pip install '.[cli]' in the checkout of kvq\n"
    assert done.returncode == 2


def test_only_the_command_line_imports_them():
    root = Path(__file__).parents[1] / "kvq"
    users = {
        str(path.relative_to(root).parts[0])
        for path in root.rglob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if line.startswith(("import typer", "import rich", "from typer", "from rich"))
    }
    assert users == {"cli"}


def test_another_module_that_is_missing_is_no_matter_of_the_extra(monkeypatch):
    from kvq.__main__ import main

    monkeypatch.delitem(sys.modules, "kvq.cli", raising=False)
    monkeypatch.setitem(sys.modules, "kvq.cli.demo", None)
    with pytest.raises(ModuleNotFoundError, match=r"kvq\.cli\.demo"):
        main()
