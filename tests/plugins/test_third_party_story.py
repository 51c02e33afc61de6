"""docs/third-party.md, followed by machine: every block in its order, as commands, files and a program."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from installed_plugins import ROOT, environment_with, install

PAGE = (ROOT / "docs" / "third-party.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
FILE = re.compile(r"`([\w./-]+\.(?:py|yaml))`(?=\.| names|:)")


def read_page():
    """Yield each block as (language, text, the file that it is or None)."""
    for found in BLOCK.finditer(PAGE):
        paragraph = PAGE[: found.start()].rstrip().rpartition("\n\n")[2]
        named = FILE.findall(paragraph)
        yield found[1], found[2], named[-1] if named and found[1] != "sh" else None


def test_the_page_has_the_blocks_that_are_run_here():
    assert [(language, file) for language, _, file in read_page()] == [
        ("sh", None),
        ("python", "kvq-mine/src/kvq_mine/quantizer.py"),
        ("python", "kvq-mine/src/kvq_mine/plugin.py"),
        ("sh", None),
        ("sh", None),
        ("yaml", "base.yaml"),
        ("sh", None),
        ("python", None),
        ("sh", None),
    ]


@pytest.mark.costly
def test_the_story_holds_from_end_to_end(tmp_path):
    site = tmp_path / "site"
    site.mkdir()
    sources = os.fspath(tmp_path / "kvq-mine" / "src")
    printed = []

    def run(*command):
        environment = environment_with(site) | {"KVQ_KERNEL_TRIALS": "off"}
        environment["PYTHONPATH"] = os.pathsep.join([sources, environment["PYTHONPATH"]])
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, cwd=tmp_path)
        assert done.returncode == 0, (command, done.stdout[-2000:], done.stderr[-2000:])
        printed.append(done.stdout)

    for language, text, file in read_page():
        if file is not None:
            (tmp_path / file).write_text(text, encoding="utf-8")
        elif language == "python":
            run("-c", text)
        for line in text.splitlines() if language == "sh" else ():
            program, *arguments = shlex.split(line)
            if program == "pip":
                assert arguments == ["install", "-e", "./kvq-mine"]
                install(tmp_path / "kvq-mine", site)
                shutil.rmtree(site / "kvq_mine")  # an editable one leads to the sources
            else:
                assert program == "kvq"
                run("-m", "kvq", *arguments)
    before, after = (text for text in printed if "how kernels of attention read it" in text)
    assert "serves quantizers with a packed format, not MineQuantizer" in before
    assert "serves quantizers with a packed format" not in after
    assert "mine keeps the contract" in "".join(printed)
    assert "statistics of the model  optional" in after
    tuned = (tmp_path / "tuned.yaml").read_text()
    assert "backend: mine" in tuned
    assert "digest: " in tuned
    assert re.search(r"read by: (compiled|eager)", printed[-2])
    assert "vllm" in printed[-1]
    assert (tmp_path / "prompt.kvq").stat().st_size > 10_000
