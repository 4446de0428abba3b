"""Runs that are killed, asked to end, or cannot write: what is lost, and what is said."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from warm import LONGEST

from stts_lightning.analysis.results import read_metrics
from stts_lightning.run_folders import EXIT_REQUEUE
from stts_lightning.training.preemption import LastCheckpoint, SaveError, WholeCheckpointIO
from stts_lightning.training.step_figures import Known

RUN = [
    "experiment=demo", "pretrained=null", "dataset.train=4", "dataset.val=2", "loader.batch_size=8", "loader.num_workers=1",
    "trainer.accelerator=cpu", "trainer.log_every_n_steps=1", "trainer.max_epochs=3",
    "selection=t0_0.6_s4_0.9", "augment.mixup=0.8", "callbacks.last.every_n_steps=1",
    "backbone.drop_path=0.1", "backbone.dropout=0.1",
]  # fmt: skip
STEPS = 12
ASKED = """
import os
import signal
import lightning.pytorch as pl

class Asks(pl.Callback):
    def on_before_backward(self, trainer, pl_module, loss):
        if trainer.global_rank == 1 and trainer.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
"""


def start(folder: Path, name: str, *more: str, environment: dict[str, str] | None = None) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "stts_lightning.train", *RUN, *more, f"hydra.run.dir=runs/{name}"]
    around = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "160", **(environment or {})}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=folder, env=around, start_new_session=True, **pipes)  # type: ignore[call-overload]


def finish(process: "subprocess.Popen[str]") -> str:
    output, _ = process.communicate(timeout=LONGEST)
    assert process.returncode == 0, output
    return output


def wait_for(file: Path, process: "subprocess.Popen[str]", count: int = 1) -> None:
    """Until a file was written so often."""
    deadline, seen = time.monotonic() + 120, set()
    while len(seen) < count and time.monotonic() < deadline and process.poll() is None:
        if file.is_file():
            seen.add(file.stat().st_mtime_ns)
        time.sleep(0.02)
    assert len(seen) == count, f"{file} was written {len(seen)} times"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("broken")
    finish(start(folder, "whole"))
    return folder


def check_is_whole(place: Path, name: str) -> None:
    """The run is the one that was never broken off: every step once, with the same loss, sigma, rate and result."""
    whole, broken = place / "runs" / "whole", place / "runs" / name
    for metric, close in (("train/loss", 2e-4), ("sigma", 1e-6), ("lr-AdamW/selectors/decay", 1e-6), ("val/top1", 1e-6)):
        expected, found = read_metrics(whole, metric), read_metrics(broken, metric)
        assert sorted(found) == sorted(expected), metric
        assert found == pytest.approx(expected, rel=close), metric
    one, other = (json.loads((run / "result.json").read_text()) for run in (whole, broken))
    assert other["steps"] == STEPS
    for key in ("top1", "top5", "last/val/top1"):
        assert other[key] == one[key]
    weights, again = (torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"] for run in (whole, broken))
    for key, value in weights.items():
        torch.testing.assert_close(again[key], value, rtol=1e-2, atol=1e-4)


def test_run_killed_within_an_epoch_resumes_identically(place: Path) -> None:
    process = start(place, "killed")
    wait_for(place / "runs/killed/checkpoints/last.ckpt", process, 3)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    output = finish(start(place, "killed"))
    assert "runs/killed holds this run, unfinished: it resumes" in output and "(resumed after" in output
    check_is_whole(place, "killed")
    assert "(resumed after" not in finish(start(place, "killed", "trainer.max_epochs=1", "test=false")), (
        "another command begins anew"
    )


@pytest.mark.slow
def test_run_killed_twenty_times_resumes_identically(place: Path) -> None:
    """At any moment: while it starts, reads, trains, writes, validates or tests."""
    rng = random.Random(0)
    file, kills, steps = place / "runs/twenty/checkpoints/last.ckpt", 0, []
    for number in range(20):
        # Every other kill waits for a step first, so that the run gets on; the rest fall anywhere, the start included.
        process = start(place, "twenty")
        if number % 2:
            before = file.stat().st_mtime_ns if file.is_file() else 0
            while process.poll() is None and (file.stat().st_mtime_ns if file.is_file() else 0) == before:
                time.sleep(0.02)
        time.sleep(rng.uniform(0, 1.5 if number % 2 else 8))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            kills += 1
        process.communicate()
        if file.is_file():
            steps.append(torch.load(file, weights_only=True)["global_step"])
        if (place / "runs/twenty/result.json").is_file():
            (place / "runs/twenty/result.json").unlink()  # It ended before all kills were spent: the test once more.
    assert steps == sorted(steps), "no kill ever cost a step that was in a checkpoint"
    finish(start(place, "twenty"))
    check_is_whole(place, "twenty")
    print(f"{kills} kills, at steps {steps}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)])
def test_asked_to_end_it_saves_and_says_that_it_goes_on(place: Path, number: signal.Signals) -> None:
    name = f"asked_{number.name}"
    # No checkpoint but the one that is asked for; the request reaches the whole group, as a scheduler's does.
    process = start(place, name, "callbacks.last.every_n_steps=null")
    assert process.stdout is not None
    for line in process.stdout:
        if "steps " in line:
            break
    time.sleep(1)
    os.killpg(process.pid, number)
    output, _ = process.communicate(timeout=LONGEST)
    assert process.returncode == (130 if number == signal.SIGINT else 75), output
    assert f"asked to end by {number.name}" in output and f"resume={place}/runs/{name} goes on" in output
    finish(start(place, name, "callbacks.last.every_n_steps=null"))
    check_is_whole(place, name)


def test_two_processes_end_together_when_the_second_is_asked_and_go_on(place: Path, tmp_path: Path) -> None:
    (tmp_path / "asking.py").write_text(ASKED)
    two = ["trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu", "trainer.precision=32-true", "test=false"]
    asks = ["+callbacks.asks._target_=asking.Asks", "callbacks.last.every_n_steps=null", "callbacks.panels=null"]
    environment = {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    process = start(place, "two", *two, *asks, environment=environment)
    output, _ = process.communicate(timeout=LONGEST)
    assert process.returncode == EXIT_REQUEUE, output
    assert "asked to end by another process" in output
    content = torch.load(place / "runs/two/checkpoints/last.ckpt", weights_only=True)
    assert content["global_step"] == 3, "asked within the second step, told with the third"
    output = finish(start(place, "two", *two, *asks, environment=environment))
    assert "(resumed after" in output
    assert json.loads((place / "runs/two/result.json").read_text())["steps"] == STEPS


def test_a_checkpoint_that_is_due_is_written_once(tmp_path: Path) -> None:
    last, trainer = LastCheckpoint(str(tmp_path)), SimpleNamespace(world_size=2)
    told = [Known(step, due=step < 3) for step in range(5)]
    last.saved_step = 3  # At the end of the third step, on the word of the second: the third had said the same.
    assert [last._told(trainer, SimpleNamespace(look=lambda known=known: known))[1] for known in told] == [False] * 5  # type: ignore[arg-type]
    last.saved_step = 2
    assert last._told(trainer, SimpleNamespace(look=lambda: told[2])) == (False, True)  # type: ignore[arg-type]


def test_a_loss_that_is_no_number_stops_before_the_weights_and_names_the_files(place: Path) -> None:
    process = start(place, "nan", "recipe=finetune", "optim.lr=1e30", "trainer.gradient_clip_val=null", "loader.num_workers=0")
    output, _ = process.communicate(timeout=LONGEST)
    assert process.returncode == 2
    last = output.strip().splitlines()[-1]
    assert last.startswith("error: training loss is ") and last.count(".mp4") == 8, last
    content = torch.load(place / "runs/nan/checkpoints/last.ckpt", weights_only=True)
    assert f"at step {content['global_step']}" in last, "the last checkpoint is the one before"


def test_resuming_from_a_file_that_is_not_whole_is_one_clear_error(place: Path) -> None:
    process = start(place, "cut")
    wait_for(place / "runs/cut/checkpoints/last.ckpt", process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    file = place / "runs/cut/checkpoints/last.ckpt"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    process = start(place, "cut")
    output, _ = process.communicate(timeout=LONGEST)
    assert process.returncode == 2
    assert "error: checkpoint " in output.strip().splitlines()[-1] and "last.ckpt: cannot be read" in output


class Model(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 4)


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    file, io = tmp_path / "last.ckpt", WholeCheckpointIO()
    io.save_checkpoint({"weights": torch.zeros(10)}, file)
    before = file.read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
    try:
        with pytest.raises(SaveError, match=r"last.ckpt: cannot be written \(File too large\); the one before it is whole"):
            io.save_checkpoint({"weights": torch.zeros(1_000_000)}, file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert file.read_bytes() == before and sorted(f.name for f in tmp_path.iterdir()) == ["last.ckpt"]
    (tmp_path / "no_folder").write_text("")
    with pytest.raises(SaveError, match="cannot be written"):
        io.save_checkpoint({}, tmp_path / "no_folder" / "last.ckpt")


@pytest.mark.parametrize("values", [{"every_minutes": 0}, {"every_n_steps": -1}])
def test_impossible_intervals_are_refused(values: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=rf"callbacks.last.{next(iter(values))}="):
        LastCheckpoint("x", **values)
