"""docs/cases.md says what the markers of the tests say, and the markers say it in a form that can be read."""

import pytest
import update_cases_page
from update_cases_page import PAGE, find_cases, render, render_tree


def test_the_page_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == render_tree(), "docs/cases.md is not up to date: run `make cases`"


def read(tmp_path, source, name="test_it.py"):
    path = tmp_path / name
    path.write_text(source, encoding="utf-8")
    return find_cases(path, tmp_path)


MARKED = """
import pytest

@pytest.mark.case("a | b", "works", report="some/one#12")
@pytest.mark.case("other", "works too")
def test_one():
    pass

class TestAll:
    @pytest.mark.parametrize("x", [pytest.param(1, marks=pytest.mark.case("one of some", "refused")), 2])
    def test_two(self, x):
        pass
"""


def test_markers_are_found_wherever_they_may_stand(tmp_path):
    found = {(case.test, case.what, case.outcome, case.report) for case in read(tmp_path, MARKED)}
    assert found == {
        ("test_one", "a | b", "works", "some/one#12"),
        ("test_one", "other", "works too", None),
        ("TestAll::test_two", "one of some", "refused", None),
    }


def test_the_page_does_not_depend_on_the_order(tmp_path):
    cases = [*read(tmp_path, MARKED), *read(tmp_path, MARKED, "test_a.py")]
    page = render(cases)
    assert page == render(reversed(cases))
    assert page.index("test_a.py") < page.index("test_it.py")
    assert page.index("| a \\| b |") < page.index("| other |")
    assert "[some/one#12](https://github.com/some/one/issues/12)" in page
    assert "6 inputs, 1 public reports" in page


@pytest.mark.parametrize(
    ("marker", "words"),
    [
        ('pytest.mark.case("one")', "two texts"),
        ('pytest.mark.case("one", "two", reprot="a/b#1")', "no keyword but report="),
        ('pytest.mark.case("one", "two", report="#1")', "owner/repo#N"),
        ('pytest.mark.case("one", "two\\nlines")', "one line"),
        ("pytest.mark.case(WHAT, WHAT)", "write the texts"),
    ],
)
def test_markers_that_cannot_be_read_are_refused(tmp_path, marker, words):
    with pytest.raises(ValueError, match=rf"test_it.py:3: .*{words}"):
        read(tmp_path, f"import pytest\n\n@{marker}\ndef test_one():\n    pass\n")


@pytest.mark.parametrize(
    "source",
    ['pytestmark = pytest.mark.case("a", "b")', '@pytest.mark.case("a", "b")\ndef helper():\n    pass'],
)
def test_a_marker_on_no_test_is_refused(tmp_path, source):
    with pytest.raises(ValueError, match="belongs above a test"):
        read(tmp_path, f"import pytest\n\n{source}\n")


def test_the_command_tells_an_old_page(tmp_path, monkeypatch):
    monkeypatch.setattr(update_cases_page, "PAGE", tmp_path / "cases.md")
    monkeypatch.setattr("sys.argv", ["update_cases_page.py"])
    update_cases_page.main()
    monkeypatch.setattr("sys.argv", ["update_cases_page.py", "--check"])
    update_cases_page.main()
    (tmp_path / "cases.md").write_text("old", encoding="utf-8")
    with pytest.raises(SystemExit, match="make cases"):
        update_cases_page.main()
