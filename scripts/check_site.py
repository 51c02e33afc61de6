"""Check the built documentation site: every link leads to a file and an anchor, and nothing is fetched from elsewhere.

    python scripts/check_site.py build/site

The generator checks links between Markdown pages. This looks at the finished pages, whichever generator built them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

FETCHED = {"img": "src", "script": "src", "iframe": "src", "source": "src", "video": "src"}
"""Attributes whose address a browser fetches by itself; `link` elements have their own rule."""
FETCHED_LINKS = {"stylesheet", "preload", "preconnect", "dns-prefetch", "icon", "modulepreload"}

SKIP_LINK = "__skip"
"""An anchor of the theme, to jump over the navigation. Its page of missing files has nothing to jump to."""


@dataclass
class Document(HTMLParser):
    """The addresses and anchors of one HTML file.

    Attributes:
        links: addresses that a reader follows.
        fetched: addresses that a browser fetches.
        anchors: names that a link may lead to.
    """

    links: list[str] = field(default_factory=list)
    fetched: list[str] = field(default_factory=list)
    anchors: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect what a start tag names."""
        given = {name: value or "" for name, value in attrs}
        self.anchors.update(given[name] for name in ("id", "name") if name in given)
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag in FETCHED and FETCHED[tag] in given:
            self.fetched.append(given[FETCHED[tag]])
        if tag == "link" and FETCHED_LINKS & set(given.get("rel", "").split()):
            self.fetched.append(given.get("href", ""))


@cache
def read(path: Path) -> Document:
    """Return what one HTML file names."""
    document = Document()
    document.feed(path.read_text(encoding="utf-8"))
    return document


def find_problems(site: Path) -> Iterator[str]:
    """Yield a sentence for every address that leads nowhere, or that a browser would fetch from elsewhere."""
    for page in sorted(site.rglob("*.html")):
        document = read(page)
        name = page.relative_to(site)
        for address in document.fetched:
            if urlsplit(address).netloc:
                yield f"{name} fetches {address}"
        for address in [*document.links, *document.fetched]:
            problem = _find_problem(address, page, site)
            if problem:
                yield f"{name}: {address} {problem}"


def _find_problem(address: str, page: Path, site: Path) -> str:
    parts = urlsplit(address)
    if parts.scheme or parts.netloc:
        return ""
    # The page of missing files is shown under any address, so its own addresses begin at the root of the site.
    base = site if parts.path.startswith("/") or page.name == "404.html" else page.parent
    target = base / unquote(parts.path).lstrip("/") if parts.path else page
    target = target / "index.html" if target.is_dir() else target
    if not target.is_file():
        return "leads to no file"
    anchor = unquote(parts.fragment)
    if anchor not in {"", SKIP_LINK} and target.suffix == ".html" and anchor not in read(target).anchors:
        return "leads to no anchor"
    return ""


def main() -> None:
    site = Path(sys.argv[1])
    pages = len(list(site.rglob("*.html")))
    problems = list(find_problems(site))
    if problems or not pages:
        sys.exit("\n".join(problems) or f"{site} has no page")
    print(f"{pages} pages of {site}: every link leads somewhere, nothing is fetched from elsewhere")


if __name__ == "__main__":
    main()
