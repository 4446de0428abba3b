"""Pixels of chosen frames: the only file that touches a video library.

A reader is opened where it is used (in the worker), for one item, with one thread, and closed at once: decord's readers
cannot cross a fork and decode ahead without bound while they idle.
"""

import importlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Frames = NDArray[np.uint8]


class DecodeError(RuntimeError):
    """A video that cannot be decoded: names the file and says what was found."""


class Reader(Protocol):
    """An open video."""

    def __len__(self) -> int:
        """Number of frames that the container promises."""
        ...

    @property
    def rate(self) -> float:
        """Frames a second, on average."""
        ...

    def frames(self, indices: NDArray[np.int64]) -> Frames:
        """Frames by number, in any order and with repeats, `(T, H, W, 3)` uint8 RGB, upright."""
        ...

    def close(self) -> None:
        """Give the file back."""
        ...


class DecordReader:
    """decord: seeks to the key frame before each wanted frame and decodes from there."""

    def __init__(self, path: Path) -> None:
        decord = importlib.import_module("decord")
        decord.logging.set_level(decord.logging.QUIET)
        self._reader = decord.VideoReader(str(path), num_threads=1)

    def __len__(self) -> int:
        return len(self._reader)

    @property
    def rate(self) -> float:
        """See `Reader.rate`."""
        return float(self._reader.get_avg_fps())

    def has_even_rate(self) -> bool:
        """Whether frames follow each other at one rate. decord seeks by time, which is exact only then."""
        times = self._reader.get_frame_timestamp(range(len(self)))[:, 0]
        gaps = np.diff(times)
        return gaps.size == 0 or float(gaps.max() - gaps.min()) < 0.5 * float(np.median(gaps))

    def frames(self, indices: NDArray[np.int64]) -> Frames:
        """See `Reader.frames`."""
        wanted, places = np.unique(indices, return_inverse=True)
        return self._reader.get_batch(wanted.tolist()).asnumpy()[places]

    def close(self) -> None:
        """See `Reader.close`."""
        del self._reader


class PyAVReader:
    """PyAV: decodes from the start to the last wanted frame; exact for every container, slower for late frames."""

    def __init__(self, path: Path) -> None:
        av = importlib.import_module("av")
        self._container = av.open(str(path))
        if not self._container.streams.video:
            raise DecodeError("no video stream")
        self._stream = self._container.streams.video[0]
        self._stream.thread_count = 1
        self._length = self._stream.frames or sum(1 for p in self._container.demux(self._stream) if p.size)
        if not self._stream.frames:
            self._container.seek(0)

    def __len__(self) -> int:
        return self._length

    @property
    def rate(self) -> float:
        """See `Reader.rate`."""
        return float(self._stream.average_rate or self._stream.guessed_rate or 0)

    def frames(self, indices: NDArray[np.int64]) -> Frames:
        """See `Reader.frames`."""
        wanted, places = np.unique(indices, return_inverse=True)
        last = int(wanted[-1])
        chosen = set(wanted.tolist())
        out: list[Frames] = []
        for number, frame in enumerate(self._container.decode(self._stream)):
            if number in chosen:
                image = frame.to_ndarray(format="rgb24")
                out.append(np.rot90(image, getattr(frame, "rotation", 0) // 90))
            if number == last:
                break
        if len(out) < len(wanted):
            raise DecodeError(f"frame {int(wanted[len(out)])} does not decode, of {len(self)} promised")
        return np.ascontiguousarray(np.stack(out)[places])

    def close(self) -> None:
        """See `Reader.close`."""
        self._container.close()


def _is_transport_stream(path: Path) -> bool:
    """Whether a file is MPEG-TS: packets of 188 bytes (192 with a time code), each beginning with 0x47."""
    with path.open("rb") as file:
        head = file.read(192 * 2 + 5)
    return any(len(head) > start + size and head[start] == head[start + size] == 0x47 for start, size in ((0, 188), (4, 192)))


def _decord_or_exact(path: Path) -> Reader:
    if _is_transport_stream(path):  # decord never returns from a far seek in one.
        return PyAVReader(path)
    reader = DecordReader(path)
    if reader.has_even_rate():
        return reader
    reader.close()
    return PyAVReader(path)


DECODERS: dict[str, Callable[[Path], Reader]] = {"decord": _decord_or_exact, "pyav": PyAVReader}


@contextmanager
def open_video(path: str | Path, decoder: str = "decord") -> Iterator[Reader]:
    """Open a video for reading; every failure inside becomes one DecodeError that names the file.

    Args:
        path: the file.
        decoder: "decord" (files of uneven frame rate and MPEG-TS go to PyAV, which is exact on them) or "pyav".

    Raises:
        DecodeError: if the file is missing, is no video, has no frames, or a frame does not decode.
        ValueError: for an unknown decoder.
    """
    path = Path(path)
    if decoder not in DECODERS:
        raise ValueError(f"decoder={decoder!r}: allowed are {', '.join(DECODERS)}")
    if not path.is_file():
        raise DecodeError(f"{path}: no such file")
    reader: Reader | None = None
    try:
        reader = DECODERS[decoder](path)
        if len(reader) < 1:
            raise DecodeError("it holds no frames")
        yield reader
    except ImportError:
        raise
    except Exception as error:  # decord and FFmpeg raise many kinds; all mean that this file is no use.
        raise DecodeError(
            f"{path}: cannot be decoded by {decoder} ({path.stat().st_size} bytes): {_first_line(error)}"
        ) from error
    finally:
        if reader is not None:
            reader.close()


def _first_line(error: Exception) -> str:
    """The first telling part of a library's message, without its stack trace."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[0].split("Check failed: ")[-1].split("] ")[-1][:160]


def write_mp4(path: str | Path, frames: Iterable[Frames], rate: int = 24, keyframe_every: int = 12, crf: int = 18) -> None:
    """Write RGB frames `(H, W, 3)` uint8 (even sides) as H.264 mp4, by PyAV. A broken-off write leaves no file."""
    av: Any = importlib.import_module("av")
    path = Path(path)
    part = path.with_suffix(".part.mp4")
    with av.open(str(part), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(rate), options={"crf": str(crf), "preset": "veryfast"})
        stream.pix_fmt, stream.gop_size, stream.thread_count = "yuv420p", keyframe_every, 1
        for image in frames:
            if not stream.is_open:
                stream.height, stream.width = image.shape[:2]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    part.replace(path)
