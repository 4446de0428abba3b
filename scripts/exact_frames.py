"""Which decoder gives which frames: wrong clips by kind of file, counted on videos whose pictures carry their number.

    python scripts/exact_frames.py [--clips 60] [--folder FOLDER]

Prints a table in Markdown. Kinds that PyAV's FFmpeg cannot write are left out.
"""

import argparse
import importlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stts_lightning.data.decode import DecodeError, Reader, open_video
from stts_lightning.data.readers import DecordReader
from stts_lightning.data.streams import is_transport_stream

FRAMES, BITS = 120, 8
WIDTH, HEIGHT = 160, 96


def picture(number: int, width: int = WIDTH, height: int = HEIGHT) -> NDArray[np.uint8]:
    """A picture with its number as eight dark or bright bars."""
    bars = np.array([225 if number >> bit & 1 else 30 for bit in range(BITS)], np.uint8)
    row = bars[np.arange(width) * BITS // width]
    return np.repeat(np.broadcast_to(row, (height, width))[..., None], 3, axis=2)


def number_of(image: NDArray[np.uint8]) -> int:
    """The number that a picture carries, whatever its size."""
    height, width = image.shape[:2]
    middle = image[height // 4 : 3 * height // 4].mean(axis=(0, 2))
    return sum(1 << bit for bit in range(BITS) if middle[int((bit + 0.5) * width / BITS)] > 128)


@dataclass(frozen=True)
class Kind:
    """How a file is made.

    Attributes:
        suffix: of its name; says the container unless `container` does.
        codec: encoder.
        options: of the encoder.
        b_frames: at most, in a row.
        container: FFmpeg's name.
        pixels: format of the pictures.
        change: after the encoding, from one file to another.
    """

    suffix: str
    codec: str
    options: dict[str, str] = field(default_factory=dict[str, str])
    b_frames: int | None = None
    container: str | None = None
    pixels: str = "yuv420p"
    change: Callable[[Path, Path], None] | None = None


def write(path: Path, kind: Kind, size: tuple[int, int] = (WIDTH, HEIGHT), frames: int = FRAMES) -> None:
    """Write a video of numbered pictures, a key frame every 12."""
    av: Any = importlib.import_module("av")
    target = path.with_name(f"source_{path.name}") if kind.change else path
    with av.open(str(target), "w", format=kind.container) as output:
        stream = output.add_stream(kind.codec, rate=25, options=kind.options)
        stream.width, stream.height = size
        stream.pix_fmt, stream.gop_size, stream.bit_rate = kind.pixels, 12, 800_000
        if kind.b_frames is not None:
            stream.codec_context.max_b_frames = kind.b_frames
        for number in range(frames):
            output.mux(stream.encode(av.VideoFrame.from_ndarray(picture(number, *size), format="rgb24")))
        output.mux(stream.encode())
    if kind.change:
        kind.change(target, path)
        target.unlink()


def copy(source: Path, target: Path, first: int = 0, uneven: bool = False) -> None:
    """Copy the packets of a file. From `first` on in time; players leave out what lies before it (an edit list)."""
    av: Any = importlib.import_module("av")
    with av.open(str(source)) as old, av.open(str(target), "w", options={"avoid_negative_ts": "disabled"}) as new:
        reading = old.streams.video[0]
        writing = new.add_stream_from_template(reading)
        packets = [packet for packet in old.demux(reading) if packet.pts is not None]
        gap = sorted(packet.pts for packet in packets)[1] - min(packet.pts for packet in packets)
        keys = [packet.dts for packet in packets if packet.is_keyframe and packet.pts <= first * gap]
        for packet in packets:
            if packet.dts < keys[-1]:
                continue
            shift = first * gap
            late = gap * 5 * (packet.pts // (30 * gap)) if uneven else 0
            packet.pts, packet.dts = packet.pts - shift + late, packet.dts - shift + late
            packet.stream = writing
            new.mux(packet)


def cut(source: Path, target: Path) -> None:
    """As `ffmpeg -ss` cuts without encoding anew: an mp4 file from frame 40 on, which is no key frame."""
    copy(source, target, first=40)


def hide(source: Path, target: Path) -> None:
    """Every tenth frame of VP8 is decoded and not shown, as alternate reference frames are."""
    av: Any = importlib.import_module("av")
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        writing = new.add_stream_from_template(old.streams.video[0])
        for number, packet in enumerate(p for p in old.demux(old.streams.video[0]) if p.size):
            data = bytearray(bytes(packet))
            if number % 10 == 5:
                data[0] &= ~0x10
            changed = av.Packet(bytes(data))
            changed.pts, changed.dts, changed.time_base = packet.pts, packet.dts, packet.time_base
            changed.is_keyframe, changed.stream = packet.is_keyframe, writing
            new.mux(changed)


def uneven(source: Path, target: Path) -> None:
    """With a pause after every 30 frames."""
    copy(source, target, uneven=True)


def live(source: Path, target: Path) -> None:
    """As a browser writes while it records: no duration in the header."""
    av: Any = importlib.import_module("av")

    class Pipe:
        def __init__(self) -> None:
            self.data = bytearray()

        def write(self, data: bytes) -> int:
            self.data += data
            return len(data)

    pipe = Pipe()
    with av.open(str(source)) as old, av.open(pipe, "w", format="matroska") as new:
        writing = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(old.streams.video[0]):
            if packet.dts is not None or packet.pts is not None:
                packet.stream = writing
                new.mux(packet)
    target.write_bytes(pipe.data)


def with_thumbnails(source: Path, target: Path) -> None:
    """A small track of 25 frames before the film, which is the default track."""
    av: Any = importlib.import_module("av")
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        small = new.add_stream("libx264", rate=25, options={"crf": "18"})
        small.width, small.height, small.pix_fmt = 64, 48, "yuv420p"
        film = new.add_stream_from_template(old.streams.video[0])
        film.disposition = av.stream.Disposition.default
        for number in range(25):
            new.mux(small.encode(av.VideoFrame.from_ndarray(picture(200 + number, 64, 48), format="rgb24")))
        new.mux(small.encode())
        for packet in old.demux(old.streams.video[0]):
            if packet.dts is not None:
                packet.stream = film
                new.mux(packet)


def growing(source: Path, target: Path) -> None:
    """Pictures that get larger in the middle of the stream."""
    larger = source.with_name(f"larger_{source.name}")
    write(larger, Kind(".ts", "libx264", X264, container="mpegts"), (2 * WIDTH, 2 * HEIGHT), FRAMES // 2)
    target.write_bytes(source.read_bytes() + larger.read_bytes())
    larger.unlink()


X264 = {"crf": "18"}
_OPEN = "open-gop=1:keyint=12:min-keyint=12:bframes=3:b-adapt=0:scenecut=0"
_X265 = "log-level=error:keyint=12:min-keyint=12:bframes=3"
KINDS = {
    "H.264, x264's defaults, mp4": Kind(".mp4", "libx264", X264),
    "H.264, x264's defaults, mkv": Kind(".mkv", "libx264", X264),
    "H.264, flv": Kind(".flv", "libx264", X264),
    "H.264, avi": Kind(".avi", "libx264", X264),
    "H.264, MPEG-TS": Kind(".ts", "libx264", X264, container="mpegts"),
    "H.264, open GOP, mp4": Kind(".mp4", "libx264", {**X264, "x264-params": _OPEN}),
    "H.264, intra refresh, mp4": Kind(".mp4", "libx264", {**X264, "x264-params": "intra-refresh=1:keyint=12"}),
    "H.264, cut without encoding, mp4": Kind(".mp4", "libx264", {**X264, "x264-params": "scenecut=0"}, change=cut),
    "H.264, uneven rate, mp4": Kind(".mp4", "libx264", X264, b_frames=0, change=uneven),
    "H.264, no duration, mkv": Kind(".mkv", "libx264", X264, change=live),
    "H.264, thumbnail track first, mp4": Kind(".mp4", "libx264", X264, change=with_thumbnails),
    "H.264, size changes, MPEG-TS": Kind(".ts", "libx264", X264, container="mpegts", change=growing),
    "HEVC, closed GOP, mp4": Kind(".mp4", "libx265", {"x265-params": f"{_X265}:open-gop=0"}),
    "HEVC, open GOP, mp4": Kind(".mp4", "libx265", {"x265-params": f"{_X265}:open-gop=1"}),
    "VP8, webm": Kind(".webm", "libvpx", {"deadline": "realtime"}),
    "VP8, hidden frames, webm": Kind(".webm", "libvpx", {"deadline": "realtime"}, change=hide),
    "VP9, webm": Kind(".webm", "libvpx-vp9", {"cpu-used": "8", "deadline": "realtime"}),
    "AV1, mp4": Kind(".mp4", "libsvtav1", {"preset": "12", "svtav1-params": "lp=1"}),
    "MPEG-4, mp4": Kind(".mp4", "mpeg4"),
    "MPEG-4, B-frames, mp4": Kind(".mp4", "mpeg4", b_frames=2),
    "MPEG-4, avi": Kind(".avi", "mpeg4"),
    "MPEG-4, B-frames, avi": Kind(".avi", "mpeg4", b_frames=2),
    "MPEG-2, B-frames, mp4": Kind(".mp4", "mpeg2video", b_frames=2),
    "MPEG-2, B-frames, mpg": Kind(".mpg", "mpeg2video", b_frames=2, container="vob"),
    "WMV, asf": Kind(".wmv", "wmv2", container="asf"),
    "H.263, 3gp": Kind(".3gp", "h263"),
    "Motion JPEG, avi": Kind(".avi", "mjpeg", pixels="yuvj420p"),
    "GIF": Kind(".gif", "gif", pixels="rgb8"),
}
SIZES = {"H.263, 3gp": (176, 144)}


def make(folder: Path, names: list[str] | None = None) -> Iterator[tuple[str, Path]]:
    """Write a file of each kind; those that cannot be written here are left out."""
    av: Any = importlib.import_module("av")
    for number, name in enumerate(KINDS if names is None else names):
        path = folder / f"{number}{KINDS[name].suffix}"
        try:
            write(path, KINDS[name], SIZES.get(name, (WIDTH, HEIGHT)))
        except (av.codec.codec.UnknownCodecError, av.FFmpegError):
            continue
        yield name, path


def numbers(path: Path) -> list[int]:
    """The numbers of all pictures that a player shows, in order: of the last stream, decoded from its start."""
    av: Any = importlib.import_module("av")
    with av.open(str(path)) as container:
        return [number_of(frame.to_ndarray(format="rgb24")) for frame in container.decode(container.streams.video[-1])]


def wrong_clips(path: Path, right: list[int], clips: int, opened: Callable[[], Any]) -> tuple[int | str, float, str]:
    """Clips of four random frames with a wrong one, the median milliseconds of a clip, and the reader's note."""
    rng = np.random.default_rng(0)
    wrong, times, note = 0, [0.0][:0], ""
    for _ in range(clips):
        wanted = np.sort(rng.choice(len(right), 4, replace=False))
        start = time.perf_counter()
        try:
            with opened() as reader:
                note = reader.note
                got = [number_of(image) for image in reader.frames(wanted)]
        except DecodeError:
            return "does not open", 0.0, ""
        except IndexError:  # decord reads another, shorter stream.
            got = []
        times.append(1e3 * (time.perf_counter() - start))
        wrong += got != [right[number] for number in wanted]
    return wrong, statistics.median(times), note


class _Alone:
    """decord as it is."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Reader:
        if is_transport_stream(self.path):
            raise DecodeError("decord does not return from a seek in MPEG-TS")
        try:
            self.reader = DecordReader(self.path)
        except Exception as error:
            raise DecodeError(str(error)) from error
        return self.reader

    def __exit__(self, *_: object) -> None:
        self.reader.close()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=60)
    parser.add_argument("--folder", type=Path, help="where to write the files; a temporary folder by default")
    options = parser.parse_args()
    print(f"| kind | decord alone, wrong of {options.clips} | clip.decoder=decord | clip.decoder=pyav | why PyAV |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        for name, path in make(options.folder or Path(temporary)):
            right = numbers(path)
            alone, _, _ = wrong_clips(path, right, options.clips, lambda p=path: _Alone(p))
            ours, _, note = wrong_clips(path, right, options.clips, lambda p=path: open_video(p))
            pyav, _, _ = wrong_clips(path, right, options.clips, lambda p=path: open_video(p, "pyav"))
            print(f"| {name} | {alone} | {ours} | {pyav} | {note} |")


if __name__ == "__main__":
    main()
