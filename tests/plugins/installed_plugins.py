"""Installing a plugin of the tree into a folder, as a wheel would: its package and its metadata, without an index."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[2]
PLUGINS = ROOT / "plugins"


def list_plugins() -> list[str]:
    """Return the folders of plugins/ that are distributions."""
    return sorted(path.parent.name for path in PLUGINS.glob("*/pyproject.toml"))


def read_project(folder: Path) -> dict:
    return tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))


def install(folder: Path, site: Path) -> None:
    """Put into `site` what `pip install --no-deps --target site folder` would put there."""
    described = read_project(folder)
    project = described["project"]
    for package in described["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]:
        shutil.copytree(folder / package, site / Path(package).name, ignore=shutil.ignore_patterns("__pycache__"))
    info = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    required = "".join(f"Requires-Dist: {text}\n" for text in project["dependencies"])
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n{required}"
    )
    lines = [f"[{group}]" for group in project["entry-points"]]
    for group, points in project["entry-points"].items():
        lines[lines.index(f"[{group}]") + 1 :] = [f"{name} = {value}" for name, value in points.items()]
    (info / "entry_points.txt").write_text("\n".join([*lines, ""]))


def environment_with(*sites: Path) -> dict[str, str]:
    """Return environment variables under which those folders are on the path."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("KVQ_") and key != "FORCE_COLOR"}
    path = os.pathsep.join([*map(str, sites), *filter(None, [os.environ.get("PYTHONPATH", "")])])
    return {**kept, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
