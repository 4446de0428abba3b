"""The frames that readers give are those that a player shows, whatever the file. The pictures carry their number."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from stts_lightning.data.checking import Task, work
from stts_lightning.data.decode import DECODERS, DecodeError, examine, open_video, transcode, write_mp4
from stts_lightning.data.streams import why_not_decord

ROOT = Path(__file__).parents[2]


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("exact_frames", ROOT / "scripts" / "exact_frames.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["exact_frames"] = module
    spec.loader.exec_module(module)
    return module


coded = load_script()
EXACT_BY_DECORD = {
    "H.264, x264's defaults, mp4", "H.264, x264's defaults, mkv", "H.264, flv", "HEVC, closed GOP, mp4", "VP8, webm", "VP9, webm",
    "MPEG-4, mp4", "H.263, 3gp",
}  # fmt: skip
SHOWN = {
    "H.264, cut without encoding, mp4": range(40, 120),
    "H.264, size changes, MPEG-TS": [*range(120), *range(60)],
    "VP8, hidden frames, webm": [number for number in range(120) if number % 10 != 5],
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return dict(coded.make(tmp_path_factory.mktemp("kinds")))


def read(reader: object, wanted: list[int]) -> list[int]:
    return [coded.number_of(image) for image in reader.frames(np.array(wanted))]  # type: ignore[attr-defined]


@pytest.mark.parametrize("decoder", sorted(DECODERS))
@pytest.mark.parametrize("kind", sorted(coded.KINDS))
def test_frames_are_those_that_a_player_shows(files: dict[str, Path], kind: str, decoder: str) -> None:
    if kind not in files:
        pytest.skip(f"FFmpeg has no encoder for {kind} here")
    right = list(SHOWN.get(kind, range(120)))
    with open_video(files[kind], decoder) as reader:
        assert len(reader) == len(right)
        # Forward, backward, repeated, and on from where the reader stands.
        for wanted in ([0, 5, 10], [20, 30, 40], [39, 40, 41, 42], [2, 79, 3, 79], [len(right) - 1], [66, 67, 13]):
            assert read(reader, wanted) == [right[number] for number in wanted]
        assert bool(reader.note) == (decoder == "decord" and kind not in EXACT_BY_DECORD)
    rng = np.random.default_rng(0)
    for _ in range(8):
        wanted = rng.integers(0, len(right), 4).tolist()
        with open_video(files[kind], decoder) as reader:
            assert read(reader, wanted) == [right[number] for number in wanted]


@pytest.mark.parametrize("kind", sorted(coded.KINDS))
def test_check_finds_what_is_shown_and_encode_keeps_it(files: dict[str, Path], tmp_path: Path, kind: str) -> None:
    if kind not in files:
        pytest.skip(f"FFmpeg has no encoder for {kind} here")
    right = list(SHOWN.get(kind, range(120)))
    contents = examine(files[kind])
    assert contents.frames == len(right)
    transcode(files[kind], tmp_path / "t.mp4", 96)
    with open_video(tmp_path / "t.mp4") as reader:
        assert not reader.note
        assert read(reader, list(range(len(right)))) == right


def test_check_names_the_decoder_and_the_reason(files: dict[str, Path]) -> None:
    kinds = [
        "H.264, x264's defaults, mp4",
        "MPEG-4, B-frames, mp4",
        "H.264, thumbnail track first, mp4",
        "H.264, size changes, MPEG-TS",
    ]
    plain, open_gop, tracks, growing = work([Task(files[kind]) for kind in kinds], 1, 60.0)
    assert (plain.decoder, plain.warning) == ("decord", "")
    assert open_gop.decoder == "pyav"
    assert "open GOP" in open_gop.warning and "decord: gives other frames for [" in open_gop.warning
    assert "video stream 1 of 2 is used (160x96)" in tracks.warning
    assert "the picture size changes (160x96 at frame 0, 320x192 at frame 120)" in growing.warning
    assert (growing.width, growing.height) == (160, 96)


def test_all_frames_have_the_first_size(files: dict[str, Path]) -> None:
    with open_video(files["H.264, size changes, MPEG-TS"]) as reader:
        assert reader.frames(np.array([0, 150])).shape == (2, 96, 160, 3)


def test_a_cover_picture_is_no_video(tmp_path: Path) -> None:
    import av

    write_mp4(tmp_path / "film.mp4", [coded.picture(number) for number in range(12)])
    Image.new("RGB", (320, 320)).save(tmp_path / "cover.jpg")
    with av.open(str(tmp_path / "both.mp4"), "w") as both, av.open(str(tmp_path / "film.mp4")) as film:
        cover = both.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 320, 320, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        stream = both.add_stream_from_template(film.streams.video[0])
        both.mux(cover.encode(av.VideoFrame.from_image(Image.new("RGB", (320, 320)))))
        both.mux(cover.encode())
        for packet in film.demux(film.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                both.mux(packet)
    for decoder in DECODERS:
        with open_video(tmp_path / "both.mp4", decoder) as reader:
            assert read(reader, list(range(len(reader)))) == list(range(12))
    assert examine(tmp_path / "both.mp4").frames == 12


def test_reasons_follow_a_file_that_is_written_again(files: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "x.mp4"
    path.write_bytes(files["H.264, x264's defaults, mp4"].read_bytes())
    assert not why_not_decord(path)
    path.write_bytes(files["H.264, open GOP, mp4"].read_bytes())
    assert "open GOP" in why_not_decord(path)


def pictures(folder: Path, names: list[str], size: tuple[int, int] = (160, 96)) -> Path:
    folder.mkdir(parents=True)
    for number, name in enumerate(names):
        Image.fromarray(coded.picture(number, *size)).save(folder / name, quality=95)
    return folder


def test_a_folder_of_pictures_is_a_video(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "v", [f"img_{number:05d}.jpg" for number in range(1, 13)])
    (folder / "flow_x_00001.jpg").write_bytes(b"")
    (folder / ".DS_Store").write_bytes(b"")
    for decoder in DECODERS:
        with open_video(folder, decoder) as reader:
            assert (len(reader), reader.rate, reader.note) == (12, 0.0, "")
            assert read(reader, [3, 11, 3, 0]) == [3, 11, 3, 0]
            with pytest.raises(DecodeError, match="frame 12 is not there, of 12 pictures"):
                reader.frames(np.array([12]))
    contents = examine(folder)
    assert (contents.frames, contents.width, contents.height, contents.warning) == (12, 160, 96, "")
    transcode(folder, tmp_path / "v.mp4", 96)
    with open_video(tmp_path / "v.mp4") as reader:
        assert read(reader, list(range(12))) == list(range(12))


def test_pictures_are_in_order_of_their_numbers(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "v", [f"{number}.png" for number in range(0, 60, 5)])
    with open_video(folder) as reader:
        assert read(reader, list(range(12))) == list(range(12))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "a folder without numbered pictures"),
        (["img_1.jpg", "img_2.jpg", "frame_1.jpg"], r"several kinds of pictures: frame_\*\.jpg, img_\*\.jpg"),
        (["img_1.jpg", "img_2.jpg", "img_3.jpg", "img_5.jpg"], r"missing, or twice, after img_3\.jpg"),
    ],
)
def test_folders_that_are_no_video_are_refused(tmp_path: Path, names: list[str], message: str) -> None:
    folder = pictures(tmp_path / "v", names)
    with pytest.raises(DecodeError, match=rf"v: cannot be read: .*{message}"), open_video(folder):
        pass


def test_a_broken_picture_is_named(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "v", ["img_1.jpg", "img_2.jpg"])
    (folder / "img_2.jpg").write_bytes(b"no picture")
    with pytest.raises(DecodeError, match=r"img_2\.jpg is no picture"), open_video(folder) as reader:
        reader.frames(np.array([1]))


def test_frames_that_lack_what_they_refer_to_are_not_promised(files: dict[str, Path], tmp_path: Path) -> None:
    """A copy that begins at a key frame within open GOPs: the frames shown before it cannot be decoded."""
    import av

    source = files["H.264, open GOP, mp4"]
    with av.open(str(source)) as old, av.open(str(tmp_path / "cut.mkv"), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        packets = [packet for packet in old.demux(old.streams.video[0]) if packet.pts is not None]
        first = [number for number, packet in enumerate(packets) if packet.is_keyframe][3]
        for packet in packets[first:]:
            packet.stream = stream
            new.mux(packet)
    for decoder in DECODERS:
        with open_video(tmp_path / "cut.mkv", decoder) as reader:
            numbers = read(reader, list(range(len(reader))))
            assert numbers == list(range(numbers[0], 120)) and numbers[0] >= 36
    assert examine(tmp_path / "cut.mkv").frames == len(numbers)
