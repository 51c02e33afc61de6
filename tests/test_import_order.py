"""A file of kvq imports only from its own place and lower ones, and knows no backend.

Imports inside functions and under TYPE_CHECKING count like any other: they too say what a file knows of.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[1]

MAP = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## Map of the tree")[2].partition("\n## ")[0]
PLACES = {name: position for position, name in enumerate(re.findall(r"^\| `(\w+)` \|", MAP, re.MULTILINE))}
"""Every file and folder of kvq/, lowest first, as CONTRIBUTING.md maps them."""


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def list_files(*folders: str) -> dict[str, Path]:
    return {module_name(path): path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))}


KVQ = list_files("kvq")
BACKENDS = list_files("kvq_backends")
PLUGINS = {name: path for name, path in list_files("plugins").items() if "tests" not in path.parts}


def find_imports(source: str, package: str, known: set[str]) -> Iterator[str]:
    """Yield the full name of each module that `source` imports, wherever the import stands.

    `from a import b` is an import of `a.b` where that is a module among `known`.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                yield f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in {"import_module", "__import__", "LazyLoader"} and isinstance(node.args[0].value, str):
                yield node.args[0].value


def imports_of(name: str, path: Path) -> set[str]:
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    return set(find_imports(path.read_text(encoding="utf-8"), package, {*KVQ, *BACKENDS, *PLUGINS}))


def place_of(module: str) -> str:
    """Return the entry of the table for a module of kvq: its file or its folder right below kvq/."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def is_within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import kvq.cache", {"kvq.cache"}),
        ("from kvq import cache, KVQ", {"kvq.cache", "kvq"}),
        ("from kvq.cache import KVQ", {"kvq.cache"}),
        ("from . import cache", {"kvq.cache"}),
        ("from .cache import KVQ", {"kvq.cache"}),
        ("def f():\n    from kvq.cache import KVQ", {"kvq.cache"}),
        ("if TYPE_CHECKING:\n    from kvq.cache import KVQ", {"kvq.cache"}),
        ("importlib.import_module('kvq.cache')", {"kvq.cache"}),
        ("'''from kvq.cache import KVQ'''", set()),
    ],
)
def test_imports_are_found_wherever_they_stand(source, expected):
    assert set(find_imports(source, "kvq", {"kvq", "kvq.cache"})) == expected


def test_the_map_names_every_file_and_folder():
    assert len(KVQ) > 20
    assert {place_of(name) for name in KVQ} == set(PLACES)


def test_a_file_imports_from_lower_places_only():
    upward = [
        (name, imported)
        for name, path in KVQ.items()
        for imported in imports_of(name, path)
        if is_within(imported, "kvq") and PLACES[place_of(imported)] > PLACES[place_of(name)]
    ]
    assert upward == []


def test_no_file_imports_itself_through_others():
    graph = {name: {module for module in imports_of(name, path) if module in KVQ} for name, path in KVQ.items()}
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError
    assert order.index("kvq.errors") < order.index("kvq.config")


def test_kvq_imports_no_backend_no_plugin_and_no_library_of_one():
    foreign = {"kvq_backends", "plugins", "optimum", "hqq"}
    found = [(name, module) for name, path in KVQ.items() for module in imports_of(name, path)]
    assert [pair for pair in found if pair[1].partition(".")[0] in foreign] == []


def test_only_the_registry_touches_the_manager_of_pluggy():
    users = {name for name, path in KVQ.items() if "pluggy" in imports_of(name, path)}
    assert users == {"kvq.plugin_api.hooks", "kvq.registry.registry"}
    managers = {name for name, path in KVQ.items() if "PluginManager" in path.read_text(encoding="utf-8")}
    assert managers == {"kvq.registry.registry"}


def own_backend_names() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    folders = {path.parent.name for path in BACKENDS.values() if path.parent.parent == ROOT / "kvq_backends"}
    return set(project["entry-points"]["kvq.backends"]) | (folders - {"__pycache__"})


def find_backend_names(source: str, names: set[str]) -> list[str]:
    """Return the literals, other than docstrings, that consist of names of backends."""
    tree = ast.parse(source)
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    texts = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose
    ]
    return [text for text in texts if (words := set(re.findall(r"\w+", text.lower()))) and words <= names]


def test_names_of_backends_are_found_in_code_but_not_in_prose():
    source = "'''one'''\nx = 'One'\ny = ('two', 'two, one', 'one thing', '')"
    assert find_backend_names(source, {"one", "two"}) == ["One", "two", "two, one"]


def test_nothing_names_a_backend_but_the_default_and_the_presets():
    names = own_backend_names()
    assert {"quanto", "hqq"} <= names
    named = {name: found for name, path in KVQ.items() if (found := find_backend_names(path.read_text("utf-8"), names))}
    peers = named.pop("kvq.evaluation.quality.candidates")  # transformers' caches, which have names of their own
    assert set(peers) <= {"quanto", "hqq"}
    assert named == {"kvq.config.cache_config": ["quanto"], "kvq.config.presets": ["native"]}
    assert 'DEFAULT_BACKEND = "quanto"' in KVQ["kvq.config.cache_config"].read_text(encoding="utf-8")


def test_a_backend_imports_the_plugin_api_and_itself_only():
    wrong = []
    for name, path in {**BACKENDS, **PLUGINS}.items():
        own_folder = ".".join(name.split(".")[:2])
        for module in imports_of(name, path):
            is_of_kvq = is_within(module, "kvq") and module != "kvq.plugin_api"
            is_another = module.partition(".")[0] in {"kvq_backends", "plugins"} and not is_within(module, own_folder)
            if is_of_kvq or is_another:
                wrong.append((name, module))
    assert wrong == []
    assert len(BACKENDS) > 9
    assert len(PLUGINS) > 9
