"""Draw random mutants of the code with the operators of cosmic-ray; the first half of `make mutants-sampled`.

It runs in an environment that has cosmic-ray and nothing of ours, and writes the mutants as JSON for sampled.py. The
same seed, number and code give the same mutants.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

ROOT = Path(__file__).parents[2]
IDENTITY = re.compile(r"(Eq|Lt|Gt|E)_Is")
"""Operators that ask for identity in place of equality or order: the same for the small integers of a test."""


def list_places(file: str, code: str) -> Iterator[tuple[str, str, int, int]]:
    """Yield what can be mutated: the file, the operator, which of its occurrences, and the line."""
    nodes = list(ast_nodes(get_ast(code)))
    for name in operator_names():
        kind = get_operator(name)
        if kind.arguments() or IDENTITY.search(name):
            continue
        found = (start for node in nodes for start, _ in kind().mutation_positions(node))
        yield from ((file, name, number, line) for number, (line, _) in enumerate(found))


def draw(files: list[str], seed: int, count: int) -> Iterator[dict[str, Any]]:
    """Yield mutants, lines of the files being equally likely, and then the operators that change such a line."""
    codes = {file: (ROOT / file).read_text(encoding="utf-8") for file in files}
    lines: dict[tuple[str, int], list[tuple[str, int]]] = {}
    for file, code in codes.items():
        for _, name, number, line in list_places(file, code):
            lines.setdefault((file, line), []).append((name, number))
    chance = random.Random(seed)  # noqa: S311
    for file, line in chance.sample(sorted(lines), len(lines)):
        name, number = chance.choice(sorted(lines[file, line]))
        mutated = mutate_code(codes[file], get_operator(name)(), number)
        if mutated is None or not is_other_code(mutated, codes[file]):
            continue
        yield {"file": file, "line": line, "operator": name, "text": mutated}
        count -= 1
        if not count:
            return


def is_other_code(mutated: str, original: str) -> bool:
    """Return whether a mutant is Python and means something else; the operators also change the `*` of a signature."""
    try:
        return skeleton(mutated) != skeleton(original)
    except SyntaxError:
        return False


def skeleton(code: str) -> str:
    """Return the syntax tree without annotations, which are not evaluated, and without how a class is frozen."""
    tree = ast.parse(code)
    for node in ast.walk(tree):
        for field in ("annotation", "returns"):
            if getattr(node, field, None) is not None:
                setattr(node, field, None)
        if isinstance(node, ast.ClassDef):
            node.decorator_list = []
    return ast.dump(tree)


def main() -> None:
    """Write the mutants to a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", help="from the root of the tree")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    mutants = list(draw(sorted(arguments.files), arguments.seed, arguments.count))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(mutants, indent=1), encoding="utf-8")
    sys.stdout.write(f"{len(mutants)} mutants in {arguments.out}\n")


if __name__ == "__main__":
    main()
