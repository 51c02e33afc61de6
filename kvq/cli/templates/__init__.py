"""The distribution that `kvq new-backend` writes, as texts with names to fill in.

`plugins/kvq-template` is what it writes for the name `template`; a test compares the two.
"""

from __future__ import annotations

import re
from importlib import metadata, resources
from pathlib import Path
from string import Template

NAME_PATTERN = re.compile(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*")
"""Names that serve as a backend's, a distribution's and, with `_` for `-`, a module's."""
GROUP = "kvq.backends"
FILES = {
    "pyproject.toml": "common/pyproject.toml",
    "README.md": "common/README.md",
    "${name}.yaml": "common/configuration.yaml",
    "src/${module}/__init__.py": "common/__init__.py",
    "src/${module}/options.py": "common/options.py",
    "src/${module}/plugin.py": "{kind}/plugin.py",
    "src/${module}/quantizer.py": "{kind}/quantizer.py",
    "tests/test_${identifier}.py": "{kind}/test.py",
}
"""The files of a distribution, and the texts that they are made from."""
WORDS = {
    "affine": {
        "summary": "symmetric absmax rounding of each group",
        "quantizer": "from a group of numbers to codes, scale and offset",
        "rest": "packing at every width, storage, windows, fast attention, memory reports, generation",
    },
    "general": {
        "summary": "symmetric absmax rounding of each vector",
        "quantizer": "from blocks of vectors to the tensors that are stored, and back",
        "rest": "storage, windows, attention, memory reports, generation",
    },
}
"""What the two kinds say of themselves."""


def find_owner(name: str) -> str | None:
    """Return the distribution that a backend's name belongs to, or None if it is free."""
    for point in metadata.entry_points(group=GROUP):
        if point.name.replace("-", "_") == name.replace("-", "_"):
            return point.dist.name if point.dist is not None else point.value
    return None


def write_distribution(target: Path, name: str, *, general: bool) -> list[Path]:
    """Write the files of a new distribution.

    Args:
        target: its folder, which does not exist.
        name: the backend's name, as in `NAME_PATTERN`.
        general: whether its quantizer stores tensors of its own rather than codes on a line.

    Returns:
        The files written.

    Raises:
        OSError: the folder exists, or something cannot be written.
    """
    texts = render(name, general=general)
    target.mkdir()
    for path, text in texts.items():
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        (target / path).write_text(text, encoding="utf-8")
    return [target / path for path in texts]


def render(name: str, *, general: bool) -> dict[str, str]:
    """Return the text of each file by its path within the distribution."""
    kind = "general" if general else "affine"
    identifier = name.replace("-", "_")
    words = {"name": name, "identifier": identifier, "module": f"kvq_{identifier}", **WORDS[kind]}
    words["camel"] = "".join(part.capitalize() for part in identifier.split("_"))
    folder = resources.files(__name__)
    return {
        Template(path).substitute(words): Template(
            folder.joinpath(*f"{source.format(kind=kind)}.txt".split("/")).read_text(encoding="utf-8")
        ).substitute(words)
        for path, source in FILES.items()
    }
