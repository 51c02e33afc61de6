"""plugins/README.md, followed by machine: what `kvq new-backend` writes is installed, tested, and generates."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys

import pytest
from installed_plugins import PLUGINS, environment_with, install

README = (PLUGINS / "README.md").read_text(encoding="utf-8")
GENERATE = "import scripts_generate; scripts_generate.main('mine')"
CHECKS = "check_spec or check_light_import or check_defaults or 4-per_token or half_a_step"
"""The tests of the distribution that are run here; `make plugin` runs all of the template's."""


def find_steps() -> list[str]:
    """Return the shell commands of the steps, in order."""
    steps = README.split("## Five steps")[1].split("\n## ")[0]
    blocks = re.findall(r"```sh\n(.*?)```", steps, re.DOTALL)
    return [line.strip() for block in blocks for line in block.splitlines() if line.strip()]


def test_the_steps_are_those_that_are_run_here():
    numbered = re.findall(r"^(\d)\. ", README.split("## Five steps")[1].split("\n## ")[0], re.MULTILINE)
    assert numbered == ["1", "2", "3", "4", "5"]
    assert find_steps() == [
        "kvq new-backend mine",
        "pip install -e ./kvq-mine",
        "kvq backends mine",
        "kvq check mine",
        "kvq demo --backend mine",
    ]


@pytest.mark.costly
@pytest.mark.parametrize("options", [[], ["--general"]], ids=["affine", "general"])
def test_the_five_steps_make_a_backend_that_generates(tmp_path, options):
    site = tmp_path / "site"
    site.mkdir()

    def run(*command, cwd=tmp_path):
        environment = environment_with(site)
        return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, cwd=cwd)

    done = run("-m", "kvq", *find_steps()[0].split()[1:], *options)
    assert done.returncode == 0, done.stderr
    install(tmp_path / "kvq-mine", site)
    done = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", CHECKS, cwd=tmp_path / "kvq-mine")
    assert done.returncode == 0, done.stdout
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 25
    shutil.copy(PLUGINS.parent / "scripts" / "generate_with.py", site / "scripts_generate.py")
    done = run("-c", GENERATE)
    assert done.returncode == 0, done.stderr
    assert "mine 4 bit" in done.stdout
    done = run("-m", "kvq", "new-backend", "mine", "--folder", str(site))
    assert (done.returncode, done.stdout) == (2, "")
    assert "the name 'mine' belongs to kvq-mine" in done.stderr
