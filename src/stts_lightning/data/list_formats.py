"""Rows of list files, in every common format: text, csv and tsv with a header or without, Kinetics and Something-Something."""

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from stts_lightning.errors import UserError

VIDEO_SUFFIXES = frozenset(
    f".{name}"
    for name in "mp4 avi mkv mov webm m4v mpg mpeg 3gp 3g2 ts mts m2ts wmv asf flv f4v ogv vob divx m2v gif".split()  # noqa: SIM905
)
PATH_COLUMNS = tuple("path video_path filename file_name file video video_name clip name video_id id".split())  # noqa: SIM905
# Numbers before names: a list that has both says how names are numbered.
LABEL_COLUMNS = tuple("label_id class_id label_idx target label class category class_name action labels".split())  # noqa: SIM905
SPLIT_COLUMNS = ("split", "subset", "set")
PART_COLUMNS = frozenset("start end start_time end_time time_start time_end start_frame end_frame".split())  # noqa: SIM905
FRAME_COLUMNS = ("frames", "num_frames", "total_frames", "n_frames")


class AnnotationError(UserError):
    """A list or folder that cannot be used: names it, the line if there is one, what was found and what is allowed."""


class Row(NamedTuple):
    """One video of a list.

    Attributes:
        line: where it stands; of a JSON file which entry, from 1.
        path: of the file or frame folder, as the list has it.
        label: as text.
        frames: of a frame folder, if the list says.
    """

    line: int
    path: str
    label: str
    frames: int | None = None


def read_rows(file: Path) -> Iterable[Row]:
    """Rows of a list. The format follows from the file's suffix and its first line. Raises AnnotationError."""
    return _json_rows(file) if file.suffix.lower() == ".json" else _text_rows(file)


def text_lines(file: Path, what: str = "list file") -> Iterator[tuple[int, str]]:
    """Number and text of each line that is not blank. Raises AnnotationError for a file that is not UTF-8."""
    number = 0
    try:
        with file.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, line.rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise AnnotationError(f"{what} {file}, after line {number}: not UTF-8 ({error.reason}); save it as UTF-8") from error


def _text_rows(file: Path) -> Iterable[Row]:
    lines = text_lines(file)
    first = next(lines, None)
    if first is None:
        return ()
    delimiter = next((d for d in "\t;," if d in first[1]), " ")
    header = [cell.strip().lower() for cell in _cells(first[1], delimiter)]
    if "youtube_id" in header:
        return _kinetics_rows(file, header, delimiter, lines)
    labels, paths = ([name for name in names if name in header] for names in (LABEL_COLUMNS, PATH_COLUMNS))
    if not labels and paths == header:
        raise AnnotationError(f"list file {file}: has no column for the label; name it one of {', '.join(LABEL_COLUMNS)}")
    if not labels or any(Path(cell).suffix in VIDEO_SUFFIXES for cell in header):
        return (_bare_row(file, number, line) for number, line in chain([first], lines))
    if not paths:
        raise AnnotationError(
            f"list file {file}, line {first[0]}: a header without a column for the path; name it one of {', '.join(PATH_COLUMNS)}"
        )
    return _named_rows(file, header, delimiter, paths[0], labels[0], lines)


def _cells(line: str, delimiter: str) -> list[str]:
    return next(csv.reader([line], delimiter=delimiter), [""])


class _Split:
    """Refuses a file that holds several splits: training and test would share videos."""

    def __init__(self, file: Path, what: str) -> None:
        self.file, self.what, self.name = file, what, ""

    def check(self, number: int, name: str) -> None:
        """One row's split. Raises AnnotationError if another came before."""
        self.name = self.name or name
        if name != self.name:
            raise AnnotationError(
                f"list file {self.file}, {self.what} {number}: split {name!r} after {self.name!r}; give each split its own file"
            )


def _kinetics_rows(file: Path, header: Sequence[str], delimiter: str, lines: Iterable[tuple[int, str]]) -> Iterator[Row]:
    split = _Split(file, "line")
    for number, line in lines:
        row = dict(zip(header, _cells(line, delimiter), strict=False))
        split.check(number, row.get("split", "").strip())
        try:
            start, end = (int(float(row[name])) for name in ("time_start", "time_end"))
            yield Row(number, f"{row['youtube_id']}_{start:06d}_{end:06d}.mp4", row["label"])
        except (KeyError, ValueError) as error:
            raise AnnotationError(f"list file {file}, line {number}: expected {','.join(header)}, found {line!r}") from error


def _named_rows(
    file: Path, header: Sequence[str], delimiter: str, path: str, label: str, lines: Iterable[tuple[int, str]]
) -> Iterator[Row]:
    """Rows under a header. Columns that it does not need are left aside."""
    if parts := sorted(PART_COLUMNS & set(header)):
        raise AnnotationError(
            f"list file {file}: column {parts[0]!r}: parts of videos are not supported; cut the videos, or remove the column"
        )
    if header.count(path) > 1 or header.count(label) > 1:
        raise AnnotationError(f"list file {file}: column {path if header.count(path) > 1 else label!r} is there twice")
    at_path, at_label = header.index(path), header.index(label)
    at_frames = next((header.index(name) for name in FRAME_COLUMNS if name in header), None)
    at_split = next((header.index(name) for name in SPLIT_COLUMNS if name in header), None)
    split = _Split(file, "line")
    for number, line in lines:
        cells = [cell.strip() for cell in _cells(line, delimiter)]
        if len(cells) > len(header) == 2:  # A path with commas and no quotes around it.
            cells = [delimiter.join(cells[:-1]), cells[-1]] if at_path == 0 else [cells[0], delimiter.join(cells[1:])]
        if len(cells) != len(header):
            raise AnnotationError(f"list file {file}, line {number}: expected {delimiter.join(header)}, found {line!r}")
        if at_split is not None:
            split.check(number, cells[at_split])
        frames = None
        if at_frames is not None:
            if not cells[at_frames].isdecimal():
                raise AnnotationError(f"list file {file}, line {number}: {header[at_frames]}={cells[at_frames]!r} is no number")
            frames = int(cells[at_frames])
        _check_one_label(file, number, cells[at_path], cells[at_label])
        yield Row(number, cells[at_path], cells[at_label], frames)


def _bare_row(file: Path, number: int, line: str) -> Row:
    """A row without a header: `path label`, `path,label`, or of a frame folder `path frames label`."""
    row = _split(line)
    if row is None or row[1].count('"') % 2:
        raise AnnotationError(f"list file {file}, line {number}: expected 'path label' or 'path,label', found {line!r}")
    path, label, frames = row
    _check_one_label(file, number, path, label)
    return Row(number, path, label, frames)


def _check_one_label(file: Path, number: int, path: str, label: str) -> None:
    """Refuse several labels: numbers after each other, anything between `;` or `|`, and lists."""
    if re.fullmatch(r"\d+([\s,]+\d+)+|.*[;|].*|\[.*\]", label):
        raise AnnotationError(
            f"list file {file}, line {number}: several labels ({label}) for {path}; a video has one label "
            "(multi-label data sets are not supported)"
        )


_ENDS_WITH_SUFFIX = re.compile(rf"\.(?:{'|'.join(suffix[1:] for suffix in VIDEO_SUFFIXES)})[\"']?(?=[\s,])", re.IGNORECASE)


def _split(line: str) -> tuple[str, str, int | None] | None:
    """Path, label and frames of a line without a header; None if there is no label."""
    line = line.strip()
    ends = [match.end() for match in _ENDS_WITH_SUFFIX.finditer(line)]
    if ends:  # The path ends with the last suffix of a video; the rest is the label.
        path, rest = line[: ends[-1]], line[ends[-1] :].strip()
        if line[0] == '"' or rest[:1] == ",":
            path, *labels = _cells(line, ",") if line[0] == '"' else (path, *_cells(rest, ",")[1:])
            label = ",".join(cell.strip() for cell in labels)
            # A class's name may hold commas between quotes alone: else columns without a header would become names.
            return (path.strip(), label, None) if len(labels) == 1 or re.fullmatch(r"\d+(,\d+)+", label) else None
        quoted = len(rest) > 1 and rest[0] == rest[-1] == '"'
        return (path.strip(), rest[1:-1] if quoted else rest, None) if rest else None
    delimiter = next((d for d in "\t," if d in line), None)
    cells = [cell.strip() for cell in (_cells(line, delimiter) if delimiter else line.split())]
    if len(cells) == 3 and cells[1].isdecimal() and cells[2]:
        return cells[0], cells[2], int(cells[1])
    if delimiter:
        path, label = delimiter.join(cells[:-1]), cells[-1]
    else:
        path, _, label = line.rpartition(" ")
    return (path.strip(), label, None) if path.strip() and label else None


def _json_rows(file: Path) -> Iterator[Row]:
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"), object_pairs_hook=_each_once(file))
    except json.JSONDecodeError as error:
        raise AnnotationError(f"list file {file}: not JSON ({error})") from error
    except UnicodeDecodeError as error:
        raise AnnotationError(f"list file {file}: not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from error
    try:
        if isinstance(content, dict):
            split = _Split(file, "entry")
            for number, (name, entry) in enumerate(content.items(), 1):
                split.check(number, str(entry.get("subset", "")))
                start, end = (int(float(s)) for s in entry["annotations"].get("segment", (0, 0)))
                clip = f"{name}_{start:06d}_{end:06d}.mp4" if end else f"{name}.mp4"
                yield Row(number, clip, _one_label(file, number, entry["annotations"]["label"]))
        else:
            for number, entry in enumerate(content, 1):
                label = _one_label(file, number, entry["template"])
                yield Row(number, f"{entry['id']}.webm", label.replace("[", "").replace("]", ""))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise AnnotationError(f"list file {file}: neither Kinetics' nor Something-Something's JSON ({error!r})") from error


def _each_once(file: Path) -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    """For JSON: objects whose keys are all different. Of two equal ones the first would be lost without a word."""

    def checked(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise AnnotationError(f"list file {file}: {twice!r} is there twice")
        return content

    return checked


def _one_label(file: Path, number: int, label: object) -> str:
    if isinstance(label, list):
        raise AnnotationError(
            f"list file {file}, entry {number}: several labels ({label}); a video has one label "
            "(multi-label data sets are not supported)"
        )
    return str(label)
