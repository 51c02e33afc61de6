"""Where the definition of a qualified name stands in a tree, and where in it a pattern occurs."""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGES = ("kvq", "kvq_backends")
DEFINING = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


@dataclass(frozen=True)
class Place:
    """One occurrence of a pattern.

    Attributes:
        path: the file.
        start: its first character, counted from the beginning of the file.
        stop: the character after its last one.
    """

    path: Path
    start: int
    stop: int

    def replaced(self, new: str) -> str:
        """Return the text of the file with something else in this place."""
        text = self.path.read_text(encoding="utf-8")
        return text[: self.start] + new + text[self.stop :]


def find_places(root: Path, file: str | None, where: str, pattern: str) -> list[Place]:
    """Return all occurrences of a pattern in the definitions of a name.

    Args:
        root: of the tree.
        file: the only file to search, from the root; None searches the packages.
        where: the qualified name of a function, method, class or constant, as `Class.method`.
        pattern: a piece of code; line breaks and spaces between its words and signs do not count.
    """
    paths = [root / file] if file else sorted(path for name in PACKAGES for path in (root / name).rglob("*.py"))
    sought = _compile(pattern)
    return [place for path in paths if path.is_file() for place in _places_in(path, where, sought)]


def is_inside(path: Path, where: str, line: int) -> bool:
    """Return whether a line of a file, counted from 1, belongs to a definition of a name."""
    definitions = _definitions(ast.parse(path.read_text(encoding="utf-8")).body, "")
    return any(name == where and node.lineno <= line <= (node.end_lineno or 0) for name, node in definitions)


def _places_in(path: Path, where: str, sought: re.Pattern[str]) -> Iterator[Place]:
    text = path.read_text(encoding="utf-8")
    if where.rpartition(".")[2] not in text or not sought.search(text):
        return
    for start, stop in _find_spans(text, where):
        for match in sought.finditer(text, start, stop):
            yield Place(path, *match.span())


def _find_spans(text: str, where: str) -> Iterator[tuple[int, int]]:
    """Yield where the definitions of a name begin and end; a property and its setter have one name."""
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    for name, node in _definitions(ast.parse(text).body, ""):
        if name == where:
            assert node.end_lineno is not None
            yield starts[node.lineno - 1], starts[node.end_lineno]


def _definitions(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, ast.stmt]]:
    for node in body:
        if isinstance(node, DEFINING):
            yield prefix + node.name, node
            yield from _definitions(node.body, f"{prefix}{node.name}.")
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from ((prefix + target.id, node) for target in targets if isinstance(target, ast.Name))
        elif isinstance(node, (ast.If, ast.Try)):
            yield from _definitions([*node.body, *node.orelse], prefix)


def _compile(pattern: str) -> re.Pattern[str]:
    words = re.findall(r"\w+|[^\w\s]", pattern)
    expression = re.escape(words[0])
    for before, word in itertools.pairwise(words):
        both_words = re.match(r"\w", before) and re.match(r"\w", word)
        expression += (r"\s+" if both_words else r"\s*") + re.escape(word)
    first = r"(?<!\w)" if re.match(r"\w", words[0]) else ""
    last = r"(?!\w)" if re.match(r"\w", words[-1]) else ""
    return re.compile(first + expression + last)
