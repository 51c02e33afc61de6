"""What the pages take from the code and from committed results is current: tables, pictures."""

from __future__ import annotations

import re

import pytest
import update_pages
from draw_front_page import PICTURES
from update_pages import BLOCKS, ROOT, update

PAGES = {page: (ROOT / page).read_text(encoding="utf-8") for page in BLOCKS}


@pytest.mark.parametrize(("page", "name"), [(page, name) for page, blocks in BLOCKS.items() for name in blocks])
def test_a_generated_block_is_current(page, name):
    found = re.search(f"<!-- begin: {name} -->\n(.*?)\n<!-- end: {name} -->", PAGES[page], re.DOTALL)
    assert found, f"{page} has no block {name!r}"
    assert found[1] == BLOCKS[page][name](), "run make pages"


def test_no_other_page_has_a_block():
    texts = {path: path.read_text(encoding="utf-8") for path in (ROOT / "docs").rglob("*.md")}
    marked = {path.relative_to(ROOT).as_posix() for path, text in texts.items() if "<!-- begin: " in text}
    assert marked | {"README.md"} == set(BLOCKS)


def test_what_the_script_would_write_is_what_is_there():
    page = "docs/plugins.md"
    assert update(page, PAGES[page]) == PAGES[page]


@pytest.mark.parametrize(
    "wrong",
    ["<!-- begin: nonsense -->\n<!-- end: nonsense -->", "", "<!-- begin: checks -->\n<!-- end: checks -->\n" * 2],
    ids=["unknown", "missing", "twice"],
)
def test_the_script_refuses_a_page_with_other_blocks(wrong):
    with pytest.raises(ValueError, match=r"docs/plugins.md .*needs each of \['checks'\] once"):
        update("docs/plugins.md", wrong)


def test_the_script_refuses_a_block_without_an_end():
    with pytest.raises(ValueError, match="'checks' with its end"):
        update("docs/plugins.md", "<!-- begin: checks -->\n")


def test_a_stale_block_is_seen():
    page = "docs/configuration.md"
    stale = re.sub(r"\| `residual_length` \| `\d+`", "| `residual_length` | `1`", PAGES[page])
    assert stale != PAGES[page]
    assert update(page, stale) == PAGES[page]


def test_the_command_tells_an_old_page(tmp_path, monkeypatch):
    page = "docs/plugins.md"
    monkeypatch.setattr(update_pages, "ROOT", tmp_path)
    monkeypatch.setattr(update_pages, "BLOCKS", {page: BLOCKS[page]})
    (tmp_path / "docs").mkdir()
    (tmp_path / page).write_text("<!-- begin: checks -->\nold\n<!-- end: checks -->\n", encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["update_pages.py", "--check"])
    with pytest.raises(SystemExit, match="make pages"):
        update_pages.main()
    monkeypatch.setattr("sys.argv", ["update_pages.py"])
    update_pages.main()
    monkeypatch.setattr("sys.argv", ["update_pages.py", "--check"])
    update_pages.main()


@pytest.mark.parametrize("picture", PICTURES, ids=lambda picture: picture.name)
def test_a_picture_is_drawn_from_the_results_of_today(picture):
    assert f">{picture.digest}<" in picture.path.read_text(encoding="utf-8"), "run make pages"
