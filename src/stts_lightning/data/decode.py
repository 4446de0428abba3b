"""Video files and frame folders: frames of them, what they hold, and writing them. The way in for all that reads videos."""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from stts_lightning.data.encode import transcode, write_mp4
from stts_lightning.data.readers import (
    DecordReader,
    FolderReader,
    Frames,
    PyAVReader,
    Reader,
    damage,
    decoded_frames,
    first_line,
    is_frame_folder,
)
from stts_lightning.data.streams import DecodeError, choose_stream, describe_choice, index_file, why_not_decord

__all__ = [
    "DECODERS",
    "Contents",
    "DecodeError",
    "Frames",
    "Reader",
    "examine",
    "is_frame_folder",
    "open_video",
    "probe",
    "transcode",
    "write_mp4",
]


def _decord_or_exact(path: Path) -> Reader:
    """Decord's reader where it is exact, else PyAV's."""
    if reason := why_not_decord(path):
        return PyAVReader(path, reason)
    try:
        return DecordReader(path)
    except ImportError:
        raise
    except Exception:  # decord raises many kinds; what it says differs from file to file.
        return PyAVReader(path, "decord cannot open it")


DECODERS: dict[str, Callable[[Path], Reader]] = {"decord": _decord_or_exact, "pyav": PyAVReader}


@contextmanager
def open_video(path: str | Path, decoder: str = "decord") -> Iterator[Reader]:
    """Open a video for reading; every failure inside becomes one DecodeError that names the file.

    Args:
        path: the file, or a folder with a picture for each frame.
        decoder: "decord" (files on which it is not exact, or that it cannot open, go to PyAV) or "pyav". A folder of numbered
            pictures needs neither.

    Raises:
        DecodeError: if the file is missing, is no video, has no frames, or a frame does not decode.
        ValueError: for an unknown decoder.
    """
    path = Path(path)
    if decoder not in DECODERS:
        raise ValueError(f"decoder={decoder!r}: allowed are {', '.join(DECODERS)}")
    folder = path.is_dir()
    if not folder and not path.is_file():
        raise DecodeError(f"{path}: no such file")
    reader: Reader | None = None
    try:
        reader = FolderReader(path) if folder else DECODERS[decoder](path)
        if len(reader) < 1:
            raise DecodeError("it holds no frames")
        yield reader
    except ImportError:
        raise
    except Exception as error:  # decord and FFmpeg raise many kinds; all mean that this file is no use.
        what = "cannot be read" if folder else f"cannot be decoded by {decoder} ({path.stat().st_size} bytes)"
        raise DecodeError(f"{path}: {what}: {first_line(error)}") from error
    finally:
        if reader is not None:
            reader.close()


class Contents(NamedTuple):
    """What a video holds.

    Attributes:
        promised: frames that its container promises; 0 where it does not say.
        frames: frames that decode, from the first on.
        width, height: of the first of them, upright.
        rate: frames a second, on average.
        codec: name.
        warning: what does not decode, and which of several streams is read; empty if all is well.
        samples: by frame number, a small grey picture of some frames and of those around them.
    """

    promised: int
    frames: int
    width: int
    height: int
    rate: float
    codec: str
    warning: str
    samples: dict[int, NDArray[np.uint8]]


SAMPLED, AROUND, SAMPLE_SIDE = 10, 4, 48


def sampled_frames(count: int) -> list[int]:
    """Numbers of the frames of a video on which decoders are compared: spread from its start to its end."""
    return np.unique(np.linspace(0, count - 1, SAMPLED).round().astype(int)).tolist() if count else []


def _sample(image: Frames) -> NDArray[np.uint8]:
    pillow: Any = importlib.import_module("PIL.Image")
    return np.asarray(pillow.fromarray(image).convert("L").resize((SAMPLE_SIDE, SAMPLE_SIDE), pillow.Resampling.BOX))


def examine(path: str | Path) -> Contents:
    """Decode a whole video by PyAV, which is exact for every container, and tell what it holds. Raises nothing but for a bug."""
    path = Path(path)
    return _examine_folder(path) if path.is_dir() else _examine_file(path)


def _examine_folder(path: Path) -> Contents:
    try:
        reader = FolderReader(path)
        sizes = {reader.frames(np.array([number])).shape[1:3] for number in range(len(reader))}
        height, width = reader.frames(np.array([0])).shape[1:3]
    except DecodeError as error:
        return Contents(0, 0, 0, 0, 0.0, "", str(error), {})
    warning = f"pictures of {len(sizes)} sizes: all get that of the first" if len(sizes) > 1 else ""
    return Contents(len(reader), len(reader), width, height, 0.0, "pictures", warning, {})


def _examine_file(path: Path) -> Contents:
    av: Any = importlib.import_module("av")
    promised, frames, size, rate, codec, notes = 0, 0, (0, 0), 0.0, "", list[str]()
    errors: list[str] = []
    samples: dict[int, NDArray[np.uint8]] = {}
    try:
        shown = index_file(path).count
        around = {n + i for n in sampled_frames(shown) for i in range(-AROUND, AROUND + 1)}
        with av.open(str(path)) as container:
            stream = choose_stream(container)
            notes += [text for text in [describe_choice(container, stream)] if text]
            stream.thread_count = 1
            promised, rate, codec = stream.frames, float(stream.average_rate or 0), stream.codec_context.name
            sizes: dict[tuple[int, int], int] = {}
            for frame in decoded_frames(container, stream, errors):
                turns = getattr(frame, "rotation", 0) // 90
                sizes.setdefault((frame.width, frame.height), frames)
                if frames == 0:
                    size = (frame.height, frame.width) if turns % 2 else (frame.width, frame.height)
                if frames in around:
                    samples[frames] = _sample(np.rot90(frame.to_ndarray(format="rgb24"), turns))
                frames += 1
            if len(sizes) > 1:
                changes = ", ".join(f"{w}x{h} at frame {first}" for (w, h), first in list(sizes.items())[:4])
                notes.append(f"the picture size changes ({changes}); all get the first size")
            if frames == shown:  # A header promises frames that an edit list cuts away as well.
                promised = frames if promised else 0
    except (DecodeError, av.FFmpegError, OSError, ValueError) as error:
        errors.append(first_line(error))
    warning = "; ".join(text for text in (*notes, damage(promised, frames, errors)) if text)
    return Contents(promised, frames, *size, rate, codec, warning, samples)


def probe(path: str | Path, frames: int, decoder: str, samples: dict[int, NDArray[np.uint8]] | None = None) -> str:
    """What is wrong with the frames that a decoder gives, beside those that PyAV decodes in order; empty if nothing.

    A frame is wrong if it is more like another one around it, or like none. Each is asked for alone, after a seek.

    Args:
        path: the file.
        frames: how many decode.
        decoder: "decord", by itself also where `open_video` would take PyAV, or "pyav".
        samples: what `examine` kept of the file; None examines it.
    """
    path, wanted = Path(path), sampled_frames(frames)
    samples = examine(path).samples if samples is None else samples
    try:
        reader = DecordReader(path) if decoder == "decord" else PyAVReader(path)
        try:
            wrong = [n for n in wanted if _is_other(n, _sample(reader.frames(np.array([n]))[0]), samples)]
        finally:
            reader.close()
    except Exception as error:  # decord raises many kinds.
        return first_line(error)
    return f"gives other frames for {wrong} of {wanted}" if wrong else ""


def _is_other(number: int, image: NDArray[np.uint8], samples: dict[int, NDArray[np.uint8]]) -> bool:
    def distance(other: int) -> float:
        return float(np.abs(image.astype(int) - samples[other]).mean())

    if number not in samples:
        return False
    near = [distance(other) for other in range(number - AROUND, number + AROUND + 1) if other in samples and other != number]
    own = distance(number)
    return own > 12 or (own > 1 and own > 2 * min(near, default=own))
