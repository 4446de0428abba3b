"""What a file's packets say about its frames: which stream is the video, how many frames it shows, and whether decord is exact.

Packets are read without decoding them, which takes one or two milliseconds for a clip of ten seconds.
"""

import importlib
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from stts_lightning.errors import UserError


class DecodeError(UserError):
    """A video that cannot be decoded: names the file and says what was found."""


# In other containers decord seeks to wrong frames (AVI, ASF, MPEG-PS) or never returns (MPEG-TS).
DECORD_CONTAINERS = frozenset({"mov", "mp4", "matroska", "webm", "flv"})
SEEKABLE_CONTAINERS = frozenset({"mov", "mp4", "matroska", "webm"})
"""Containers with an index of key frames, by which PyAV seeks exactly."""


class KeyFrame(NamedTuple):
    """A frame at which decoding can begin.

    Attributes:
        number: of the frame, in order of display.
        pts: when it is shown, in units of the stream.
        seek: the time by which the container's index finds it, in the same units.
    """

    number: int
    pts: int
    seek: int


@dataclass(frozen=True)
class FrameIndex:
    """The frames of a stream, as its packets announce them.

    Attributes:
        count: packets that show a frame: those that an edit list cuts away, and hidden ones, do not. Of a file that is cut
            short what its header promises.
        pts: when each is shown, `(count,)` in order of display; empty where packets do not say.
        keys: `(keys, 3)`, of each key frame what `KeyFrame` says, in order of display; empty where a seek is not exact.
        inexact: why decord would give wrong frames; empty if it is exact.
    """

    count: int
    pts: NDArray[np.int64]
    keys: NDArray[np.int64]
    inexact: str

    def key_before(self, number: int) -> KeyFrame | None:
        """The last key frame at or before a frame; None if there is none to seek to."""
        at = int(np.searchsorted(self.keys[:, 0], number, side="right")) - 1
        return None if at < 0 else KeyFrame(*self.keys[at].tolist())


def choose_stream(container: Any) -> Any:
    """The stream that a player shows, of a container opened by PyAV.

    Cover pictures and thumbnails never; of the others the one marked as default; of several the largest picture, then the
    longest.

    Raises:
        DecodeError: if there is none.
    """
    d = importlib.import_module("av.stream").Disposition
    still = d.attached_pic | d.timed_thumbnails | d.still_image
    videos = [stream for stream in container.streams.video if not stream.disposition & still]
    if not videos:
        raise DecodeError("no video stream" + (", only a picture" if container.streams.video else ""))

    def rank(stream: Any) -> tuple[bool, int, float]:
        length = float((stream.duration or 0) * (stream.time_base or 0)) or float(stream.frames)
        return bool(stream.disposition & d.default), stream.width * stream.height, length

    return max(videos, key=rank)


def describe_choice(container: Any, stream: Any) -> str:
    """Which stream was chosen, in words; empty if there is no choice."""
    videos = container.streams.video
    if len(videos) < 2:
        return ""
    return f"video stream {videos.index(stream)} of {len(videos)} is used ({stream.width}x{stream.height})"


def index_frames(container: Any, stream: Any) -> FrameIndex:
    """Read all packets of a container that was just opened, and tell what frames they announce."""
    hidden = _hides_frame if stream.codec_context.name in ("vp8", "libvpx") else None
    everything = [
        (p.pts, p.dts, p.is_keyframe, p.is_discard or (hidden is not None and hidden(p)))
        for p in container.demux(stream)
        if p.size
    ]
    packets = [packet for packet in _without_leading(everything) if not packet[3]]
    names = set(container.format.name.split(","))
    count = len(packets)
    no_times, no_keys = np.empty(0, np.int64), np.empty((0, 3), np.int64)
    if (promised := _promised(container, stream)) > len(everything):
        return FrameIndex(promised, no_times, no_keys, "the file is cut short")
    if not names & DECORD_CONTAINERS:
        container_name = container.format.name.partition(",")[0]
        return FrameIndex(count, no_times, no_keys, f"decord seeks wrongly in {container_name} files")
    if not count or any(packet[0] is None for packet in packets):
        return FrameIndex(count, no_times, no_keys, "its packets have no time stamps")
    pts = np.array([packet[0] for packet in packets], np.int64)
    order = np.sort(pts)
    if (np.diff(order) <= 0).any():
        return FrameIndex(count, no_times, no_keys, "two frames have one time stamp")
    # The index of an mp4 file is by time of decoding, that of a Matroska file by time of display.
    by_dts = "mp4" in names and all(packet[1] is not None for packet in packets)
    seeks = np.array([packet[1] for packet in packets], np.int64) if by_dts else pts
    at = np.flatnonzero([packet[2] for packet in packets])
    numbers = np.searchsorted(order, pts[at])
    open_gop = bool((numbers != at).any())
    keys = np.stack([numbers, pts[at], seeks[at]], axis=1)[np.argsort(numbers)] if names & SEEKABLE_CONTAINERS else no_keys
    if len(container.streams.video) > 1:
        inexact = "it has several video streams"
    elif len(packets) < len(everything):  # Of an edit list, hidden, or before the first key frame.
        inexact = "it holds frames that are not shown"
    elif open_gop:
        inexact = "frames before a key frame are decoded after it (open GOP)"
    elif _is_uneven(order):
        inexact = "its frame rate is uneven"
    else:
        inexact = ""
    return FrameIndex(count, order, keys, inexact)


def _promised(container: Any, stream: Any) -> int:
    """Frames that a file's header has and the file may lack; 0 where it does not say.

    An edit list leaves frames out of the index of an mp4 file. The count in an AVI file's header is often wrong, but its size
    is not.
    """
    if "mp4" in container.format.name:
        return len(stream.index_entries)
    if container.format.name == "avi":
        with open(container.name, "rb") as file:
            size = int.from_bytes(file.read(8)[4:], "little") + 8
            return stream.frames if size > file.seek(0, os.SEEK_END) else 0
    return 0


def _without_leading(packets: list[Any]) -> list[Any]:
    """Packets from the first key frame on, without the frames shown before it: what those refer to is not in the file."""
    first = next((number for number, packet in enumerate(packets) if packet[2]), 0)
    rest = packets[first:]
    if not rest or any(packet[0] is None for packet in rest):
        return rest
    return [packet for packet in rest if packet[0] >= rest[0][0]]


def _hides_frame(packet: Any) -> bool:
    """Whether a VP8 packet is an alternate reference frame, which is decoded and not shown (RFC 6386, section 9.1)."""
    return not memoryview(packet)[0] & 0x10


def _is_uneven(pts: NDArray[np.int64]) -> bool:
    """Whether gaps between frames differ by half a frame or more. decord seeks by time, which is exact only below that."""
    gaps = np.diff(pts)
    return gaps.size > 0 and float(gaps.max() - gaps.min()) >= 0.5 * float(np.median(gaps))


def index_file(path: Path) -> FrameIndex:
    """The frames of a file's video stream. Raises DecodeError if it has none, and what PyAV raises."""
    av: Any = importlib.import_module("av")
    with av.open(str(path), options=_QUICK | (_MP4_QUICK if _is_mp4(path) else {})) as container:
        return index_frames(container, choose_stream(container))


# Otherwise opening decodes a frame, which takes most of the time.
_QUICK = {"skip_frame": "all"}
# The header of an mp4 file says all; other files need to be looked into.
_MP4_QUICK = {"probesize": "32", "analyzeduration": "0"}


def _is_mp4(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(8)[4:] == b"ftyp"


def is_transport_stream(path: Path) -> bool:
    """Whether a file is MPEG-TS: packets of 188 bytes (192 with a time code), each beginning with 0x47."""
    with path.open("rb") as file:
        head = file.read(192 * 2 + 5)
    return any(len(head) > start + size and head[start] == head[start + size] == 0x47 for start, size in ((0, 188), (4, 192)))


def why_not_decord(path: Path) -> str:
    """Why decord would give wrong frames of a file; empty if it is exact. Raises what `index_file` raises."""
    status = path.stat()
    return _why_not_decord(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=1 << 15)  # Each epoch opens the same files.
def _why_not_decord(path: Path, size: int, changed: int) -> str:
    return index_file(path).inexact
