"""plugins/README.md, followed by machine: a copy of the template under another name generates."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys

import pytest
from installed_plugins import PLUGINS, environment_with, install

README = (PLUGINS / "README.md").read_text(encoding="utf-8")
GENERATE = """
import torch
from kvq import available_backends
from kvq.testing import list_checks, run_checks
import scripts_generate
scripts_generate.main("mine")
checks = ["check_spec", "check_light_import", "check_accuracy", "check_layout"]
results = [result for result in run_checks(list_checks("mine", only=checks)) if result.case.startswith("4-")
           or result.check in checks[:2]]
print(sorted({(result.check, result.outcome) for result in results}))
"""


def find_steps() -> list[str]:
    """Return the shell commands of the steps, in order."""
    steps = README.split("## Five steps")[1].split("\n## ")[0]
    return [line.strip() for block in re.findall(r"```sh\n(.*?)```", steps, re.DOTALL) for line in block.splitlines()]


@pytest.mark.costly
def test_the_five_steps_make_a_backend_that_generates(tmp_path):
    shutil.copytree(PLUGINS, tmp_path / "plugins", ignore=shutil.ignore_patterns("__pycache__"))
    numbered = re.findall(r"^(\d)\. ", README.split("## Five steps")[1].split("\n## ")[0], re.MULTILINE)
    assert numbered == ["1", "2", "3", "4", "5"]
    commands = find_steps()
    copying = [line for line in commands if line.startswith(("cp", "mv", "grep", "sed"))]
    assert len(copying) >= 4
    for line in copying:
        subprocess.run(["/bin/sh", "-ec", line], cwd=tmp_path, check=True)
    texts = {path: path.read_text(encoding="utf-8") for path in (tmp_path / "kvq-mine").rglob("*") if path.is_file()}
    assert [path for path, text in texts.items() if "template" in f"{path.name} {text}".lower()] == []
    assert "pip install -e ./kvq-mine" in commands
    assert "kvq check mine" in commands
    site = tmp_path / "site"
    site.mkdir()
    install(tmp_path / "kvq-mine", site)
    shutil.copy(PLUGINS.parent / "scripts" / "generate_with.py", site / "scripts_generate.py")
    done = subprocess.run(
        [sys.executable, "-c", GENERATE], capture_output=True, text=True, env=environment_with(site), cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "mine 4 bit" in done.stdout
    checked = ["check_accuracy", "check_layout", "check_light_import", "check_spec"]
    assert str([(name, "passed") for name in checked]) in done.stdout
