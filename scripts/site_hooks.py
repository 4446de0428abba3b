"""What makes the pages of docs/ a site: files from above docs/ are pages too, and links to other files are their names."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
ABOVE = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that lie at the top of the repository."""
    for source, page in ABOVE.items():
        text = (ROOT / source).read_text(encoding="utf-8").replace("](docs/", "](")
        for name, target in ABOVE.items():
            text = text.replace(f"]({name})", f"]({target})")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links that leave docs/ (to code, to a folder of the repository) are left as code."""
    return re.sub(r"\[`?([^\]`]+)`?\]\(\.\./[^)]*\)", r"`\1`", markdown)


def on_post_page(output: str, **_: Any) -> str:
    """Nothing is fetched from elsewhere. Without this script some browsers do not search pages that lie on a disk."""
    return re.sub(r'<script src="https://unpkg\.com/[^"]*"></script>', "", output)
