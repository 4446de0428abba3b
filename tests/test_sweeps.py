"""Sweeps: real commands, each job a process of its own."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from warm import run_command

from stts_lightning.overrides import for_run, for_sweep, in_run_folder
from stts_lightning.run_folders import folder_name

FAST = [
    "experiment=demo", "pretrained=null", "dataset.train=2", "dataset.val=1", "loader.batch_size=8", "loader.num_workers=0",
    "callbacks.progress=null", "trainer.accelerator=cpu",
]  # fmt: skip


def sweep(tmp: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "stts_lightning.train", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return run_command(command, tmp, environment)


def test_the_folder_follows_from_the_command() -> None:
    one = for_sweep(["-m", "a=1", "b=1,2"])
    assert one[0] == "-m" and one[-2:] == ["a=1", "b=1,2"]
    assert one[1].startswith("hydra.sweep.dir=${paths.runs}/sweep_")
    assert one[2] == "hydra.job.config.override_dirname.exclude_keys=[a]"
    assert for_sweep(["b=1,2", "a=1", "--multirun", "hydra.launcher.n_jobs=2", "hydra/launcher=joblib"])[1] == one[1]
    assert for_sweep(["-m", "a=1", "b=1,2,3"])[1] != one[1]
    assert for_sweep(["--config-dir", "d", "-m", "b=1,2"])[-1] == "b=1,2"
    for arguments in (["a=1"], ["hparams_search=ratios", "hydra.mode=RUN"]):
        assert for_sweep(arguments) == arguments
    given = for_sweep(["-m", "a=1,2", "b=1", "hydra.sweep.dir=x"])
    assert given == [
        "-m",
        "hydra.job.config.override_dirname.exclude_keys=[b,hydra.sweep.dir]",
        "a=1,2",
        "b=1",
        "hydra.sweep.dir=x",
    ]
    assert for_sweep(["hparams_search=ratios"])[0] == "-m"


def test_overrides_of_a_run_are_rewritten(tmp_path: Path) -> None:
    run = str(tmp_path)
    assert in_run_folder([f"resume={run}", "--config-dir", "d"])[-2:] == ["--config-dir", "d"]
    # Another question has a folder of its own; another device, or other views of the same logits, asks the same.
    asked = for_run([f"run={run}", "which=best", "++clip.test_views=2", "views=[0]", "trainer.devices=2"], "x", by_question=True)
    assert asked[0] == f"hydra.run.dir='{run}/x_clip.test_views=2,which=best'"
    assert for_run([f"run={run}", "views=[0]", "trainer=ddp"], "x", by_question=True)[0] == f"hydra.run.dir='{run}/x'"
    assert for_run([f"run={run}", "selection.sigma=1"], "x") == [f"hydra.run.dir='{run}/x'", f"run={run}", "++selection.sigma=1"]


def test_job_folders_are_named_after_what_is_swept() -> None:
    assert folder_name("selection.sigma=0.1,experiment=paper/x y") == "selection.sigma=0.1,experiment=paper_x_y"
    long = folder_name("a" * 300), folder_name("a" * 301)
    assert max(map(len, long)) < 140 and long[0] != long[1]


def test_a_failing_job_is_named_the_rest_goes_on_and_nothing_is_repeated(tmp_path: Path) -> None:
    command = ["-m", *FAST, "debug=fast", "selection=t0_0.5,t9_0.5,t0_0.4"]
    done = sweep(tmp_path, *command)
    assert done.returncode == 1, done.stdout + done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    results = {file.parent.name: json.loads(file.read_text()) for file in folder.glob("*/result.json")}
    assert sorted(r["slots"]["t0"] for r in results.values()) == ["3 of 8 frames", "4 of 8 frames"]
    failed = [line for line in done.stdout.splitlines() if "failed: " in line]
    assert any("selection-t9_0.5" in line and "selection.slots.t9: no block 9" in line for line in failed), done.stdout
    assert "report.html" in done.stdout and "1 did not end well" in (folder / "report.html").read_text()
    before = {file: file.stat().st_mtime_ns for file in folder.glob("*/result.json")}
    again = sweep(tmp_path, *command)
    assert again.returncode == 1 and again.stdout.count("has its result already") == 2
    assert {file: file.stat().st_mtime_ns for file in folder.glob("*/result.json")} == before
    # A job's name holds what is swept alone, so a folder given by hand may hold another job of that name.
    other = sweep(tmp_path, *command, f"hydra.sweep.dir={folder}", "seed=1")
    assert other.returncode != 0 and "holds a job of other overrides" in other.stderr


def test_a_killed_sweep_takes_its_job_along_and_goes_on(tmp_path: Path) -> None:
    command = ["-m", *FAST, "trainer.max_epochs=4", "selection.sigma=0.05,0.1"]
    arguments = [sys.executable, "-m", "stts_lightning.train", *command]
    process = subprocess.Popen(arguments, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not (found := list(tmp_path.glob("runs/*/*/checkpoints/last.ckpt"))) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    folder = found[0].parents[1]

    def running() -> str:
        return subprocess.run(["pgrep", "-f", f"stts_lightning.train.*{folder}"], capture_output=True, text=True).stdout

    # It ends its step first.
    deadline = time.monotonic() + 60
    while running() and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not running(), "the job ended with its sweep"
    assert not (folder / "result.json").is_file()
    done = sweep(tmp_path, *command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"({folder.name}): goes on" in done.stdout
    results = [json.loads(file.read_text()) for file in folder.parent.glob("*/result.json")]
    assert sorted((r["sigma"], r["steps"]) for r in results) == [(0.05, 8), (0.1, 8)]
    assert (folder.parent / "report.html").is_file()


def test_several_jobs_at_a_time(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    jobs = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    # Selections that no file holds.
    done = sweep(tmp_path, "-m", *FAST, "debug=fast", "selection=t0_0.75,t1_0.4_s2_0.5", *jobs)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    results = {file.parent.name: json.loads(file.read_text()) for file in folder.glob("*/result.json")}
    assert {name: result["selection"] for name, result in results.items()} == {
        "selection-t0_0.75": "t0_0.75",
        "selection-t1_0.4_s2_0.5": "t1_0.4_s2_0.5",
    }
    assert (folder / "report.html").is_file()


@pytest.mark.slow
def test_a_search_keeps_both_objectives(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    command = [
        "hparams_search=ratios",
        *FAST,
        "debug=fast",
        "hydra.sweeper.n_trials=3",
        "hydra.sweeper.sampler.population_size=2",
    ]
    done = sweep(tmp_path, *command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Number of Pareto solutions" in done.stdout
    again = sweep(tmp_path, *command)
    assert again.stdout.count("has its result already") == 3, "the seeded search proposes the same trials"
