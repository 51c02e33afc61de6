"""The command line as a user meets it: another process, and a plugin that is not ours."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kvq.cli import main
from kvq.cli.progress import LINE_LABEL
from kvq.registry import BackendRegistry

Run = Callable[..., subprocess.CompletedProcess[str]]
CLEARED = ("FORCE_COLOR", "KVQ_PLUGINS", "KVQ_BLOCK_PLUGINS")
"""Variables of whoever runs the tests that a command must not see."""

TOY_PLUGIN = """
from pydantic import Field
import torch
from kvq.plugin_api import API_VERSION, BackendOptions, BackendSpec, Capabilities, Granularity, hookimpl

class Options(BackendOptions):
    strength: int = Field(default=3, description="how strong [bold]it[/bold] is")

class Quantizer:
    group_local = True

    def encode(self, groups):
        scale = groups.amax(-1).sub(groups.amin(-1)) / 15
        offset = groups.amin(-1)
        codes = (groups - offset[..., None]) / scale.clamp(min=1e-30)[..., None]
        return codes.round().to(torch.uint8), scale, offset

@hookimpl
def kvq_backend():
    return BackendSpec(
        name="toy",
        api_version=API_VERSION,
        capabilities=Capabilities(nbits=(4, 8)),
        build=lambda spec, options: Quantizer(),
        options=Options,
        axis_names={7: Granularity.PER_TOKEN},
        requires=("packaging>=20",),
        summary="a toy " + "whose summary is long " * 20 + "and ends here",
        url="https://toy.example",
    )
"""
NEEDY_PLUGIN = """
from kvq.plugin_api import API_VERSION, BackendSpec, Capabilities, hookimpl

@hookimpl
def kvq_backend():
    return BackendSpec(
        name="needy",
        api_version=API_VERSION,
        capabilities=Capabilities(nbits=(2,)),
        build=lambda spec, options: None,
        requires=("no-such-distribution>=3",),
    )
"""
JUDGED_PLUGIN = """
import torch
from kvq.plugin_api import API_VERSION, BackendSpec, Capabilities, Granularity, hookimpl

class Right:
    group_local = True

    def encode(self, groups):
        low, high = groups.aminmax(dim=-1)
        scale = (high - low) / 255
        codes = (groups - low[..., None]) / torch.where(scale > 0, scale, 1.0)[..., None]
        return self.finish(codes.round().clamp(0, 255).to(torch.uint8)), scale, low

    def finish(self, codes):
        return codes

class Wrong(Right):
    def finish(self, codes):
        return codes & 254 | torch.randint_like(codes, 2)

@hookimpl
def kvq_backend():
    return BackendSpec(
        name=NAME,
        api_version=API_VERSION,
        summary="judged by the kit",
        capabilities=Capabilities(nbits=(8,), granularities=(Granularity.PER_TOKEN,)),
        build=lambda spec, options: BUILT(),
    )
"""
FAULTY_PLUGIN = """
print("noise of a plugin on stdout")
raise RuntimeError("the plugin is ill")
"""
PLUGINS = ("toy_plugin", "needy_plugin", "faulty_plugin", "right_plugin", "wrong_plugin")
"""Modules of the plugins that tests install."""


def install(folder: Path, name: str, version: str, entry_points: str = "") -> None:
    """Make a distribution that consists of its metadata."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(entry_points)


def without_progress(text: str) -> str:
    """Leave out the lines of progress: how many there are depends on how busy the machine is."""
    return "".join(line for line in text.splitlines(keepends=True) if not line.startswith(LINE_LABEL))


@pytest.fixture
def run(tmp_path) -> Run:
    """Return a function that runs Python in a fresh folder; keywords are environment variables."""

    def call(*args: str, **variables: object) -> subprocess.CompletedProcess[str]:
        kept = {name: value for name, value in os.environ.items() if name not in CLEARED}
        environment = {**kept, **{name: str(value) for name, value in variables.items()}}
        command = [sys.executable, *args]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
        return subprocess.CompletedProcess(args, done.returncode, done.stdout, without_progress(done.stderr))

    return call


@pytest.fixture
def run_kvq(run) -> Run:
    """Return a function that runs a command of kvq."""
    return lambda *args, **variables: run("-m", "kvq", *args, **variables)


@pytest.fixture
def call_kvq(tmp_path, monkeypatch, capsys) -> Run:
    """Return a function that runs a command of kvq in this process, in a fresh folder and without network.

    A process of its own takes seconds to import torch. Keywords are environment variables; what PYTHONPATH names is on
    the path during the call, and plugins are looked for anew. test_command_line.py starts one for each command.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def call(*args: str, keep_progress: bool = False, **variables: object) -> subprocess.CompletedProcess[str]:
        capsys.readouterr()
        with monkeypatch.context() as patch:
            for name in CLEARED:
                patch.delenv(name, raising=False)
            for name, value in variables.items():
                patch.setenv(name, str(value))
            if "PYTHONPATH" in variables:
                patch.syspath_prepend(str(variables["PYTHONPATH"]))
            patch.setattr("kvq.registry.registry._registry", BackendRegistry())
            patch.setattr("sys.argv", ["kvq", *args])
            with pytest.raises(SystemExit) as ended:
                main()
        for name in PLUGINS:
            sys.modules.pop(name, None)
        printed = capsys.readouterr()
        code = ended.value.code if isinstance(ended.value.code, int) else 0
        errors = printed.err if keep_progress else without_progress(printed.err)
        return subprocess.CompletedProcess(args, code, printed.out, errors)

    return call


@pytest.fixture
def toy_path(tmp_path) -> Path:
    """Return a folder with a foreign distribution of three backends: one works, one needs more, one is broken."""
    folder = tmp_path / "foreign"
    install(folder, "toybox", "1.2", "[kvq.backends]\ntoy = toy_plugin\nneedy = needy_plugin\nfaulty = faulty_plugin\n")
    (folder / "toy_plugin.py").write_text(TOY_PLUGIN)
    (folder / "needy_plugin.py").write_text(NEEDY_PLUGIN)
    (folder / "faulty_plugin.py").write_text(FAULTY_PLUGIN)
    return folder


@pytest.fixture
def judged_path(tmp_path) -> Path:
    """Return a folder with a distribution of two backends: `right` keeps the contract, `wrong` rounds at random."""
    folder = tmp_path / "judged"
    install(folder, "judged", "1.0", "[kvq.backends]\nright = right_plugin\nwrong = wrong_plugin\n")
    for name in ("right", "wrong"):
        text = JUDGED_PLUGIN.replace("NAME", repr(name)).replace("BUILT", name.title())
        (folder / f"{name}_plugin.py").write_text(text)
    return folder


@pytest.fixture
def make_distribution(tmp_path) -> Callable[[str, str], Path]:
    """Return a function that makes a distribution without code, and returns the folder to find it in."""

    def make(name: str, version: str) -> Path:
        install(tmp_path / "shadow", name, version)
        return tmp_path / "shadow"

    return make
