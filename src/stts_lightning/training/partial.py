"""What a test or a prediction has found so far, on the disk: the same command goes on where it was ended."""

import contextlib
import hashlib
import json
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from stts_lightning.data.isolation import ASKING
from stts_lightning.files import write_text

STAMP = "question"


def question(*parts: Any) -> str:
    """A short text that tells two questions apart, of anything that has a text."""
    return hashlib.sha256("\n".join(map(str, parts)).encode("utf-8", "surrogateescape")).hexdigest()[:16]


class PartialResults:
    """A folder of pieces, which all processes write to, for one question. Pieces of another question are removed.

    Args:
        folder: where.
        asked: see `question`.
    """

    def __init__(self, folder: Path, asked: str) -> None:
        self.folder, self.asked = folder, asked

    def open(self) -> None:
        """Make the folder, empty unless it holds pieces of this question. For the first process."""
        if not self._is_of_question():
            self.clear()
            write_text(self.folder / STAMP, self.asked)

    def _is_of_question(self) -> bool:
        stamp = self.folder / STAMP
        return stamp.is_file() and stamp.read_text() == self.asked

    def new_piece(self, suffix: str) -> Path:
        """A name for one more piece, of this process alone."""
        return self.folder / f"{uuid.uuid4().hex[:12]}{suffix}"

    def pieces(self, suffix: str) -> list[Path]:
        """Those of this question that are whole. Another process may not have removed others yet."""
        if not self._is_of_question():
            return []
        return sorted(path for path in self.folder.glob(f"*{suffix}") if path.name[0] != ".")

    def clear(self) -> None:
        """Remove the folder."""
        if self.folder.is_dir():
            for path in self.folder.iterdir():
                path.unlink()
            self.folder.rmdir()


def write_records(partial: PartialResults, records: dict[str, Any]) -> None:
    """Write a piece of JSON."""
    write_text(partial.new_piece(".json"), json.dumps(records))


def read_records(partial: PartialResults) -> dict[str, Any]:
    """All pieces of JSON as one."""
    records: dict[str, Any] = {}
    for piece in partial.pieces(".json"):
        records |= json.loads(piece.read_text(encoding="utf-8"))
    return records


class Asked:
    """Whether a scheduler or a user asked this process to end, since `listening`."""

    number: int = 0

    def __bool__(self) -> bool:
        return self.number != 0


@contextlib.contextmanager
def listening() -> Iterator[Asked]:
    """Take signals that ask the process to end as requests, which the block looks at when it can end well."""
    asked = Asked()

    def note(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT == asked.number:  # Twice: at once.
            signal.default_int_handler(number, frame)
        asked.number = number

    before: dict[signal.Signals, Any] = {}
    with contextlib.suppress(ValueError):  # Not the main thread: whoever runs this there sees to signals.
        before = {number: signal.signal(number, note) for number in ASKING}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
