"""Fill the part of a page that is about a GPU with what `scripts/benchmark_gpu.sh` measured.

python scripts/performance_page.py OUT [docs/performance.md]
"""

import json
import sys
from pathlib import Path
from typing import Any

from pages import fill

from stts_lightning.analysis.page import markdown
from stts_lightning.benchmark import COLUMNS, table

MARKS = "<!-- benchmark_gpu: begin -->", "<!-- benchmark_gpu: end -->"

TITLES = {
    "table7": "Table 7 of the paper",
    "forward": "Forward",
    "training": "Training step",
    "operator": "The Top-K operator, forward and backward",
}


def section(content: dict[str, Any]) -> str:
    """A heading, a line on what was measured where, and the table of one JSON file."""
    rows, what = content["rows"], content["what"]
    same, lines = table(rows, what if what in COLUMNS else "models")
    models = list(dict.fromkeys(row["model"].removeprefix("plain:").partition(":")[0] for row in rows))
    of = [model for model in models if model != "torchvision"]
    title = TITLES.get(what, what) + (f": {', '.join(of)}" if what in ("forward", "training") else "")
    if any(row.get("compile", "false") != "false" for row in rows):
        title += ", torch.compile"
    stopped = "" if content.get("complete") else " **Stopped before its end.**"
    said = f"{content['device']}, torch {content['torch']}{f'; {same}' if same else ''}.{stopped}"
    files = ("json=", "csv=", "plot=")
    command = " ".join(word for word in content["command"].split() if not word.startswith(files))
    return f"### {title}\n\n{said}\n\n    {command}\n\n{markdown(lines)}"


def sections(folder: Path) -> str:
    """All JSON files of a folder that hold rows, in the order of their names."""
    contents = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    return "\n".join(section(content) for content in contents if content.get("rows"))


def main(folder: str, page: str = "docs/performance.md") -> None:
    """Fill the page."""
    text = sections(Path(folder))
    if not text:
        raise SystemExit(f"{folder}: no benchmark left a row there")
    fill(Path(page), MARKS, text)


if __name__ == "__main__":
    main(*sys.argv[1:])
