"""Pixels of chosen frames: the only file that touches a video library.

A reader is opened where it is used (in the worker), for one item, with one thread, and closed at once: decord's readers
cannot cross a fork and decode ahead without bound while they idle.
"""

import importlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from stts_lightning.errors import UserError

Frames = NDArray[np.uint8]


class DecodeError(UserError):
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


def _decodable(container: Any, stream: Any, errors: list[str]) -> Iterator[Any]:
    """Frames of a stream by PyAV; a packet that does not decode is skipped, and what was wrong with it added to `errors`."""
    av: Any = importlib.import_module("av")
    for packet in container.demux(stream):
        try:
            yield from packet.decode()
        except av.FFmpegError as error:
            errors.append(_first_line(error))


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
        # One for all frames: a frame's own would be set up again for each.
        converter = importlib.import_module("av.video.reformatter").VideoReformatter()
        for number, frame in enumerate(_decodable(self._container, self._stream, [])):
            if number in chosen:
                image = converter.reformat(frame, format="rgb24").to_ndarray()
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


class Contents(NamedTuple):
    """What a video file holds.

    Attributes:
        promised: frames that its container promises; 0 where it does not say.
        frames: frames that decode, from the first on.
        width, height: of the first of them, upright.
        rate: frames a second, on average.
        codec: name.
        warning: what does not decode; empty if all is well.
    """

    promised: int
    frames: int
    width: int
    height: int
    rate: float
    codec: str
    warning: str


def examine(path: str | Path) -> Contents:
    """Decode a whole file by PyAV, which is exact for every container, and tell what it holds. Raises nothing but for a bug."""
    av: Any = importlib.import_module("av")
    promised, frames, size, rate, codec = 0, 0, (0, 0), 0.0, ""
    errors: list[str] = []
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                return Contents(0, 0, 0, 0, 0.0, "", "no video stream")
            stream = container.streams.video[0]
            stream.thread_count = 1
            promised, rate, codec = stream.frames, float(stream.average_rate or 0), stream.codec_context.name
            for frame in _decodable(container, stream, errors):
                if frames == 0:
                    turned = getattr(frame, "rotation", 0) % 180 != 0
                    size = (frame.height, frame.width) if turned else (frame.width, frame.height)
                frames += 1
    except (av.FFmpegError, OSError, ValueError) as error:
        errors.append(_first_line(error))
    return Contents(promised, frames, *size, rate, codec, _warning(promised, frames, errors))


def _warning(promised: int, frames: int, errors: list[str]) -> str:
    """What is to be said of a file of which some packets do not decode; nothing if all is well."""
    few = f"{frames} frames decode, {promised} promised" if promised and promised != frames else ""
    bad = "" if not errors else errors[0] if len(errors) == 1 else f"{errors[0]}, and {len(errors) - 1} errors more"
    return "; ".join(text for text in (few, bad) if text) or ("" if frames else "no frame decodes")


def probe(path: str | Path, frames: int, decoder: str) -> str:
    """Read first, middle and last frame as a loader would; returns what went wrong, empty if nothing."""
    try:
        with open_video(path, decoder) as reader:
            reader.frames(np.unique([0, frames // 2, frames - 1]))
    except DecodeError as error:
        return str(error)
    return ""


def transcode(source: str | Path, target: str | Path, short_side: int, keyframe_every: int = 12, crf: int = 20) -> str:
    """Write a video again as H.264 mp4 of a short side, with a key frame every few frames: what seeks and decodes fast.

    All frames that decode are kept, one for one, at their average rate; sound is left out; a smaller video keeps its size.

    Returns:
        What does not decode, if anything.

    Raises:
        DecodeError: if not one frame decodes.
    """
    av: Any = importlib.import_module("av")
    target = Path(target)
    part = target.with_suffix(".part.mp4")
    target.parent.mkdir(parents=True, exist_ok=True)
    frames, promised, width, height = 0, 0, 0, 0
    errors: list[str] = []
    with av.open(str(part), "w") as output:
        stream: Any = None
        try:
            with av.open(str(source)) as container:
                reading = container.streams.video[0]
                reading.thread_count = 1
                rate = Fraction(reading.average_rate or reading.guessed_rate or 25).limit_denominator(1001)
                promised = reading.frames
                for frame in _decodable(container, reading, errors):
                    turn = getattr(frame, "rotation", 0) // 90 % 4
                    if stream is None:
                        zoom = min(short_side / min(frame.width, frame.height), 1.0)
                        width, height = _even(frame.width * zoom), _even(frame.height * zoom)
                        options = {"crf": str(crf), "preset": "fast"}
                        stream = output.add_stream("libx264", rate=rate, options=options)
                        stream.width, stream.height = (height, width) if turn % 2 else (width, height)
                        stream.pix_fmt, stream.gop_size, stream.thread_count = "yuv420p", keyframe_every, 1
                    small = frame.reformat(width, height, format="rgb24" if turn else "yuv420p", interpolation="AREA")
                    if turn:
                        upright = np.ascontiguousarray(np.rot90(small.to_ndarray(), turn))
                        small = av.VideoFrame.from_ndarray(upright, format="rgb24")
                    small.pts, small.time_base = frames, 1 / rate
                    output.mux(stream.encode(small))
                    frames += 1
        except (av.FFmpegError, OSError) as error:
            errors.append(_first_line(error))
        except IndexError:
            errors.append("no video stream")
        if stream is not None:
            output.mux(stream.encode())
    if not frames:
        part.unlink(missing_ok=True)
        raise DecodeError(f"{source}: {_warning(promised, frames, errors)}")
    part.replace(target)
    return _warning(promised, frames, errors)


def _even(side: float) -> int:
    """The nearest even length, which 4:2:0 needs."""
    return max(round(side / 2) * 2, 2)


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
