"""Files that a decoder hangs on or dies of cost themselves, not the run."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from stts_lightning.data.annotations import Video, VideoList
from stts_lightning.data.dataset import ClipDataset, ClipSpec, Reading, collate
from stts_lightning.data.decode import DecodeError, open_video
from stts_lightning.data.encode import write_mp4
from stts_lightning.data.isolation import DecoderProcess, decoder_process
from stts_lightning.data.transforms import TrainTransform

SCRIPT = Path(__file__).parents[2] / "scripts" / "fuzz_videos.py"


@pytest.fixture
def video(tmp_path: Path) -> Path:
    write_mp4(tmp_path / "good.mp4", (np.full((48, 64, 3), 8 * i, np.uint8) for i in range(24)))
    return tmp_path / "good.mp4"


@pytest.mark.parametrize("decoder", ["decord", "pyav"])
def test_isolated_decoding_returns_the_same_frames(video: Path, decoder: str) -> None:
    process = DecoderProcess(20)
    for indices in (np.array([0, 5, 5, 23]), np.array([23, 1])):
        with process.open(video, decoder) as far, open_video(video, decoder) as near:
            assert len(far) == len(near) == 24 and far.rate == near.rate
            assert np.array_equal(far.frames(indices), near.frames(indices))
    (video.parent / "bad.mp4").write_text("no video")
    for path, message in ((video.parent / "bad.mp4", "cannot be decoded"), (video.parent / "none.mp4", "no such file")):
        with pytest.raises(DecodeError, match=f"{path.name}: {message}"), process.open(path, decoder):
            pass
    with pytest.raises(DecodeError, match="good.mp4: cannot be decoded"), process.open(video, decoder) as far:
        far.frames(np.array([500]))
    with process.open(video, decoder) as far:
        assert len(far) == 24, "a refusal is no loss"
    assert process.lost == {}
    process.close()


@pytest.mark.parametrize(
    ("send", "message"),
    [(signal.SIGSTOP, "the decoder hangs for more than 1 s"), (signal.SIGSEGV, "the decoder dies by SIGSEGV")],
)
def test_a_lost_process_costs_its_file_alone(video: Path, send: signal.Signals, message: str) -> None:
    process = DecoderProcess(1)
    with pytest.raises(DecodeError, match=f"good.mp4: {message}"), process.open(video, "decord") as reader:
        os.kill(process._process.pid, send)  # type: ignore[union-attr]
        reader.frames(np.array([1]))
    with pytest.raises(DecodeError, match=message), process.open(video, "decord"):
        pass  # It is not tried again.
    other = video.with_name("other.mp4")
    other.write_bytes(video.read_bytes())
    with process.open(other, "decord") as reader:
        assert reader.frames(np.array([3])).shape == (1, 48, 64, 3)
    process.close()


def test_a_training_goes_on_without_the_file(video: Path) -> None:
    other = video.with_name("other.mp4")
    other.write_bytes(video.read_bytes())
    videos = VideoList((Video(video, 0), Video(other, 1)), ("a", "b"))
    dataset = ClipDataset(videos, ClipSpec(8, 1), TrainTransform(32), train=True, reading=Reading(decode_timeout=30))
    dataset[0]
    process = decoder_process(30)
    process.decode_timeout = 1  # It has started.
    os.kill(process._process.pid, signal.SIGSTOP)  # type: ignore[union-attr]
    torch.manual_seed(0)
    item = dataset[0]
    assert int(item.video) == 1 and {Path(f.path).name for f in item.failures} == {"good.mp4"}
    assert collate([item]).failures[0].reason.endswith("hangs for more than 1 s")
    process.close()


def test_the_process_does_not_outlive_its_owner(video: Path) -> None:
    code = (
        "import os, signal; from stts_lightning.data.isolation import DecoderProcess; p = DecoderProcess(20)\n"
        f"with p.open({str(video)!r}, 'decord'): print(p._process.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    child = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout)
    deadline = time.monotonic() + 20
    while _alive(child) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _alive(child)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _fuzz(shared: Path, work: Path, count: int, decoder: str) -> dict[str, int]:
    import json

    command = [sys.executable, SCRIPT, shared / "data" / "clips", "--work", work, "--mutants", str(count), "--decoder", decoder]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def _judge(found: dict[str, int], count: int) -> None:
    assert sum(found.get(name, 0) for name in ("frames", "refused", "hangs", "dies")) == count == found["mutants"]
    assert found["frames"] > count / 20 and found["refused"] > count / 20
    assert found.get("hangs", 0) + found.get("dies", 0) <= count / 50
    assert found["slowest_seconds"] < 25 and found["largest_process_mib"] < 8192


@pytest.mark.reference
@pytest.mark.parametrize("decoder", ["decord", "pyav"])
def test_damaged_files_give_frames_or_one_error(shared: Path, tmp_path: Path, decoder: str) -> None:
    _judge(_fuzz(shared, tmp_path / "work", 150, decoder), 150)


@pytest.mark.slow
@pytest.mark.reference
def test_thousands_of_damaged_files(shared: Path, tmp_path: Path) -> None:
    _judge(_fuzz(shared, tmp_path / "work", 2100, "decord"), 2100)


def test_the_many_workers_of_a_machine_share_nothing(video: Path) -> None:
    found: list[int] = []

    def one(open_it: Callable[[], DecoderProcess]) -> None:
        process = open_it()
        with process.open(video, "decord") as reader:
            found.append(int(reader.frames(np.array([20])).mean()))
        process.close()

    threads = [threading.Thread(target=one, args=(lambda: DecoderProcess(30),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and len(set(found)) == 1
