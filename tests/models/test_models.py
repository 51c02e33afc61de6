"""Every kind of model that transformers has caches for, and the page that says so."""

import pytest
import transformers
from checks import examine
from families import FAMILIES
from page import PAGE, find_version, render


@pytest.mark.parametrize("name", FAMILIES)
def test_a_kind_of_model(name):
    if not FAMILIES[name].is_known:
        pytest.skip(f"this release of transformers has no {FAMILIES[name].needs}")
    report = examine(FAMILIES[name])
    page = PAGE.read_text(encoding="utf-8")
    if find_version(page) == transformers.__version__:  # the layers of some kinds depend on it
        assert report.row in page.splitlines(), "docs/models.md is not up to date: run `make models`"


def test_the_page_has_a_row_for_every_kind_and_no_other():
    page = PAGE.read_text(encoding="utf-8")
    rows = page[page.index("| --- |") :].splitlines()[1 : 1 + len(FAMILIES)]
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == [family.title for family in FAMILIES.values()]
    frame = render([]).replace(transformers.__version__, find_version(page))
    assert page.replace("\n".join(rows), "") == frame, "docs/models.md is not up to date: run `make models`"
