"""Pages of docs/ of which a script writes a part."""

from pathlib import Path

from stts_lightning.files import write_text


def line(*cells: str) -> str:
    """Of a table in Markdown."""
    return f"| {' | '.join(cells)} |"


def header(*cells: str) -> list[str]:
    """The first two lines of a table in Markdown."""
    return [line(*cells), "|" + "---|" * len(cells)]


def fill(page: Path, marks: tuple[str, str], text: str) -> None:
    """Put a text between two lines of a page. Raises SystemExit where they are not there."""
    head, begin, rest = page.read_text().partition(marks[0])
    _, end, tail = rest.partition(marks[1])
    if not (begin and end):
        raise SystemExit(f"{page}: lacks the lines {marks[0]} and {marks[1]}")
    write_text(page, f"{head}{begin}\n\n{text.rstrip()}\n\n{end}{tail}")
