"""What is known of the files of a data set, found out once: which decode, how many frames of them, by which decoder."""

import csv
import hashlib
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from stts_lightning.data.annotations import AnnotationError, VideoList
from stts_lightning.files import replacing


@dataclass(frozen=True)
class Entry:
    """A file.

    Attributes:
        path: absolute, or from the manifest's folder.
        status: ok, missing, broken (not one frame), hangs or crashes (under every decoder).
        frames: that decode.
        promised: by the container.
        width, height, rate, codec: of the first frame and the stream.
        decoder: that reads it: decord, or pyav where decord does not.
        warning: what is odd about it.
    """

    path: str
    status: str
    frames: int = 0
    promised: int = 0
    width: int = 0
    height: int = 0
    rate: float = 0.0
    codec: str = ""
    decoder: str = ""
    warning: str = ""


COLUMNS = [field.name for field in fields(Entry)]
_NUMBERS = ("frames", "promised", "width", "height")


def write_manifest(file: str | Path, entries: Iterable[Entry]) -> None:
    """Write a manifest as CSV, paths relative to its folder where they lie in it."""
    file = Path(file)
    base = file.parent.resolve()
    with replacing(file) as part, part.open("w", newline="", encoding="utf-8", errors="surrogateescape") as out:
        writer = csv.DictWriter(out, COLUMNS)
        writer.writeheader()
        for entry in entries:
            path = Path(entry.path).absolute()
            inside = path.relative_to(base) if path.is_relative_to(base) else path
            writer.writerow(asdict(replace(entry, path=str(inside))))


def read_manifest(file: str | Path) -> dict[Path, Entry]:
    """Entries by absolute path.

    Raises:
        AnnotationError: if the file is missing or no manifest.
    """
    file = Path(file)
    if not file.is_file():
        raise AnnotationError(f"manifest {file}: does not exist; prepare_data task=check writes it")
    base = file.parent.resolve()
    entries: dict[Path, Entry] = {}
    with file.open(newline="", encoding="utf-8", errors="surrogateescape") as lines:
        reader = csv.DictReader(lines)
        if reader.fieldnames is None or list(reader.fieldnames) != COLUMNS:
            raise AnnotationError(f"manifest {file}: its columns are {reader.fieldnames}, expected {COLUMNS}")
        for row in reader:
            values = {**row, **{name: int(row[name]) for name in _NUMBERS}, "rate": float(row["rate"])}
            entry = Entry(**values)
            entries[(base / entry.path).absolute()] = entry
    return entries


def manifest_hash(entries: Iterable[Entry]) -> str:
    """Twelve hexadecimal digits that tell two states of the files apart: of names, status and frames, in order."""
    text = "\n".join(f"{Path(entry.path).name} {entry.status} {entry.frames}" for entry in entries)
    return hashlib.sha256(os.fsencode(text)).hexdigest()[:12]


def with_manifest(videos: VideoList, manifest: dict[Path, Entry], source: str) -> VideoList:
    """A list without the videos that do not decode, and with what is known of the others.

    Raises:
        AnnotationError: for a video that the manifest does not know, or if none is left.
    """
    kept = []
    for video in videos.videos:
        entry = manifest.get(video.path.absolute()) or manifest.get(video.path.resolve())
        if entry is None:
            raise AnnotationError(f"{source}: {video.path} is not in it; run prepare_data task=check again")
        if entry.status == "ok":
            kept.append(replace(video, frames=entry.frames, decoder=entry.decoder if entry.decoder == "pyav" else None))
    if not kept:
        raise AnnotationError(f"{source}: none of the {len(videos)} listed videos decodes")
    return VideoList(tuple(kept), videos.classes)
