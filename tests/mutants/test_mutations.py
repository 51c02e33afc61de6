"""The mutations still fit the code; that each is killed is shown by `make mutants`, which takes minutes."""

import ast
from pathlib import Path

import pytest
from mutations import load_mutations

ROOT = Path(__file__).parents[2]
MUTATIONS = load_mutations()
INVARIANTS = set(range(1, 8))


def names_in(path):
    """Return what pytest can find in a file: its functions, its classes, and classes bound by assignment."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    defined = {node.name for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    targets = [target for node in body if isinstance(node, ast.Assign) for target in node.targets]
    return defined | {target.id for target in targets if isinstance(target, ast.Name)}


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_its_old_line_occurs_exactly_once(mutation):
    assert mutation.count_in(ROOT) == 1
    before, after = (ROOT / mutation.file).read_text(encoding="utf-8"), mutation.mutated(ROOT)
    changed = [pair for pair in zip(before.splitlines(), after.splitlines(), strict=True) if pair[0] != pair[1]]
    assert len(changed) == 1
    ast.parse(after)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_its_test_exists(mutation):
    path, _, name = mutation.test.partition("::")
    assert name.lower().startswith("test")
    assert name in names_in(ROOT / path)


def test_every_invariant_has_some_of_unlike_kinds():
    lines = {invariant: {(m.file, m.old) for m in MUTATIONS if m.breaks == invariant} for invariant in INVARIANTS}
    assert {invariant: len(found) for invariant, found in lines.items() if len(found) < 3} == {}
    assert all(isinstance(m.breaks, str) or m.breaks in INVARIANTS for m in MUTATIONS)
    assert len({m.name for m in MUTATIONS}) == len(MUTATIONS)
