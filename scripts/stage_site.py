"""Copy what the documentation site shows into one folder, laid out like the repository.

    python scripts/stage_site.py build/pages

The layout stays, so every relative link between pages works on GitHub and in the site, and README.md is the front page.
Markdown files are copied as they are, pictures too. A link to a file of source leads to a page that shows the file.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")
FOLDERS = ("docs", "examples", "plugins", "kvq", "benchmarks")
"""Folders whose Markdown files are pages."""
LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")
FENCED = re.compile(r"(^ *```.*?^ *```$)", re.DOTALL | re.MULTILINE)
IMAGES = {".png", ".svg"}
LANGUAGES = {".py": "python", ".yaml": "yaml", ".json": "json", ".cff": "yaml", ".toml": "toml"}
STYLES = Path("docs") / "stylesheets" / "site.css"


def list_pages(root: Path = ROOT) -> list[Path]:
    """Return the Markdown files that are pages of the site, relative to the repository."""
    found = [path for folder in FOLDERS for path in sorted((root / folder).rglob("*.md"))]
    return [*map(Path, PAGES), *(path.relative_to(root) for path in found)]


def find_links(text: str) -> Iterator[str]:
    """Yield the files that a page links to, without anchors; not addresses."""
    for found in LINK.finditer(FENCED.sub("", text)):
        if not re.match(r"[a-z]+:", found[2]):
            yield found[2]


def _replace_links(text: str, replace: Callable[[re.Match[str]], str]) -> str:
    """Return a page with its links replaced, those in code left alone."""
    parts = FENCED.split(text)
    return "".join(part if number % 2 else LINK.sub(replace, part) for number, part in enumerate(parts))


def stage(target: Path, root: Path = ROOT) -> None:
    """Write all pages and the files that they link to, below `target`.

    Raises:
        FileNotFoundError: a page links to something that does not exist.
    """
    shutil.rmtree(target, ignore_errors=True)
    pages = list_pages(root)
    for page in pages:
        text = (root / page).read_text(encoding="utf-8")
        _write(target / page, _replace_links(text, lambda found, page=page: _lead_to_page(found, page, root)))
        for link in find_links(text):
            _stage_linked(_resolve(link, page, root), target, root)
    _write(target / STYLES, (root / STYLES).read_text(encoding="utf-8"))


def _resolve(link: str, page: Path, root: Path) -> Path:
    path = (root / page.parent / link).resolve()
    if not path.is_file():
        raise FileNotFoundError(f"{page} links to {link}, which is no file")
    return path.relative_to(root.resolve())


def _lead_to_page(found: re.Match[str], page: Path, root: Path) -> str:
    """Return a link as it is in the site: to a file of source, its page."""
    link = found[2]
    if re.match(r"[a-z]+:", link) or not _is_source(_resolve(link, page, root)):
        return found[0]
    return f"{found[1]}{link}.md{found[3] or ''}{found[4]}"


def _is_source(path: Path) -> bool:
    return path.suffix not in {".md", *IMAGES}


def _stage_linked(path: Path, target: Path, root: Path) -> None:
    if path.suffix in IMAGES:
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / path, target / path)
    elif _is_source(path):
        _write(target / f"{path}.md", _render_source(path, (root / path).read_text(encoding="utf-8")))


def _render_source(path: Path, text: str) -> str:
    """Return a page that shows a file; the search leaves it out."""
    fence, language = "`" * 4, LANGUAGES.get(path.suffix, "text")
    return f"---\nsearch:\n  exclude: true\n---\n\n# {path}\n\n{fence}{language}\n{text}\n{fence}\n"


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    stage(Path(sys.argv[1]))
