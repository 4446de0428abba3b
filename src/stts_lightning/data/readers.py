"""Readers: chosen frames of one open video file or frame folder.

A reader is opened where it is used (in the worker), for one item, with one thread, and closed at once: decord's readers
cannot cross a fork and decode ahead without bound while they idle.
"""

import importlib
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from stts_lightning.data.streams import DecodeError, KeyFrame, choose_stream, index_file

Frames = NDArray[np.uint8]
INTRA = 1
"""FFmpeg's type of a picture that refers to no other."""
PICTURES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})


class Reader(Protocol):
    """An open video.

    Attributes:
        note: why another decoder than the one asked for reads it; empty otherwise.
    """

    note: str

    def __len__(self) -> int:
        """Number of frames that the container promises."""
        ...

    @property
    def rate(self) -> float:
        """Frames a second, on average; 0 where the file does not say."""
        ...

    def frames(self, indices: NDArray[np.int64]) -> Frames:
        """Frames by number, in any order and with repeats, `(T, H, W, 3)` uint8 RGB, upright."""
        ...

    def close(self) -> None:
        """Close the file."""
        ...


class DecordReader:
    """decord: seeks to the key frame before each wanted frame and decodes from there. Exact where `why_not_decord` is empty."""

    def __init__(self, path: Path) -> None:
        decord = importlib.import_module("decord")
        decord.logging.set_level(decord.logging.QUIET)
        self._reader = decord.VideoReader(str(path), num_threads=1)
        self.note = ""

    def __len__(self) -> int:
        return len(self._reader)

    @property
    def rate(self) -> float:
        """See `Reader.rate`."""
        return float(self._reader.get_avg_fps())

    def frames(self, indices: NDArray[np.int64]) -> Frames:
        """See `Reader.frames`."""
        wanted, places = np.unique(indices, return_inverse=True)
        return self._reader.get_batch(wanted.tolist()).asnumpy()[places]

    def close(self) -> None:
        """See `Reader.close`."""
        del self._reader


class PyAVReader:
    """PyAV: exact for every container.

    It decodes forward from where it stands. It seeks, to the key frame before the wanted frame, only in containers with an
    index of key frames, and checks by time stamps that it arrived there; else it decodes from the start.
    """

    def __init__(self, path: Path, note: str = "") -> None:
        self.note = note
        self._path = path
        self._index = index_file(path)
        self._seeks = len(self._index.keys) > 0
        # One for all frames: a frame's own would be set up again for each.
        self._converter = importlib.import_module("av.video.reformatter").VideoReformatter()
        self._container: Any = None
        self._restart()
        context = self._stream.codec_context
        self._size = (context.width, context.height)
        """All pictures get the size of the first one, if it changes within the stream."""

    def __len__(self) -> int:
        return self._index.count

    @property
    def rate(self) -> float:
        """See `Reader.rate`."""
        return float(self._stream.average_rate or self._stream.guessed_rate or 0)

    def frames(self, indices: NDArray[np.int64]) -> Frames:
        """See `Reader.frames`."""
        wanted, places = np.unique(indices, return_inverse=True)
        return np.stack([self._frame(number) for number in wanted.tolist()])[places]

    def close(self) -> None:
        """See `Reader.close`."""
        self._container.close()

    def _frame(self, number: int) -> Frames:
        """One frame, upright. Raises DecodeError if it does not decode."""
        if number != self._last[0]:
            self._last = (number, self._picture(self._decode(number)))
        return self._last[1]

    def _decode(self, number: int) -> Any:
        if number == self._held[0]:
            return self._held[1]
        key = self._index.key_before(number) if self._seeks else None
        try:
            if key and (key.number > self._next or number < self._next):
                self._seek(key)
            elif number < self._next:
                self._restart()
            return self._forward(number)
        except DecodeError:
            if not self._sought:
                raise
        self._seeks = False  # A seek in this file cannot be trusted.
        self._restart()
        return self._forward(number)

    def _forward(self, number: int) -> Any:
        """Decode up to a frame. Frames are known by their time stamps, or else counted from the start.

        A damaged frame that others follow is the one before it, as a player shows it.
        """
        for decoded in self._decoded:
            at = self._number(decoded)
            if self._sought and (at != self._next or decoded.is_corrupt):
                raise DecodeError("frames after a seek are not those of the index")
            if at < self._next:
                continue
            before = self._held[1]
            self._held, self._next = (at, decoded), at + 1
            if at == number:
                return decoded
            if at > number:
                return decoded if before is None else before
        raise DecodeError(f"frame {self._next} does not decode, of {len(self)} promised")

    def _number(self, frame: Any) -> int:
        """Of a decoded frame; that of the next one where time stamps do not say."""
        pts = self._index.pts
        if frame.pts is None or not len(pts):
            return self._next
        at = int(np.searchsorted(pts, frame.pts))
        return at if at < len(pts) and pts[at] == frame.pts else self._next

    def _restart(self) -> None:
        """Open the file anew: a seek to the start is not exact in every container."""
        av: Any = importlib.import_module("av")
        if self._container:
            self._container.close()
        self._container = av.open(str(self._path))
        self._stream = choose_stream(self._container)
        self._stream.thread_count = 1
        self._begin(0, sought=False)

    def _seek(self, key: KeyFrame) -> None:
        self._container.seek(key.seek, stream=self._stream)
        self._begin(key.number, sought=True)
        # Frames that are shown before the key frame may come first: what they refer to was not decoded.
        first = next((frame for frame in self._decoded if frame.pts is None or frame.pts >= key.pts), None)
        if first is None or first.pts != key.pts or int(first.pict_type) != INTRA:
            raise DecodeError("a seek does not arrive at the key frame")
        self._decoded = itertools.chain([first], self._decoded)

    def _begin(self, number: int, sought: bool) -> None:
        self._decoded: Iterator[Any] = decoded_frames(self._container, self._stream, [])
        self._next, self._sought = number, sought
        self._last: tuple[int, Frames] = (-1, np.empty(0, np.uint8))
        self._held: tuple[int, Any] = (-1, None)
        """The frame decoded last, and its number."""

    def _picture(self, frame: Any) -> Frames:
        image = self._converter.reformat(frame, *self._size, format="rgb24").to_ndarray()
        return np.ascontiguousarray(np.rot90(image, getattr(frame, "rotation", 0) // 90))


def decoded_frames(container: Any, stream: Any, errors: list[str]) -> Iterator[Any]:
    """Frames of a stream by PyAV; a packet that does not decode is skipped, and its error added to `errors`."""
    av: Any = importlib.import_module("av")
    for packet in container.demux(stream):
        try:
            yield from packet.decode()
        except av.FFmpegError as error:
            errors.append(first_line(error))


class FolderReader:
    """A folder with a picture for each frame, as `img_00001.jpg`, in the order of their numbers."""

    def __init__(self, path: Path) -> None:
        self.note = ""
        self._files = frame_files(path)
        self.rate = 0.0

    def __len__(self) -> int:
        return len(self._files)

    def frames(self, indices: NDArray[np.int64]) -> Frames:
        """See `Reader.frames`. All pictures get the size of the folder's first one."""
        wanted, places = np.unique(indices, return_inverse=True)
        if int(wanted[-1]) >= len(self):
            raise DecodeError(f"frame {int(wanted[-1])} is not there, of {len(self)} pictures")
        size = self._picture(0).shape[:2]
        return np.stack([self._picture(number, size) for number in wanted.tolist()])[places]

    def _picture(self, number: int, size: tuple[int, ...] | None = None) -> Frames:
        image: Any = importlib.import_module("PIL.Image")
        turn: Any = importlib.import_module("PIL.ImageOps")
        file = self._files[number]
        try:
            with image.open(file) as opened:
                picture = turn.exif_transpose(opened).convert("RGB")
        except (OSError, ValueError, SyntaxError) as error:
            raise DecodeError(f"{file.name} is no picture ({first_line(error)})") from error
        if size and picture.size != size[::-1]:
            picture = picture.resize(size[::-1])
        return np.asarray(picture)

    def close(self) -> None:
        """See `Reader.close`."""


def frame_files(folder: Path) -> list[Path]:
    """The pictures of a frame folder, in order of the number that ends their names.

    Raises:
        DecodeError: if there are none, if several kinds are mixed (optical flow, `flow_x_00001.jpg`, is left out), or if
            numbers are missing.
    """
    kinds: dict[str, list[tuple[int, Path]]] = {}
    for file in folder.iterdir():
        match = re.fullmatch(r"(.*?)(\d+)", file.stem)
        if match and file.suffix.lower() in PICTURES and not file.name.startswith((".", "flow_")):
            kinds.setdefault(f"{match[1]}*{file.suffix}", []).append((int(match[2]), file))
    if not kinds:
        raise DecodeError("a folder without numbered pictures (img_00001.jpg)")
    if len(kinds) > 1:
        raise DecodeError(f"a folder with several kinds of pictures: {', '.join(sorted(kinds)[:4])}")
    numbered = sorted(next(iter(kinds.values())))
    numbers = np.array([number for number, _ in numbered])
    gaps = np.diff(numbers)
    if gaps.size and (gaps != gaps[0]).any():
        at = int(np.flatnonzero(gaps != np.bincount(gaps).argmax())[0])
        raise DecodeError(f"pictures are missing, or twice, after {numbered[at][1].name}")
    return [file for _, file in numbered]


def is_frame_folder(path: Path) -> bool:
    """Whether a folder holds numbered pictures, and so is a video."""
    if not path.is_dir():
        return False
    return any(file.suffix.lower() in PICTURES and file.stem[-1:].isdigit() and file.name[0] != "." for file in path.iterdir())


def first_line(error: Exception) -> str:
    """The first telling part of a library's message, without its stack trace."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[0].split("Check failed: ")[-1].split("] ")[-1][:160]


def damage(promised: int, frames: int, errors: list[str]) -> str:
    """What is to be said of a file of which some packets do not decode; nothing if all is well."""
    few = f"{frames} frames decode, {promised} promised" if promised and promised != frames else ""
    bad = "" if not errors else errors[0] if len(errors) == 1 else f"{errors[0]}, and {len(errors) - 1} errors more"
    return "; ".join(text for text in (few, bad) if text) or ("" if frames else "no frame decodes")
