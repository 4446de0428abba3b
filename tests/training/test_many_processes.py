"""Real processes, gloo between them: the same run for any number of them, and nobody left waiting."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from warm import run_command

from stts_lightning.analysis.results import read_metrics
from stts_lightning.data.annotations import read_folder
from stts_lightning.data.demo import DemoSpec, make_demo

FAST = [
    "experiment=demo", "pretrained=null", "dataset.train=3", "dataset.val=2", "loader.batch_size=8", "loader.num_workers=1",
    "callbacks.progress=null", "trainer.accelerator=cpu", "trainer.log_every_n_steps=1", "trainer.max_epochs=1",
    "selection=t0_0.6_s4_0.9", "augment.mixup=0.8", "augment.cutmix=1.0",
]  # fmt: skip
TWO = ["trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu", "trainer.precision=32-true"]


def train(folder: Path, *arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return command(folder, *FAST, *arguments, environment=environment)


def command(folder: Path, *arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "stts_lightning.train", *arguments]
    around = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "160", **(environment or {})}
    return run_command(line, folder, around)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.mark.parametrize("sigma", ["0.5", pytest.param("0", marks=pytest.mark.slow)])
def test_two_processes_are_the_same_run_as_one(place: Path, sigma: str) -> None:
    runs = []
    for name, trainer in (("one", []), ("two", TWO)):
        done = train(place, *trainer, f"selection.sigma={sigma}", f"hydra.run.dir=runs/{name}_{sigma}")
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.count("train.csv: videos: 24, ") == 1, "the first process alone speaks"
        runs.append(place / "runs" / f"{name}_{sigma}")
    one, two = (read_metrics(run, "train/loss") for run in runs)
    assert len(one) == 3
    assert two == pytest.approx(one, rel=1e-4)
    assert read_metrics(runs[1], "val/top1") == read_metrics(runs[0], "val/top1")
    results = [json.loads((run / "result.json").read_text()) for run in runs]
    assert results[0]["devices"] == "1 x cpu" and results[1]["devices"] == "2 x cpu"
    for key in ("top1", "top5", "mean_class_accuracy", "last/val/top1"):
        assert results[0][key] == results[1][key], key


@pytest.mark.slow
def test_a_batch_that_cannot_be_shared_evenly_is_refused(place: Path) -> None:
    done = train(place, *TWO, "loader.batch_size=7", "augment.mixup=0", "augment.cutmix=0")
    assert done.returncode == 2
    assert "error: loader.batch_size=7: is for all devices and must be a multiple of their number, 2" in done.stderr


@pytest.mark.slow
def test_a_rotten_file_at_one_process_is_replaced_in_training_and_ends_all_in_a_test(place: Path) -> None:
    done = train(place, "hydra.run.dir=runs/any", "debug=fast")  # Makes the videos.
    for split in ("train", "val"):
        for file in (place / "data" / "demo_when" / split).rglob("*.mp4"):
            target = place / "own" / split / file.parent.name / file.name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    own = ["dataset=folder", "dataset.root=own", *TWO]
    (place / "own" / "train" / "left" / "zz_rotten.mp4").write_text("rotten")
    left = [a for a in FAST if not a.startswith(("dataset.", "experiment"))]
    base = ["backbone=mvit_tiny", "backbone.size=48", "recipe=finetune", *left]

    done = command(place, *base, *own, "hydra.run.dir=runs/rotten", "loader.batch_size=8", "trainer.max_epochs=2")
    assert done.returncode == 0, done.stdout + done.stderr
    # Now the videos of a test: the second process meets the file (item 1 of the list is its first).
    (place / "own" / "val" / "down" / "0000a.mp4").write_text("rotten")
    done = command(place, *base, *own, "hydra.run.dir=runs/ended", "loader.batch_size=8")
    assert done.returncode != 0
    assert "0000a.mp4: cannot be decoded" in done.stderr, done.stderr
    assert not subprocess.run(["pgrep", "-f", f"{place}.*runs/ended"], capture_output=True, text=True).stdout


def test_files_that_do_not_decode_at_the_second_process_are_counted_and_named(tmp_path: Path) -> None:
    make_demo(tmp_path / "own", DemoSpec(train=3, val=2))
    train_files, val_files = (read_folder(tmp_path / "own" / split).videos for split in ("train", "val"))
    first_batch = np.random.default_rng((0, 0)).permutation(len(train_files))[:8]
    rotten = [train_files[int(first_batch[4])].path, val_files[1].path]  # Of both the second process has the second share.
    for file in rotten:
        file.write_text("rotten")
    own = ["backbone=mvit_tiny", "backbone.size=48", "recipe=finetune", "dataset=folder", "dataset.root=own"]
    left = [argument for argument in FAST if not argument.startswith(("dataset.", "experiment"))]
    more = ["clip.on_error=skip", "clip.test_views=1", "clip.test_crops=1", "callbacks.panels=null", "hydra.run.dir=runs/rotten"]
    done = command(tmp_path, *left, *own, *TWO, *more)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "runs/rotten/result.json").read_text())
    found = {Path(file).name: count for file, count in result["undecodable_files"].items()}
    assert found == {rotten[0].name: 1, rotten[1].name: 2}, "in training; in validation and test"
    for text in (done.stdout, (tmp_path / "runs/rotten/train.log").read_text()):
        assert text.count("cannot decode") == 2
        assert all(file.name in text for file in rotten)


SPOILING = """
import math
import lightning.pytorch as pl

class Spoils(pl.Callback):
    def __init__(self, where):
        self.where = where

    def spoil(self, trainer, module, where):
        if trainer.global_rank == 1 and self.where == where:
            run = module.run
            def spoilt(*args, **options):
                found = run(*args, **options)
                return (found[0] * math.nan, found[1]) if isinstance(found, tuple) else found * math.nan
            module.run = spoilt

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 2:
            self.spoil(trainer, pl_module, "train")

    def on_validation_start(self, trainer, pl_module):
        self.spoil(trainer, pl_module, "val")

    def on_test_start(self, trainer, pl_module):
        self.spoil(trainer, pl_module, "test")
"""


@pytest.mark.parametrize(
    ("where", "told", "videos"),
    [
        ("train", "error: training loss is nan at step 2, of the videos ", 4),
        ("val", "error: logits are NaN or infinite, of the videos ", 8),
        pytest.param("test", "error: logits are NaN or infinite, of the videos ", 8, marks=pytest.mark.slow),
    ],
    ids=["train", "val", "test"],
)
def test_what_is_no_number_at_the_second_process_ends_all_with_one_error(
    place: Path, tmp_path: Path, where: str, told: str, videos: int
) -> None:
    (tmp_path / "spoiling.py").write_text(SPOILING)
    spoils = ["+callbacks.spoils._target_=spoiling.Spoils", f"+callbacks.spoils.where={where}", "callbacks.panels=null"]
    path = {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    done = train(place, *TWO, *spoils, f"hydra.run.dir=runs/spoilt_{where}", environment=path)
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = (line for line in done.stderr.splitlines() if "rror" in line)
    assert line.startswith(told) and line.count(".mp4") == videos, line
    assert not (place / f"runs/spoilt_{where}/result.json").exists()
    assert not subprocess.run(["pgrep", "-f", f"runs/spoilt_{where}"], capture_output=True, text=True).stdout


FAILING = """
import lightning.pytorch as pl

class Fails(pl.Callback):
    def __init__(self, rank, at):
        self.rank, self.at = rank, at

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_rank == self.rank and trainer.global_step == self.at:
            raise RuntimeError(f"process {self.rank} fails")
"""


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_failing_process_neither_hangs_nor_harms_the_next_job(place: Path, tmp_path: Path, rank: int) -> None:
    (tmp_path / "failing.py").write_text(FAILING)
    folder = f"runs/failing_{rank}"
    fails = ["+callbacks.fails._target_=failing.Fails", f"+callbacks.fails.rank={rank}", "+callbacks.fails.at=1,100"]
    sweep = ["-m", *TWO, *fails, f"hydra.sweep.dir={folder}", "test=false"]
    done = train(place, *sweep, environment={"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"})
    assert done.returncode == 1, done.stdout + done.stderr
    (result,) = (place / folder).glob("*/result.json")
    assert "at-100" in result.parent.name, "the job after the failing one has its result"
    (console,) = (file for file in (place / folder).glob("*/console.log") if "at-1_" in f"{file.parent.name}_")
    assert f"process {rank} fails" in console.read_text()
    assert "failed: " in done.stdout and "at-1" in done.stdout
    assert not subprocess.run(["pgrep", "-f", f"{folder}/"], capture_output=True, text=True).stdout, "nothing is left behind"


def test_jobs_of_one_and_of_two_processes_take_turns(place: Path) -> None:
    folder = "runs/mixed"
    done = train(place, "-m", "trainer.strategy=ddp", "trainer.devices=2,1", f"hydra.sweep.dir={folder}", "test=false")
    assert done.returncode == 0, done.stdout + done.stderr
    jobs = {file.parent.name: json.loads(file.read_text()) for file in (place / folder).glob("*/result.json")}
    assert sorted(result["devices"] for result in jobs.values()) == ["1 x cpu", "2 x cpu"]
    curves = [read_metrics(place / folder / name, "train/loss") for name in jobs]
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
        ["hydra/launcher=submitit_local", "hydra.launcher.tasks_per_node=1", "hydra.launcher.timeout_min=10"],
    ],
    ids=["joblib", "submitit_local"],
)
def test_jobs_of_two_processes_under_other_launchers(place: Path, launcher: list[str]) -> None:
    pytest.importorskip(f"hydra_plugins.hydra_{launcher[0].rpartition('=')[2].partition('_')[0]}_launcher")
    folder = f"runs/{launcher[0].rpartition('=')[2]}"
    done = train(place, "-m", *TWO, *launcher, "selection.sigma=0.05,0.1", f"hydra.sweep.dir={folder}", "test=false")
    assert done.returncode == 0, done.stdout + done.stderr
    results = [json.loads(file.read_text()) for file in (place / folder).glob("*/result.json")]
    assert sorted((r["sigma"], r["devices"]) for r in results) == [(0.05, "2 x cpu"), (0.1, "2 x cpu")]
    assert len(list((place / folder).glob("*/job.json"))) == 2, "each job once, in its own folder"
    assert not subprocess.run(["pgrep", "-f", f"{folder}/"], capture_output=True, text=True).stdout, "nothing is left behind"
