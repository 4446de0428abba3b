"""Files that are whole or not there, whoever else writes beside them."""

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A name to write to; the file takes its place under `path` when the block ends well, and is removed otherwise.

    The name is of this writer alone: two processes that write the same file leave one of the two contents, whole.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{uuid.uuid4().hex[:12]}.part{path.suffix}")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file as a whole. Bytes of file names that are not UTF-8 are kept."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8", errors="surrogateescape")


def write_json(path: str | Path, content: Any, indent: int = 1) -> None:
    """Write JSON as a whole."""
    write_text(path, json.dumps(content, indent=indent) + "\n")


def fingerprint(file: Path) -> str:
    """What tells a file from another one, or from itself before a change: path, size and time."""
    try:
        status = file.stat()
    except OSError:
        return f"{file} is missing"
    return f"{file.absolute()} {status.st_size} {status.st_mtime_ns}"
