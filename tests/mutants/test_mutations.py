"""The mutations still fit the code; that each is killed is shown by `make mutants`, which takes minutes."""

import ast
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from definitions import find_places
from mutations import MisfitError, load_mutations

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
MUTATIONS = load_mutations()
INVARIANTS = set(range(1, 8))


def names_in(path):
    """Return what pytest can find in a file: its functions, its classes, and classes bound by assignment."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    defined = {node.name for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    targets = [target for node in body if isinstance(node, ast.Assign) for target in node.targets]
    return defined | {target.id for target in targets if isinstance(target, ast.Name)}


def find_misfit(mutation):
    """Return why a mutation does not fit the code, or None."""
    try:
        place = mutation.find_place(ROOT)
        before, after = (
            ast.dump(ast.parse(text)) for text in (place.path.read_text(encoding="utf-8"), place.replaced(mutation.new))
        )
    except MisfitError as misfit:
        return str(misfit)
    except SyntaxError as error:
        return f"the new code is no Python: {error}"
    if before == after:
        return "the code stays the same"
    path, _, name = mutation.test.partition("::")
    if not name.lower().startswith("test") or not (ROOT / path).is_file() or name not in names_in(ROOT / path):
        return f"there is no {mutation.test}"
    return None


@pytest.mark.costly
def test_each_fits_the_code_and_its_test_exists():
    misfits = {mutation.name: find_misfit(mutation) for mutation in MUTATIONS}
    assert {name: why for name, why in misfits.items() if why} == {}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"old": "nowhere"}, "occurs 0 times"),
        ({"where": "ChunkedStore.nowhere"}, "occurs 0 times"),
        ({"old": "self"}, "times in"),
        ({"new": MUTATIONS[0].old}, "stays the same"),
        ({"new": "self._copied(("}, "no Python"),
        ({"test": "tests/test_cache.py::test_nothing"}, "there is no"),
        ({"test": "tests/test_nowhere.py::test_nothing"}, "there is no"),
    ],
)
def test_one_that_does_not_fit_is_told(change, why):
    assert find_misfit(MUTATIONS[0]) is None
    assert why in find_misfit(replace(MUTATIONS[0], **change))


def test_every_invariant_has_some_of_unlike_kinds():
    pieces = {invariant: {(m.where, m.old) for m in MUTATIONS if m.breaks == invariant} for invariant in INVARIANTS}
    assert {invariant: len(found) for invariant, found in pieces.items() if len(found) < 3} == {}
    assert all(isinstance(m.breaks, str) or m.breaks in INVARIANTS for m in MUTATIONS)
    assert len({m.name for m in MUTATIONS}) == len(MUTATIONS)


RANDOM_PLACES = ("kvq/store", "kvq/attention")
"""Where `make mutants-sampled` draws."""
PLACES = yaml.safe_load((HERE / "tests_by_place.yaml").read_text(encoding="utf-8"))
SURVIVORS = yaml.safe_load((HERE / "survivors.yaml").read_text(encoding="utf-8"))


def test_every_place_of_a_random_mutant_has_tests():
    files = [path.relative_to(ROOT).as_posix() for name in RANDOM_PLACES for path in (ROOT / name).rglob("*.py")]
    assert [file for file in files if not file.startswith(tuple(PLACES))] == []
    assert [place for place in PLACES if not any(file.startswith(place) for file in files)] == []
    assert [test for tests in PLACES.values() for test in tests if not (ROOT / test).exists()] == []


def test_every_survivor_that_is_explained_is_still_a_piece_of_the_code():
    counts = {entry["old"]: len(find_places(ROOT, None, entry["where"], entry["old"])) for entry in SURVIVORS}
    assert {old: count for old, count in counts.items() if count != 1} == {}
    assert all(entry["why"] and entry["old"] != entry["new"] for entry in SURVIVORS)
