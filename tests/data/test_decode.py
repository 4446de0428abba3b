from pathlib import Path

import numpy as np
import pytest

from stts_lightning.data.decode import DECODERS, DecodeError, open_video
from stts_lightning.data.encode import write_mp4

GOOD = {  # file: frames that decode
    "ucf101_v_SoccerJuggling_g23_c01.avi": 240,
    "k400_SOX5yA1l24A_audio.mp4": 332,
    "ssv2_sample_vp9.webm": 47,
    "torchcodec_h265_10bits.mp4": 30,
    "torchcodec_odd_wh_mpeg2.mp4": 10,
    "torchcodec_non_zero_start.mp4": 12,
    "decord_rot90.mov": 3,
    "mp4parser_MOV00006.3gp": 222,
    "derived_vfr.mp4": 62,
    "imageio_realshort.mp4": 36,
    "basketball_tiny_portrait_56x98_7frames.mp4": 7,
    "derived_1frame.mp4": 1,
    "derived_bitflips.avi": 240,
}
BROKEN = [
    "decord_corrupted.mp4",
    "derived_truncated_faststart.mp4",
    "derived_truncated60pct.mp4",
    "derived_audio_only.mp4",
    "derived_empty.mp4",
    "derived_lfs_pointer.mp4",
    "mp4parse_encrypted_cenc.mp4",
]


@pytest.fixture
def clips(shared: Path) -> Path:
    return shared / "data" / "clips"


@pytest.mark.reference
@pytest.mark.parametrize("name", sorted(GOOD))
def test_both_decoders_agree_on_real_files(clips: Path, name: str) -> None:
    wanted = np.linspace(0, GOOD[name] - 1, 16).round().astype(np.int64)
    frames = {}
    for decoder in DECODERS:
        with open_video(clips / name, decoder) as reader:
            assert len(reader) == GOOD[name]
            frames[decoder] = reader.frames(wanted)
    first, second = frames.values()
    assert first.shape == second.shape
    assert first.dtype == np.uint8
    if name != "derived_bitflips.avi":  # Two libraries conceal damage differently.
        difference = np.abs(first.astype(int) - second.astype(int)).mean(axis=(1, 2, 3))
        # 10 bits and MPEG-2's ranges are converted by different routines; a wrong frame differs by 10 levels and more.
        assert difference.max() < 6, difference


@pytest.mark.reference
@pytest.mark.parametrize("decoder", sorted(DECODERS))
@pytest.mark.parametrize("name", [name for name in BROKEN if name != "decord_corrupted.mp4"])
def test_broken_files_give_one_error_that_names_them(clips: Path, name: str, decoder: str) -> None:
    with pytest.raises(DecodeError) as caught, open_video(clips / name, decoder) as reader:
        reader.frames(np.arange(0, len(reader), max(len(reader) // 16, 1)))
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.reference
def test_a_packet_that_does_not_decode_costs_its_frame_alone(clips: Path) -> None:
    with pytest.raises(DecodeError), open_video(clips / "decord_corrupted.mp4", "decord") as reader:
        reader.frames(np.arange(len(reader)))
    with open_video(clips / "decord_corrupted.mp4", "pyav") as reader:
        frames = reader.frames(np.arange(50))
    held = [number for number in range(1, 50) if np.array_equal(frames[number], frames[number - 1])]
    assert len(held) == 1, "the damaged frame is the one before it"
    # The others are the same, in whatever order they are asked for.
    for number in (49, held[0], held[0] + 1, 3):
        with open_video(clips / "decord_corrupted.mp4", "pyav") as reader:
            assert np.array_equal(reader.frames(np.array([number]))[0], frames[number])


def test_missing_file_and_unknown_decoder(tmp_path: Path) -> None:
    with pytest.raises(DecodeError, match="no.mp4: no such file"), open_video(tmp_path / "no.mp4"):
        pass
    with pytest.raises(ValueError, match="decoder='x': allowed are decord, pyav"), open_video(tmp_path / "no.mp4", "x"):
        pass


def test_transport_streams_are_read_by_the_decoder_that_returns(tmp_path: Path) -> None:
    """decord spins for ever on `get_batch([0, 299])` of an MPEG-TS file."""
    av = pytest.importorskip("av")
    write_mp4(tmp_path / "a.mp4", (np.full((48, 64, 3), i % 250, np.uint8) for i in range(300)))
    with av.open(str(tmp_path / "a.mp4")) as source, av.open(str(tmp_path / "a.ts"), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    with open_video(tmp_path / "a.ts") as reader:
        assert reader.frames(np.array([0, 299])).mean(axis=(1, 2, 3)) == pytest.approx([0, 49], abs=4)


@pytest.mark.parametrize("decoder", sorted(DECODERS))
def test_decoders_return_the_frames_that_were_encoded(tmp_path: Path, decoder: str) -> None:
    path = tmp_path / "a.mp4"
    write_mp4(path, (np.full((48, 64, 3), 10 * i, np.uint8) for i in range(20)))
    with open_video(path, decoder) as reader:
        assert len(reader) == 20
        frames = reader.frames(np.array([19, 0, 7, 7]))
    assert np.abs(frames.mean(axis=(1, 2, 3)) - [190, 0, 70, 70]).max() < 4
    assert list(tmp_path.iterdir()) == [path]
