"""Which videos, with which labels: list files, Kinetics and Something-Something JSON, and folders of classes."""

import csv
import json
import logging
import os
from array import array
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import overload

import numpy as np

from stts_lightning.errors import UserError

log = logging.getLogger(__name__)

VIDEO_SUFFIXES = frozenset({".mp4", ".avi", ".mkv", ".mov", ".webm", ".m4v", ".mpg", ".mpeg", ".3gp", ".ts", ".wmv", ".flv"})


class AnnotationError(UserError):
    """A list or folder that cannot be used: names it, the line if there is one, what was found and what is allowed."""


@dataclass(frozen=True)
class Video:
    """One labelled file.

    Attributes:
        path: the file.
        label: number of its class.
        frames: how many decode, if that has been found out; None is what its container promises.
        decoder: the one that it needs; None is the loader's.
    """

    path: Path
    label: int
    frames: int | None = None
    decoder: str | None = None


class Videos(Sequence[Video]):
    """Videos, packed: a list of a million takes some 100 MB, and no more in each worker that shares it.

    Python objects would be copied into every worker, for counting references writes to them.
    """

    def __init__(self, videos: Iterable[Video]) -> None:
        paths, ends = bytearray(), array("q", [0])
        labels, frames, decoders = array("l"), array("l"), bytearray()
        self._decoders: list[str | None] = [None]
        for video in videos:
            paths += os.fsencode(video.path)
            ends.append(len(paths))
            labels.append(video.label)
            frames.append(-1 if video.frames is None else video.frames)
            if video.decoder not in self._decoders:
                self._decoders.append(video.decoder)
            decoders.append(self._decoders.index(video.decoder))
        self._paths, self._decoder = bytes(paths), bytes(decoders)
        self._ends, self.labels, self._frames = (np.array(values, np.int64) for values in (ends, labels, frames))

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, index: int) -> str:
        """Of one of them."""
        return os.fsdecode(self._paths[self._ends[index] : self._ends[index + 1]])

    @overload
    def __getitem__(self, index: int) -> Video: ...
    @overload
    def __getitem__(self, index: slice) -> "Videos": ...
    def __getitem__(self, index: int | slice) -> "Video | Videos":
        if isinstance(index, slice):
            return Videos(self[number] for number in range(*index.indices(len(self))))
        if not -len(self) <= index < len(self):
            raise IndexError(f"video {index} of {len(self)}")
        index %= len(self)
        frames = int(self._frames[index])
        decoder = self._decoders[self._decoder[index]]
        return Video(Path(self.path(index)), int(self.labels[index]), None if frames < 0 else frames, decoder)


@dataclass(frozen=True)
class VideoList:
    """Labelled files and the names of the classes, by label."""

    videos: Sequence[Video]
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.videos, Videos):
            object.__setattr__(self, "videos", Videos(self.videos))

    def __len__(self) -> int:
        return len(self.videos)


def read_folder(folder: str | Path, classes: Sequence[str] | None = None) -> VideoList:
    """Read `folder/<class>/<video>`; classes are the folder names in alphabetical order, or those given.

    Raises:
        AnnotationError: if the folder is missing or holds no class folders with videos.
    """
    folder = _existing(folder, "data folder", Path.is_dir)
    found = sorted(p.name for p in folder.iterdir() if p.is_dir())
    names = tuple(classes or found)
    if extra := sorted(set(found) - set(names)):
        raise AnnotationError(f"data folder {folder}: class folder {extra[0]!r} is not among the {len(names)} known classes")
    videos = tuple(
        Video(path, label)
        for label, name in enumerate(names)
        for path in sorted((folder / name).glob("*"))
        if path.suffix.lower() in VIDEO_SUFFIXES
    )
    if not videos:
        raise AnnotationError(f"data folder {folder}: no videos in {folder}/<class>/ ({len(found)} class folders found)")
    return VideoList(videos, names)


def read_list(file: str | Path, root: str | Path | None = None, classes: Sequence[str] | None = None) -> VideoList:
    """Read a list of videos; the format follows from the file's suffix and first line.

    Formats: text `path label` a line (the label after the last space, so paths may hold spaces); csv with or without a
    header `path,label` (Kinetics' own `label,youtube_id,time_start,time_end,split` too); json as Kinetics'
    `{id: {"annotations": {"label": ...}}}` or Something-Something's `[{"id": ..., "template": ...}]`. A label is a
    number, or a name of `classes` (given, else `classes.txt` beside the list, else the sorted names in the list).

    Args:
        file: the list.
        root: folder that relative paths start from; the list's own folder if None.
        classes: class names by label.

    Raises:
        AnnotationError: if the list is missing, empty, or a line cannot be read.
    """
    file = _existing(file, "list file", Path.is_file)
    root = Path(root) if root is not None else file.parent
    read = _json_rows if file.suffix == ".json" else _text_rows
    # Twice: the names of the classes may follow from all lines, and the lines are too many to keep.
    names = _class_names(file, classes, {label for _, _, label in read(file)})
    index = {name: label for label, name in enumerate(names)}
    videos = Videos(Video(root / path, _label(file, number, text, index)) for number, path, text in read(file))
    if not videos:
        raise AnnotationError(f"list file {file}: it names no videos")
    _check_repeats(file, videos)
    return VideoList(videos, names)


def _check_repeats(file: Path, videos: Videos) -> None:
    """Warn of videos that are listed twice. Raises AnnotationError for one with two labels."""
    hashes = np.fromiter((hash(videos.path(index)) for index in range(len(videos))), np.int64, len(videos))
    order = np.argsort(hashes, kind="stable")
    repeats, example = 0, ""
    for at in np.flatnonzero(hashes[order[:-1]] == hashes[order[1:]]):
        first, second = order[at : at + 2]
        if videos.path(first) != videos.path(second):
            continue
        if videos.labels[first] != videos.labels[second]:
            labels = f"{videos.labels[first]} and {videos.labels[second]}"
            raise AnnotationError(f"list file {file}: {videos.path(first)} is listed with the labels {labels}")
        repeats += 1
        example = videos.path(first)
    if repeats:
        log.warning("list file %s: %d lines repeat a video, as %s; each counts", file, repeats, example)


def check_files(videos: VideoList, source: str) -> None:
    """Raise AnnotationError if a listed file does not exist: names the first and counts them."""
    missing = [video.path for video in videos.videos if not video.path.is_file()]
    if missing:
        raise AnnotationError(f"{source}: {len(missing)} of {len(videos)} listed videos do not exist, first {missing[0]}")


def _existing(path: str | Path, what: str, exists: object) -> Path:
    path = Path(path)
    if not (path.is_dir() if exists is Path.is_dir else path.is_file()):
        raise AnnotationError(f"{what} {path}: does not exist (give it as an absolute path or relative to {Path.cwd()})")
    return path


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """Number and text of each line that is not blank."""
    number = 0
    try:
        with file.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, line.rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise AnnotationError(f"list file {file}, after line {number}: not UTF-8 ({error.reason}); save it as UTF-8") from error


def _text_rows(file: Path) -> Iterable[tuple[int, str, str]]:
    lines = _lines(file)
    first = next(lines, None)
    if first is None:
        return
    header = [cell.strip().lower() for cell in first[1].split(",")]
    if "youtube_id" in header:
        for number, line in lines:
            row = dict(zip(header, next(csv.reader([line])), strict=False))
            try:
                yield number, f"{row['youtube_id']}_{int(row['time_start']):06d}_{int(row['time_end']):06d}.mp4", row["label"]
            except (KeyError, ValueError) as error:
                raise AnnotationError(f"list file {file}, line {number}: expected {','.join(header)}, found {line!r}") from error
        return
    for number, line in lines if header[-1] == "label" else chain([first], lines):
        # The last blank separates if a file's name stands before it; else a comma does, if a label follows the last one.
        path, label = (line.strip().rsplit(maxsplit=1) + [""])[:2]
        named = Path(path).suffix.lower() in VIDEO_SUFFIXES
        if "," in line and "/" not in line.rpartition(",")[2] and not (named and label):
            path, label = _comma_row(line)
        if not label.strip():
            raise AnnotationError(f"list file {file}, line {number}: expected 'path label' or 'path,label', found {line!r}")
        yield number, path.strip(), label.strip()


def _comma_row(line: str) -> tuple[str, str]:
    """Path and label of `path,label`; a path may hold commas, with quotes around it or without."""
    *path, label = next(csv.reader([line]), ["", ""])
    return ",".join(path), label


def _json_rows(file: Path) -> Iterable[tuple[int, str, str]]:
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise AnnotationError(f"list file {file}: not JSON ({error})") from error
    except UnicodeDecodeError as error:
        raise AnnotationError(f"list file {file}: not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from error
    try:
        if isinstance(content, dict):
            for number, (name, entry) in enumerate(content.items(), 1):
                start, end = (int(s) for s in entry["annotations"].get("segment", (0, 0)))
                clip = f"{name}_{start:06d}_{end:06d}.mp4" if end else f"{name}.mp4"
                yield number, clip, entry["annotations"]["label"]
        else:
            for number, entry in enumerate(content, 1):
                yield number, f"{entry['id']}.webm", entry["template"].replace("[", "").replace("]", "")
    except (KeyError, TypeError, AttributeError) as error:
        raise AnnotationError(f"list file {file}: neither Kinetics' nor Something-Something's JSON ({error!r})") from error


def _class_names(file: Path, classes: Sequence[str] | None, labels: Collection[str]) -> tuple[str, ...]:
    if classes is not None:
        return tuple(classes)
    beside = file.parent / "classes.txt"
    if beside.is_file():
        return tuple(line.strip() for line in beside.read_text(encoding="utf-8").splitlines() if line.strip())
    if labels and all(label.isdecimal() for label in labels):
        return tuple(str(label) for label in range(max(int(label) for label in labels) + 1))
    return tuple(sorted(labels))


def _label(file: Path, number: int, text: str, index: dict[str, int]) -> int:
    if text in index:
        return index[text]
    if text.isdecimal() and int(text) < len(index):
        return int(text)
    raise AnnotationError(f"list file {file}, line {number}: label {text!r} is neither in 0..{len(index) - 1} nor a class name")
