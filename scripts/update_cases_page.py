"""Write docs/cases.md from the tests that carry `@pytest.mark.case(what, outcome, report=...)`; nothing is imported.

python scripts/update_cases_page.py             # write docs/cases.md
python scripts/update_cases_page.py --check     # exit code 1 if it is not up to date
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_table import table

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests"
PAGE = ROOT / "docs" / "cases.md"
REPORT = re.compile(r"([\w.-]+/[\w.-]+)#([1-9][0-9]*)")

TEXT = """# Inputs that were reported, or tried to break it

Written by `make cases` from the tests that carry `@pytest.mark.case`; if this page is wrong, one of those tests
fails. A report is the public issue or pull request that the input comes from, most of them about the caches of other
projects. A row without a report was tried here. Wrong or extreme input to `KVQ.update` and the operations of a cache
is on its own page, [bad input](bad-input.md).

{count}

{sections}
"""


@dataclass(frozen=True)
class Case:
    """One marker.

    Attributes:
        path: the file of its test, relative to the repository.
        test: the name of the test, with its class where it has one.
        what: the input.
        outcome: what happens.
        report: `owner/repo#N`, or None.
    """

    path: str
    test: str
    what: str
    outcome: str
    report: str | None

    @property
    def row(self) -> tuple[str, str, str, str]:
        """The cells of its row."""
        return self.what, self.outcome, _link(self.report), f"`{self.test}`"


def find_cases(path: Path, root: Path = ROOT) -> list[Case]:
    """Return the cases of one file of tests.

    Raises:
        ValueError: a marker stands on no test, or is not made of texts of one line and a report `owner/repo#N`.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    name = path.relative_to(root).as_posix()
    marked = {id(call): (test, call) for test, call in _marked_tests(tree)}
    stray = [node.lineno for node in ast.walk(tree) if _is_marker(node) and id(node) not in marked]
    if stray:
        raise ValueError(f"{name}:{stray[0]}: the marker `case` belongs above a test, or in a pytest.param of its own")
    return [_read(name, test, call) for test, call in marked.values()]


def _marked_tests(tree: ast.AST, outer: str = "") -> Iterator[tuple[str, ast.Call]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef):
            yield from _marked_tests(node, f"{outer}{node.name}::")
        elif isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            for decorator in node.decorator_list:
                yield from ((outer + node.name, call) for call in ast.walk(decorator) if _is_marker(call))


def _is_marker(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.case"


def _read(path: str, test: str, call: ast.Call) -> Case:
    place = f"{path}:{call.lineno}"
    try:
        texts = [ast.literal_eval(argument) for argument in call.args]
        named = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    except ValueError as error:
        raise ValueError(f"{place}: write the texts of the marker out, no file is imported to find them") from error
    report = named.pop("report", None)
    if len(texts) != 2 or named or not all(isinstance(text, str) and _is_line(text) for text in texts):
        raise ValueError(f"{place}: two texts of one line are needed, what and outcome, and no keyword but report=")
    if report is not None and not (isinstance(report, str) and REPORT.fullmatch(report)):
        raise ValueError(f"{place}: report={report!r} is not 'owner/repo#N'")
    return Case(path, test, texts[0], texts[1], report)


def _is_line(text: str) -> bool:
    return bool(text.strip()) and text == " ".join(text.split())


def _link(report: str | None) -> str:
    if report is None:
        return ""
    repository, _, number = report.partition("#")
    # GitHub leads from the address of an issue to that of a pull request of the same number.
    return f"[{report}](https://github.com/{repository}/issues/{number})"


def render(cases: Iterable[Case]) -> str:
    """Return the page: a section a file, sorted, for any order of the cases."""
    by_path: dict[str, set[Case]] = {}
    for case in cases:
        by_path.setdefault(case.path, set()).add(case)
    sections = [_render_section(path, by_path[path]) for path in sorted(by_path)]
    total = sum(map(len, by_path.values()))
    reports = {case.report for found in by_path.values() for case in found} - {None}
    return TEXT.format(count=f"{total} inputs, {len(reports)} public reports.", sections="\n\n".join(sections))


def _render_section(path: str, cases: set[Case]) -> str:
    rows = sorted(case.row for case in cases)
    return f"## [{path}](../{path})\n\n{table(('input', 'what happens', 'report', 'test'), rows)}"


def render_tree(tests: Path = TESTS) -> str:
    """Return the page of all tests."""
    return render(case for path in sorted(tests.rglob("test_*.py")) for case in find_cases(path))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if the page is not up to date")
    page = render_tree()
    if not parser.parse_args().check:
        PAGE.write_text(page, encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != page:
        sys.exit("docs/cases.md is not up to date: run make cases")


if __name__ == "__main__":
    main()
