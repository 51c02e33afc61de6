"""The documentation site, without its generator: which pages it has, where their links lead, what its check sees."""

from __future__ import annotations

import pydoc
import re
from pathlib import Path

import check_site
import pytest
import stage_site
import yaml
from stage_site import FENCED, ROOT, find_links, list_pages

import kvq
import kvq.config
import kvq.errors
import kvq.planning
import kvq.plugin_api
import kvq.registry
import kvq.testing
import kvq.tuning

PAGES = list_pages()
WITH_AN_EXTRA = {"kvq.evaluation.harness.model.KVQHarnessModel"}
"""Names that cannot be imported without an extra of kvq."""


def list_nav(entries):
    for entry in entries:
        for content in entry.values() if isinstance(entry, dict) else [entry]:
            if isinstance(content, list):
                yield from list_nav(content)
            else:
                yield content


def find_anchors(text):
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_page_is_in_the_navigation_once():
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert sorted(list_nav(config["nav"])) == sorted(page.as_posix() for page in PAGES)


def test_the_index_of_the_documents_leads_to_every_one():
    index = Path("docs/README.md")
    linked = {(ROOT / index.parent / link).resolve() for link in find_links((ROOT / index).read_text("utf-8"))}
    documents = {(ROOT / page).resolve() for page in PAGES if page.parts[0] == "docs" and page != index}
    assert documents - linked == set()


@pytest.mark.parametrize("page", [page for page in PAGES if "reference" in page.parts], ids=str)
def test_the_names_of_the_reference_exist(page):
    names = re.findall(r"^::: (.+)$", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)
    assert names
    assert [name for name in names if name not in WITH_AN_EXTRA and not pydoc.locate(name)] == []


@pytest.mark.parametrize(
    "module", [kvq, kvq.plugin_api, kvq.testing, kvq.planning, kvq.registry, kvq.config, kvq.tuning]
)
def test_the_reference_leaves_no_public_name_out(module):
    text = "".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES if "reference" in page.parts)
    documented = {name.rpartition(".")[2] for name in re.findall(r"^::: (.+)$", text, re.MULTILINE)}
    elsewhere = {*vars(kvq.errors), *vars(kvq.plugin_api.hooks), "CHECKS", "DEFAULT_BACKEND"}
    assert set(module.__all__) - documented - elsewhere == set()


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_its_links_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)]+)\)", FENCED.sub("", text)):
        if re.match(r"https?:", link):
            continue
        target, _, anchor = link.partition("#")
        found = (ROOT / page.parent / target).resolve() if target else ROOT / page
        assert found.is_file(), f"{link}: no file; a link to a folder works on GitHub only"
        if anchor:
            assert anchor in find_anchors(found.read_text(encoding="utf-8")), link


def test_all_files_that_the_site_needs_are_copied(tmp_path):
    stage_site.stage(tmp_path)
    staged = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert {page.as_posix() for page in PAGES} <= staged
    assert {"docs/images/speed.svg", "benchmarks/results/speed-cpu.png", "examples/chat.py.md"} <= staged
    assert "(../../examples/chat.py.md)" in (tmp_path / "docs/tutorials/turns.md").read_text(encoding="utf-8")
    assert "```python\n" in (tmp_path / "examples/chat.py.md").read_text(encoding="utf-8")
    assert (tmp_path / "README.md").read_text("utf-8").count("](docs/quality.md)") == 1


class TestStaging:
    @pytest.fixture
    def root(self, tmp_path):
        for name in (*stage_site.PAGES, "docs/stylesheets/site.css", "docs/other.md"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text("", encoding="utf-8")
        return tmp_path

    def test_a_link_to_nothing_is_refused(self, root):
        (root / "docs/other.md").write_text("[x](../nothing.py)", encoding="utf-8")
        with pytest.raises(FileNotFoundError, match=r"docs/other.md links to ../nothing.py"):
            stage_site.stage(root / "build", root)

    def test_code_is_left_alone(self, root):
        text = "```python\nnames[0](argument)\n```\n"
        (root / "docs/other.md").write_text(text, encoding="utf-8")
        stage_site.stage(root / "build", root)
        assert (root / "build/docs/other.md").read_text(encoding="utf-8") == text


class TestCheck:
    @pytest.fixture
    def site(self, tmp_path):
        (tmp_path / "page").mkdir()
        (tmp_path / "page" / "index.html").write_text('<h1 id="top">x</h1>', encoding="utf-8")
        return tmp_path

    def find(self, site, html):
        check_site.read.cache_clear()
        (site / "index.html").write_text(html, encoding="utf-8")
        return list(check_site.find_problems(site))

    @pytest.mark.parametrize(
        "html",
        [
            '<a href="page/#top">x</a><a href="https://example.org/">x</a><a href="#here">x</a><p id="here">',
            '<link rel="canonical" href="https://example.org/">',
        ],
    )
    def test_a_good_page_has_no_problem(self, site, html):
        assert self.find(site, html) == []

    @pytest.mark.parametrize(
        ("html", "words"),
        [
            ('<a href="other/">x</a>', "leads to no file"),
            ('<a href="page/#bottom">x</a>', "leads to no anchor"),
            ('<img src="picture.png">', "leads to no file"),
            ('<script src="https://example.org/a.js"></script>', "fetches https"),
            ('<link rel="stylesheet" href="//example.org/a.css">', "fetches //example.org"),
        ],
    )
    def test_a_problem_is_found(self, site, html, words):
        [*_, problem] = self.find(site, html)
        assert words in problem

    def test_the_command_fails_on_a_problem_and_on_an_empty_site(self, site, monkeypatch, capsys):
        monkeypatch.setattr("sys.argv", ["check_site.py", str(site)])
        self.find(site, '<a href="page/">x</a>')
        check_site.main()
        assert "2 pages" in capsys.readouterr().out
        self.find(site, '<a href="nothing/">x</a>')
        with pytest.raises(SystemExit, match="leads to no file"):
            check_site.main()
        monkeypatch.setattr("sys.argv", ["check_site.py", str(site / "nothing")])
        with pytest.raises(SystemExit, match="no page"):
            check_site.main()
