"""What prepare_data finds out, and what the loader makes of it: on real files, in real processes."""

import csv
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from stts_lightning.data import checking
from stts_lightning.data.annotations import AnnotationError
from stts_lightning.data.checking import Task, work
from stts_lightning.data.datamodule import VideoDataModule
from stts_lightning.data.decode import examine, open_video
from stts_lightning.data.encode import Encoding, write_mp4
from stts_lightning.data.manifest import Entry, manifest_hash, read_manifest, write_manifest
from stts_lightning.data.sources import FolderSource
from stts_lightning.data.workers import LoaderOptions


def moving(path: Path, frames: int, width: int = 96, height: int = 64) -> Path:
    shades = np.linspace(0, 250, frames).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_mp4(path, (np.full((height, width, 3), shade, np.uint8) for shade in shades))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split in ("train", "val"):
        for name in ("a", "b"):
            moving(tmp_path / split / name / "x.mp4", 20)
    (tmp_path / "val" / "b" / "y.mp4").write_bytes(b"no video at all")
    return tmp_path


# Both run in the worker's process, in the place of what it does there.
def _hang(task: Task) -> Any:
    yield from _real(task)
    time.sleep(100)


def _die(task: Task) -> Any:
    if "dies" in task.path.name:
        os.kill(os.getpid(), signal.SIGKILL)
    yield from _real(task)


def _late(connection: Any) -> None:
    time.sleep(2)
    _serve(connection)


_real, _serve = checking._findings, checking._serve


def replaced(monkeypatch: pytest.MonkeyPatch, findings: Any) -> None:
    fork, one_at_a_time = multiprocessing.get_context("fork"), threading.Lock()

    class Process(fork.Process):  # type: ignore[name-defined]
        def start(self) -> None:
            with one_at_a_time:  # A guard of filelock refuses forks of two threads at a time.
                super().start()

    monkeypatch.setattr(checking, "PROCESSES", SimpleNamespace(Pipe=fork.Pipe, Process=Process))
    monkeypatch.setattr(checking, "_findings", findings)


def test_a_decoder_that_hangs_is_killed_and_what_it_found_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replaced(monkeypatch, _hang)
    files = [moving(tmp_path / f"{n}.mp4", 8) for n in range(3)]
    start = time.monotonic()
    entries = work([Task(file) for file in files], 2, 1.0)
    assert time.monotonic() - start < 30
    assert [Path(entry.path).name for entry in entries] == ["0.mp4", "1.mp4", "2.mp4"]
    assert all(entry.status == "ok" and entry.frames == 8 and "hangs for more than 1 s" in entry.warning for entry in entries)


def test_a_process_that_starts_late_is_no_file_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replaced(monkeypatch, _real)
    monkeypatch.setattr(checking, "_serve", _late)
    (entry,) = work([Task(moving(tmp_path / "0.mp4", 8))], 1, 1.0)
    assert (entry.status, entry.frames, entry.warning) == ("ok", 8, "")


def test_a_decoder_that_dies_is_named_and_the_rest_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replaced(monkeypatch, _die)
    files = [moving(tmp_path / name, 8) for name in ("1.mp4", "dies.mp4", "2.mp4")]
    entries = work([Task(file) for file in files], 1, 20.0)
    assert [entry.status for entry in entries] == ["ok", "crashes", "ok"]
    assert "exit status -9" in entries[1].warning


def test_manifest_comes_back_and_tells_states_apart(tmp_path: Path) -> None:
    inside, outside = tmp_path / "data" / "v,1.mp4", Path("/elsewhere/w.mp4")
    entries = [Entry(str(inside), "ok", 10, 12, 64, 48, 29.97, "h264", "decord"), Entry(str(outside), "broken", warning='a "b"')]
    write_manifest(tmp_path / "data" / "m.csv", entries)
    back = read_manifest(tmp_path / "data" / "m.csv")
    assert list(back) == [inside, outside]
    assert back[inside].path == "v,1.mp4" and back[inside].frames == 10 and back[outside].warning == 'a "b"'
    assert manifest_hash(entries) == manifest_hash(back.values())
    assert manifest_hash(entries) != manifest_hash(entries[:1])
    (tmp_path / "x.csv").write_text("path,label\na,1\n")
    with pytest.raises(AnnotationError, match="its columns are"):
        read_manifest(tmp_path / "x.csv")


def test_the_loader_leaves_out_what_does_not_decode_and_says_so(folder: Path) -> None:
    entries = work([Task(path) for path in sorted(folder.rglob("*.mp4"))], 2, 30.0)
    assert [entry.status for entry in entries] == ["ok"] * 4 + ["broken"]
    # As if a container promised more than decodes.
    entries = [Entry(**{**vars(e), "frames": 10}) if e.path.endswith("train/a/x.mp4") else e for e in entries]
    write_manifest(folder / "manifest.csv", entries)
    source = FolderSource(str(folder), manifest=str(folder / "manifest.csv"))
    data = VideoDataModule(source, (16, 32, 32), 1, 1, LoaderOptions(1, 0), short_side=32)
    data.setup()
    assert data.summary()["val_undecodable"] == 1 and data.summary()["train_undecodable"] == 0
    assert data.summary()["manifest_hash"] == manifest_hash(entries)
    dataset: Any = data.val_dataloader().dataset
    assert len(dataset) == 2
    train: Any = data.train_dataloader().dataset
    clip = train[0].clip[0, 0].float().mean((1, 2))  # Brightness of each frame.
    assert torch.equal(clip[10:], clip[9].expand(6)), "no frame past the tenth is asked for"
    moving(folder / "val" / "a" / "new.mp4", 8)
    again = VideoDataModule(source, (16, 32, 32), 1, 1, LoaderOptions(1, 0), short_side=32)
    with pytest.raises(AnnotationError, match="new.mp4 is not in it; run prepare_data task=check again"):
        again.setup()


@pytest.mark.reference
def test_manifest_of_real_files(shared: Path) -> None:
    files = sorted(path for path in (shared / "data" / "clips").iterdir() if path.suffix != ".md")
    entries = {Path(e.path).name: e for e in work([Task(file) for file in files], 2, 60.0)}
    assert {name for name, e in entries.items() if e.status != "ok"} == {
        "derived_audio_only.mp4", "derived_empty.mp4", "derived_lfs_pointer.mp4", "derived_truncated60pct.mp4",
        "mp4parse_encrypted_cenc.mp4",
    }  # fmt: skip
    assert entries["decord_corrupted.mp4"].frames == 49 and entries["decord_corrupted.mp4"].decoder == "pyav"
    assert entries["derived_truncated_faststart.mp4"].frames == 139
    assert (entries["decord_rot90.mov"].width, entries["decord_rot90.mov"].height) == (320, 568)


@pytest.mark.reference
@pytest.mark.parametrize("name", ["ssv2_sample_vp9.webm", "decord_rot90.mov", "mp4parser_MOV00006.3gp", "decord_corrupted.mp4"])
def test_encoding_keeps_every_frame_upright(shared: Path, tmp_path: Path, name: str) -> None:
    source, target = shared / "data" / "clips" / name, tmp_path / "t" / "x.mp4"
    task = Task(source, target, Encoding(96, 12, 16))
    (entry,) = work([task], 1, 60.0)
    before, after = examine(source), examine(target)
    assert entry.status == "ok" and entry.path == str(target) and entry.decoder == "decord"
    assert after.frames == before.frames and min(after.width, after.height) == 96
    assert after.width / after.height == pytest.approx(before.width / before.height, rel=0.02)
    assert after.rate == pytest.approx(before.rate, rel=1e-2)
    # Of a damaged file the encoding leaves the frame out that does not decode.
    at = np.array([0, before.frames // 2, before.frames - 1] if before.frames == before.promised else [0])
    with open_video(source, "pyav") as reader:
        old = torch.from_numpy(reader.frames(at)).permute(0, 3, 1, 2).float()
    with open_video(target) as reader:
        new = torch.from_numpy(reader.frames(at)).permute(0, 3, 1, 2).float()
    small = torch.nn.functional.interpolate(old, new.shape[-2:], mode="area")
    # One frame further, or turned, differs by 10 levels and more.
    assert (small - new).abs().mean((1, 2, 3)).max() < 5
    modified = target.stat().st_mtime_ns
    work([task], 1, 60.0)
    assert target.stat().st_mtime_ns == modified, "what is there is not written again"


def test_lists_of_an_encoding_can_be_trained_on(folder: Path) -> None:
    from stts_lightning.data.annotations import read_folder, read_list
    from stts_lightning.prepare_data import targets, write_list

    videos = read_folder(folder / "val")
    goals = targets(videos, folder / "out" / "val")
    entries = work([Task(v.path, goal, Encoding(32, 4, 20)) for v, goal in zip(videos.videos, goals, strict=True)], 2, 60.0)
    write_list(folder / "out" / "val.csv", videos, entries)
    with (folder / "out" / "val.csv").open(newline="") as file:
        assert len(list(csv.reader(file))) == 3
    back = read_list(folder / "out" / "val.csv")
    assert [video.label for video in back.videos] == [0, 1] and back.classes == ("a", "b")
    assert all(video.path.is_file() for video in back.videos)


@pytest.mark.reference
def test_an_encoding_that_is_run_again_keeps_its_warnings(shared: Path, tmp_path: Path) -> None:
    from stts_lightning.prepare_data import with_earlier_warnings

    task = Task(shared / "data" / "clips" / "decord_corrupted.mp4", tmp_path / "x.mp4", Encoding(96, 12, 16))
    (first,) = work([task], 1, 60.0)
    assert "49 frames decode, 50 promised" in first.warning
    write_manifest(tmp_path / "manifest.csv", [first])
    again = work([task], 1, 60.0)
    assert not again[0].warning
    assert with_earlier_warnings(again, tmp_path / "manifest.csv")[0].warning == first.warning
    os.utime(tmp_path / "x.mp4", ns=(2**62, 2**62))  # Written anew.
    assert not with_earlier_warnings(again, tmp_path / "manifest.csv")[0].warning


def test_targets_follow_the_sources_path(tmp_path: Path) -> None:
    from stts_lightning.data.annotations import Video, VideoList, Videos
    from stts_lightning.prepare_data import targets

    def names(*paths: str) -> list[str]:
        videos = VideoList(Videos(Video(tmp_path / path, 0) for path in paths), ("a",))
        return [str(path.relative_to(tmp_path / "out")) for path in targets(videos, tmp_path / "out")]

    assert names("x/v.avi", "y/v.avi", "z/v_1.avi", "y/v.mp4") == ["x/v.avi.mp4", "y/v.avi.mp4", "z/v_1.avi.mp4", "y/v.mp4"]
    assert names("x/v.mp4", "x/v.mp4") == ["v.mp4", "v.mp4"]
    with pytest.raises(AnnotationError, match="would both be written to"):
        names("x/v.avi", "x/v.avi.mp4")
