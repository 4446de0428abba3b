"""A real one-node Slurm, and two nodes as network namespaces: as root, with Debian's packages."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from warm import LONGEST, run_command

from stts_lightning.analysis.results import read_metrics

SCRIPTS = Path(__file__).parents[1] / "scripts"
RUN = [
    "experiment=demo", "pretrained=null", "dataset.train=8", "dataset.val=2", "loader.batch_size=8", "loader.num_workers=1",
    "callbacks.progress=null", "trainer.log_every_n_steps=1", "trainer.max_epochs=4",
]  # fmt: skip
TWO = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.precision=32-true"]
STEPS = 32

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="needs root"),
]


def run(command: list[str], folder: Path, **environment: str) -> str:
    around = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = run_command(command, folder, around)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def wait_for(condition: object, seconds: float, what: str) -> None:
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.5)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cluster")
    run([sys.executable, "-m", "stts_lightning.train", *RUN, "trainer.accelerator=cpu", "hydra.run.dir=runs/whole"], folder)
    return folder


@pytest.fixture(scope="module")
def slurm(place: Path) -> Iterator[dict[str, str]]:
    if not shutil.which("slurmctld") or not shutil.which("munged"):
        pytest.skip("Slurm is not installed: apt-get install slurm-wlm munge")
    script = str(SCRIPTS / "slurm_one_node.sh")
    subprocess.run([script, "start", str(place / "slurm")], check=True, timeout=LONGEST)
    yield {"SLURM_CONF": str(place / "slurm" / "slurm.conf")}
    subprocess.run([script, "stop", str(place / "slurm")], check=True)


def check_is_whole(place: Path, folder: Path) -> None:
    for metric, close in (("train/loss", 5e-4), ("sigma", 1e-6), ("val/top1", 1e-6)):
        expected, found = (read_metrics(run, metric) for run in (place / "runs/whole", folder))
        assert sorted(found) == sorted(expected), metric
        assert found == pytest.approx(expected, rel=close), metric
    one, other = (json.loads((run / "result.json").read_text()) for run in (place / "runs/whole", folder))
    assert other["steps"] == STEPS and other["top1"] == one["top1"]


def test_a_requeued_job_of_two_tasks_goes_on_in_its_folder(place: Path, slurm: dict[str, str]) -> None:
    train = " ".join([sys.executable, "-m", "stts_lightning.train", *RUN, *TWO, "trainer.devices=2"])
    (place / "job.sh").write_text(
        "#!/bin/bash\n#SBATCH --ntasks-per-node=2 --requeue --open-mode=append --output=job.log\n"
        f"export OMP_NUM_THREADS=1\nsrun {train}\n"
    )
    job = run(["sbatch", "--parsable", "job.sh"], place, **slurm).strip()
    log = place / "job.log"
    wait_for(lambda: log.is_file() and "steps " in log.read_text(), 120, "the job trains")
    time.sleep(3)
    run(["scontrol", "requeue", job], place, **slurm)
    wait_for(lambda: " goes on" in log.read_text(), 60, "it saves")
    folders = list((place / "runs").glob(f"slurm_{job}_*"))
    wait_for(lambda: (folders[0] / "result.json").is_file(), 400, "it is started again and ends")
    assert list((place / "runs").glob("slurm_*")) == folders and len(folders) == 1, "one folder, whatever the clock says"
    assert "(resumed after " in log.read_text()
    assert json.loads((folders[0] / "result.json").read_text())["devices"] == "2 x cpu"
    check_is_whole(place, folders[0])


@pytest.mark.parametrize("tasks", [1, 2])
def test_submitit_requeues_a_sweeps_jobs(place: Path, slurm: dict[str, str], tasks: int) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    launcher = ["hydra/launcher=submitit_slurm", f"hydra.launcher.tasks_per_node={tasks}", "hydra.launcher.timeout_min=30",
                "hydra.launcher.max_num_timeout=3", "hydra.launcher.cpus_per_task=1"]  # fmt: skip
    processes = [*TWO, "trainer.devices=2"] if tasks == 2 else ["trainer.accelerator=cpu"]
    sweep_folder = place / "runs" / f"submitted_{tasks}"
    sweep = ["-m", *RUN, *processes, "selection.sigma=0.5,0.1", f"hydra.sweep.dir={sweep_folder}", *launcher]
    command = [sys.executable, "-m", "stts_lightning.train", *sweep]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **slurm}
    process = subprocess.Popen(command, cwd=place, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    folder = sweep_folder / "selection.sigma-0.5"

    def written() -> str:
        """Of one task, submitit's process starts the run and keeps what it says; of two, it is the run."""
        files = [folder / "console.log"] if tasks == 1 else sweep_folder.glob(".submitit/*/*_0_log.out")
        return "".join(file.read_text() for file in files if file.is_file())

    wait_for(lambda: "steps " in written(), 180, "the first job trains")
    time.sleep(3)
    job = run(["squeue", "-h", "-o", "%A", "-t", "RUNNING", "--sort=i"], place, **slurm).split()[0]
    run(["scancel", "--signal=USR2", job], place, **slurm)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    assert "asked to end by SIGUSR2" in written() and "(resumed after " in written()
    check_is_whole(place, folder)
    assert len(list(sweep_folder.glob("*/result.json"))) == 2


def test_two_nodes_are_the_same_run_as_one_process(place: Path) -> None:
    if not shutil.which("ip"):
        pytest.skip("iproute2 is not installed")
    two = ["trainer.num_nodes=2", "trainer.devices=1", "hydra.run.dir=runs/nodes"]
    run([str(SCRIPTS / "two_nodes.sh"), "-m", "stts_lightning.train", *RUN, *TWO, *two], place, PYTHON=sys.executable)
    assert json.loads((place / "runs/nodes/result.json").read_text())["devices"] == "2 x cpu"
    check_is_whole(place, place / "runs/nodes")
