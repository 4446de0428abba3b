"""Which videos, with which labels: list files, Kinetics and Something-Something JSON, and folders of classes."""

import csv
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

VIDEO_SUFFIXES = frozenset({".mp4", ".avi", ".mkv", ".mov", ".webm", ".m4v", ".mpg", ".mpeg", ".3gp", ".ts", ".wmv", ".flv"})


class AnnotationError(ValueError):
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


@dataclass(frozen=True)
class VideoList:
    """Labelled files and the names of the classes, by label."""

    videos: tuple[Video, ...]
    classes: tuple[str, ...]

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
    rows = _json_rows(file, root) if file.suffix == ".json" else _text_rows(file)
    rows = [(number, path, label) for number, path, label in rows]
    if not rows:
        raise AnnotationError(f"list file {file}: it names no videos")
    names = _class_names(file, classes, [label for _, _, label in rows])
    index = {name: label for label, name in enumerate(names)}
    return VideoList(tuple(Video(root / p, _label(file, n, text, index)) for n, p, text in rows), names)


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


def _text_rows(file: Path) -> Iterable[tuple[int, str, str]]:
    text = file.read_text(encoding="utf-8-sig")
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        return
    header = [cell.strip().lower() for cell in lines[0][1].split(",")]
    if "youtube_id" in header:
        for number, row in zip([n for n, _ in lines[1:]], csv.DictReader(line for _, line in lines), strict=True):
            row = {str(key).strip().lower(): value for key, value in row.items()}
            yield number, f"{row['youtube_id']}_{int(row['time_start']):06d}_{int(row['time_end']):06d}.mp4", row["label"]
        return
    for number, line in lines[1:] if header[-1] == "label" else lines:
        # The separator is a comma if what follows the last one is a label, not a part of a path.
        separator = "," if "," in line and "/" not in line.rpartition(",")[2] else None
        path, label = (next(csv.reader([line]), []) + [""])[:2] if separator else (line.strip().rsplit(maxsplit=1) + [""])[:2]
        if not label.strip():
            raise AnnotationError(f"list file {file}, line {number}: expected 'path label' or 'path,label', found {line!r}")
        yield number, path.strip(), label.strip()


def _json_rows(file: Path, root: Path) -> Iterable[tuple[int, str, str]]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise AnnotationError(f"list file {file}: not JSON ({error})") from error
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


def _class_names(file: Path, classes: Sequence[str] | None, labels: Sequence[str]) -> tuple[str, ...]:
    if classes is not None:
        return tuple(classes)
    beside = file.parent / "classes.txt"
    if beside.is_file():
        return tuple(line.strip() for line in beside.read_text(encoding="utf-8").splitlines() if line.strip())
    if all(label.isdecimal() for label in labels):
        return tuple(str(label) for label in range(max(int(label) for label in labels) + 1))
    return tuple(sorted(set(labels)))


def _label(file: Path, number: int, text: str, index: dict[str, int]) -> int:
    if text in index:
        return index[text]
    if text.isdecimal() and int(text) < len(index):
        return int(text)
    raise AnnotationError(f"list file {file}, line {number}: label {text!r} is neither in 0..{len(index) - 1} nor a class name")
