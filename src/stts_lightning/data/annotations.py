"""Which videos, with which labels: list files, Kinetics and Something-Something JSON, and folders of classes."""

import logging
import os
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import NDArray

from stts_lightning.data.labels import label_number, names_of_labels, read_class_names, report_classes
from stts_lightning.data.list_formats import VIDEO_SUFFIXES, AnnotationError, read_rows
from stts_lightning.data.readers import is_frame_folder

__all__ = [
    "VIDEO_SUFFIXES", "AnnotationError", "Video", "VideoList", "Videos", "check_files", "existing_folder",
    "held_out", "read_folder", "read_list",
]  # fmt: skip

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Video:
    """One labelled video.

    Attributes:
        path: the file, or a folder of pictures.
        label: number of its class.
        frames: how many decode, if that has been found out, or a list says so; None is what its container promises.
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

    @property
    def labels(self) -> NDArray[np.int64]:
        """Of the videos, `(N,)`."""
        assert isinstance(self.videos, Videos)
        return self.videos.labels


def read_folder(folder: str | Path, classes: Sequence[str] | None = None) -> VideoList:
    """Read `folder/<class>/<video>`; classes are the folder names in alphabetical order, or those given.

    A video is a file, or a folder of numbered pictures. Hidden files and folders, and folders without videos, are left out.

    Raises:
        AnnotationError: if the folder is missing or holds no class folders with videos.
    """
    folder = existing_folder(folder)
    left_out: Counter[str] = Counter()
    found = {path.name: _videos_in(path, left_out) for path in sorted(folder.iterdir()) if path.is_dir() and not is_hidden(path)}
    with_videos = [name for name, videos in found.items() if videos]
    names = tuple(classes or with_videos)
    if extra := sorted(set(with_videos) - set(names)):
        raise AnnotationError(f"data folder {folder}: class folder {extra[0]!r} is not among the {len(names)} known classes")
    if empty := [name for name in found if not found[name]]:
        shown = ", ".join(map(repr, empty[:5])) + (f" and {len(empty) - 5} more" if len(empty) > 5 else "")
        log.warning("data folder %s: no videos in %s: %s", folder, "these folders" if len(empty) > 1 else "this folder", shown)
    if left_out:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in left_out.most_common(8))
        log.warning("data folder %s: left out what is no video by its suffix: %s", folder, kinds)
    videos = Videos(Video(path, label) for label, name in enumerate(names) for path in found.get(name, ()))
    if not videos:
        raise AnnotationError(f"data folder {folder}: no videos in {folder}/<class>/ ({len(found)} class folders found)")
    report_classes(f"data folder {folder}", videos.labels, names, classes is None)
    return VideoList(videos, names)


def held_out(videos: VideoList, fraction: float, seed: int, source: str) -> tuple[VideoList, VideoList]:
    """Split a list in two, the same share of each class in both: what is left to train with, and what is held out.

    Args:
        videos: the list.
        fraction: that is held out; of each class at least one video, and not all.
        seed: which ones.
        source: how an error calls the list.

    Raises:
        AnnotationError: for a class of one video, which cannot be on both sides.
    """
    chosen = np.zeros(len(videos), bool)
    for label, name in enumerate(videos.classes):
        here = np.flatnonzero(videos.labels == label)
        if len(here) == 1:
            raise AnnotationError(
                f"{source}: class {name!r} has 1 video; dataset.val_fraction={fraction} needs 2 or more of each class"
            )
        count = min(max(round(len(here) * fraction), 1), len(here) - 1) if len(here) else 0
        chosen[np.random.default_rng((seed, label)).permutation(here)[:count]] = True

    def part(which: NDArray[np.bool_]) -> VideoList:
        return VideoList(Videos(videos.videos[int(number)] for number in np.flatnonzero(which)), videos.classes)

    return part(~chosen), part(chosen)


def is_hidden(path: Path) -> bool:
    """Whether a file or folder is a program's own: `.ipynb_checkpoints`, `._clip.mp4`, `@eaDir`, `__MACOSX`."""
    return path.name.startswith((".", "@", "__MACOSX"))


def _videos_in(folder: Path, left_out: Counter[str]) -> list[Path]:
    """Videos of a class, by name; suffixes of other files are counted."""
    videos: list[Path] = []
    for path in sorted(folder.iterdir()):
        if is_hidden(path):
            continue
        if path.is_dir():
            videos += [path] if is_frame_folder(path) else []
        elif path.suffix.lower() in VIDEO_SUFFIXES:
            videos.append(path)
        else:
            left_out[path.suffix.lower() or "without suffix"] += 1
    return videos


def read_list(file: str | Path, root: str | Path | None = None, classes: Sequence[str] | None = None) -> VideoList:
    """Read a list of videos; the format follows from the file's suffix and first line.

    Formats: text `path label` a line (paths may hold blanks), of frame folders `path frames label`; csv and tsv, with a
    header (columns by name, as `filename,label,split`) or without; Kinetics' own `label,youtube_id,time_start,time_end,split`;
    json as Kinetics' `{id: {"annotations": {"label": ...}}}` or Something-Something's `[{"id": ..., "template": ...}]`. A label
    is a number from 0 on, or a name of `classes` (given, else `classes.txt` beside the list, else the sorted names in the list).

    Args:
        file: the list.
        root: folder that relative paths start from; the list's own folder if None.
        classes: class names by label.

    Raises:
        AnnotationError: if the list is missing, empty, or a line cannot be read.
    """
    file = _existing_file(file)
    root = Path(root) if root is not None else file.parent
    beside = file.parent / "classes.txt"
    # Twice: the names of the classes may follow from all lines, and the lines are too many to keep.
    names = tuple(classes or (read_class_names(beside) if beside.is_file() else names_of_labels(file, read_rows(file))))
    numbers = {name: number for number, name in enumerate(names)}
    videos = Videos(Video(root / row.path, label_number(file, row, numbers), row.frames) for row in read_rows(file))
    if not videos:
        raise AnnotationError(f"list file {file}: it names no videos")
    _check_repeats(file, videos)
    report_classes(f"list file {file}", videos.labels, names, classes is None)
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
    """Raise AnnotationError if a listed video does not exist: names the first and counts them."""
    missing = [video.path for video in videos.videos if not (video.path.is_file() or is_frame_folder(video.path))]
    if missing:
        raise AnnotationError(
            f"{source}: {len(missing)} of {len(videos)} listed videos do not exist, first {missing[0]}; paths in a list start "
            "from dataset.root or, where that is null, from the list's own folder"
        )


def existing_folder(path: str | Path) -> Path:
    """The folder. Raises AnnotationError if there is none."""
    path = Path(path)
    if path.is_file():
        raise AnnotationError(
            f"data folder {path}: is a file; give a folder of class folders, or dataset=list for lists of videos"
        )
    if not path.is_dir():
        raise AnnotationError(f"data folder {path}: does not exist{_start(path)}")
    return path


def _existing_file(path: str | Path) -> Path:
    path = Path(path)
    if path.is_dir():
        raise AnnotationError(f"list file {path}: is a folder; give a file, or dataset=folder for a folder of class folders")
    if not path.is_file():
        raise AnnotationError(f"list file {path}: does not exist{_start(path)}")
    return path


def _start(path: Path) -> str:
    return "" if path.is_absolute() else f"; relative paths start from {Path.cwd()}"
