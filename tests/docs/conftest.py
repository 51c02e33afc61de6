"""What README.md and the examples are checked with."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from foreign_model import save_foreign_model

ROOT = Path(__file__).resolve().parents[2]

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message.role }}] {{ message.content | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.fixture
def run_example(tmp_path):
    """Return a function that runs an example in another process and another folder, and returns what it prints."""

    def call(name, *arguments):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"}
        command = [sys.executable, str(ROOT / "examples" / name), *map(str, arguments)]
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", cwd=tmp_path, env=environment, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return call


@pytest.fixture(scope="session")
def foreign_model(tmp_path_factory):
    """A folder with a random model that is not ours; see `save_foreign_model`."""
    return save_foreign_model(tmp_path_factory.mktemp("model"), CHAT_TEMPLATE)
