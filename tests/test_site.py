"""The documentation as a site: it builds without a warning, and no link of it is broken."""

import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
from warm import LONGEST

ROOT = Path(__file__).resolve().parents[1]
pytest.importorskip("material")


class Page(HTMLParser):
    """What a page links to, and the names that links may lead to in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.names: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.names |= {values[name] for name in ("id", "name") if name in values}
        self.links += [values[name] for name in ("href", "src") if name in values and tag in ("a", "img", "script", "link")]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LONGEST, env={"NO_MKDOCS_2_WARNING": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def internal(page: Page) -> Iterator[tuple[str, str]]:
    for link in page.links:
        path, _, name = link.partition("#")
        if not re.match(r"[a-z]+:|//", link) and (path or name):
            yield unquote(path), unquote(name)


def test_no_link_is_broken_and_nothing_is_fetched(site: Path) -> None:
    files = {file: Page(file.read_text(encoding="utf-8")) for file in site.rglob("*.html") if file.name != "404.html"}
    assert len(files) > 20
    broken, fetched = [], []
    for file, page in files.items():
        for path, name in internal(page):
            target = (file.parent / path.partition("?")[0]).resolve() if path else file
            if not target.exists() or (name and target in files and name not in files[target].names):
                broken.append(f"{file.relative_to(site)}: {path}#{name}")
        text = file.read_text(encoding="utf-8")
        fetched += re.findall(r'<(?:script|img|link)[^>]+(?:src|href)="(https?://[^"]+)"', text)
    assert not broken
    assert not [one for one in fetched if "squidfunk" not in one]


def test_every_page_of_docs_is_in_it(site: Path) -> None:
    pages = {page.relative_to(ROOT / "docs").with_suffix(".html") for page in (ROOT / "docs").rglob("*.md")}
    assert {page for page in pages if not (site / page).is_file()} == set()
    assert (site / "contributing.html").is_file() and (site / "changelog.html").is_file()


def test_the_reference_says_what_docstrings_say(site: Path) -> None:
    text = re.sub(r"<[^>]+>", "", (site / "api.html").read_text(encoding="utf-8"))
    for words in ("create_model", "perturbed_topk", "num_classes", "SelectionError", "register_backbone"):
        assert words in text
