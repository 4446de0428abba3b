"""Writing videos: any file again in a form that loads fast, and arrays of frames."""

import hashlib
import importlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from stts_lightning.data.readers import FolderReader, Frames, damage, decoded_frames, first_line, frame_files
from stts_lightning.data.streams import DecodeError, choose_stream, index_file
from stts_lightning.files import replacing

FOLDER_RATE = 30
"""Frames a second of an encoded frame folder, which says none."""


@dataclass(frozen=True)
class Encoding:
    """How a video is written again.

    Attributes:
        short_side: pixels; a smaller video keeps its size.
        keyframe_every: frames from one key frame to the next.
        crf: quality of x264, less is better.
    """

    short_side: int
    keyframe_every: int = 12
    crf: int = 20

    def write(self, source: Path, target: Path) -> str:
        """Write a video again, unless that is done; returns what does not decode. Raises DecodeError if nothing does."""
        return "" if is_encoded(source, target, self) else transcode(source, target, **asdict(self))


def is_encoded(source: Path, target: Path, encoding: Encoding) -> bool:
    """Whether a target was written from this source with these settings: it says so itself."""
    av: Any = importlib.import_module("av")
    if not target.is_file():
        return False
    try:
        with av.open(str(target), options={"skip_frame": "all"}) as container:
            return container.metadata.get("comment") == _origin(source, encoding)
    except av.FFmpegError:
        return False


def _origin(source: Path, encoding: Encoding) -> str:
    """What a target says of itself: name and fingerprint of its source, and the settings."""
    files = frame_files(source) if source.is_dir() else [source]
    digest = hashlib.sha256(str(len(files)).encode())
    for file in (files[0], files[-1]):
        with file.open("rb") as content:
            size = content.seek(0, os.SEEK_END)
            digest.update(str(size).encode())
            for start in (0, max(size - 2**16, 0)):  # A copy has another date, and reading all takes long.
                content.seek(start)
                digest.update(content.read(2**16))
    return json.dumps({"source": source.name, "sha256_of_ends": digest.hexdigest()[:16], **asdict(encoding)})


def transcode(source: str | Path, target: str | Path, short_side: int, keyframe_every: int = 12, crf: int = 20) -> str:
    """Write a video again as H.264 mp4 of a short side, with a key frame every few frames: what seeks and decodes fast.

    All frames that decode are kept, one for one, at their average rate; sound is left out. See `Encoding` for the arguments.

    Returns:
        What does not decode, if anything.

    Raises:
        DecodeError: if not one frame decodes.
    """
    av: Any = importlib.import_module("av")
    source, target = Path(source), Path(target)
    encoding = Encoding(short_side, keyframe_every, crf)
    count, width, height = 0, 0, 0
    errors: list[str] = []
    with replacing(target) as part:
        with _decoding(source, errors) as (frames, rate, promised), av.open(str(part), "w") as output:
            stream: Any = None
            output.metadata["comment"] = _origin(source, encoding)
            for frame in frames:
                turn = getattr(frame, "rotation", 0) // 90 % 4
                if stream is None:
                    zoom = min(encoding.short_side / min(frame.width, frame.height), 1.0)
                    width, height = even(frame.width * zoom), even(frame.height * zoom)
                    stream = output.add_stream("libx264", rate=rate, options={"crf": str(encoding.crf), "preset": "fast"})
                    stream.width, stream.height = (height, width) if turn % 2 else (width, height)
                    stream.pix_fmt, stream.gop_size, stream.thread_count = "yuv420p", encoding.keyframe_every, 1
                small = frame.reformat(width, height, format="rgb24" if turn else "yuv420p", interpolation="AREA")
                if turn:
                    upright = np.ascontiguousarray(np.rot90(small.to_ndarray(), turn))
                    small = av.VideoFrame.from_ndarray(upright, format="rgb24")
                small.pts, small.time_base = count, 1 / rate
                output.mux(stream.encode(small))
                count += 1
            if stream is not None:
                output.mux(stream.encode())
        if not count:
            raise DecodeError(f"{source}: {damage(promised, count, errors)}")
    return damage(promised, count, errors)


@contextmanager
def _decoding(source: Path, errors: list[str]) -> Iterator[tuple[Iterator[Any], Fraction, int]]:
    """All frames of a video as PyAV has them, its rate, and how many it promises; what does not decode goes to `errors`."""
    av: Any = importlib.import_module("av")
    if source.is_dir():
        reader = FolderReader(source)
        pictures = (np.ascontiguousarray(reader.frames(np.array([number]))[0]) for number in range(len(reader)))
        yield (av.VideoFrame.from_ndarray(picture, format="rgb24") for picture in pictures), Fraction(FOLDER_RATE), len(reader)
        return
    with ExitStack() as opened:
        try:
            promised = index_file(source).count
            container = opened.enter_context(av.open(str(source)))
            stream = choose_stream(container)
        except (DecodeError, av.FFmpegError, OSError) as error:
            raise DecodeError(f"{source}: {first_line(error)}") from error
        stream.thread_count = 1
        rate = Fraction(stream.average_rate or stream.guessed_rate or 25).limit_denominator(1001)
        yield decoded_frames(container, stream, errors), rate, promised


def even(side: float) -> int:
    """The nearest even length, which 4:2:0 needs."""
    return max(round(side / 2) * 2, 2)


def write_mp4(path: str | Path, frames: Iterable[Frames], rate: int = 24, keyframe_every: int = 12, crf: int = 18) -> None:
    """Write RGB frames `(H, W, 3)` uint8 (even sides) as H.264 mp4, by PyAV. A broken-off write leaves no file."""
    av: Any = importlib.import_module("av")
    path = Path(path)
    with replacing(path) as part, av.open(str(part), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(rate), options={"crf": str(crf), "preset": "veryfast"})
        stream.pix_fmt, stream.gop_size, stream.thread_count = "yuv420p", keyframe_every, 1
        for image in frames:
            if not stream.is_open:
                stream.height, stream.width = image.shape[:2]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
