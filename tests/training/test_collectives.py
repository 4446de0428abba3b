"""What the processes of a run send each other at a step: the dry run of `trainer=ddp` without a GPU."""

import json
import os
import sys
from pathlib import Path

import torch
from warm import run_command

RUN = Path(__file__).with_name("ddp_run.py")


def dry_run(folder: Path, processes: int, batches: int, *options: str) -> list[list[dict[str, int]]]:
    """Collectives by kind, of each batch of each process."""
    folder.mkdir()
    command = [sys.executable, str(RUN), str(folder), str(batches), f"trainer.devices={processes}", *options]
    done = run_command(command, folder, {**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads((folder / f"counts_{rank}.json").read_text()) for rank in range(processes)]


def test_four_processes_reduce_once_a_step(tmp_path: Path) -> None:
    """Loss, accuracy, requests to end and a due checkpoint come with the gradients: logging adds nothing."""
    counts = dry_run(tmp_path / "four", 4, 8, "trainer.log_every_n_steps=3")
    assert all(found == counts[0] for found in counts)
    # The first step sets up what never changes, the third begins with buckets in the order in which gradients came.
    for number in (1, 3, 4, 5, 6):
        assert counts[0][number] == {"all_reduce": 1}, f"batch {number} of {counts[0]}"
    assert counts[0][2]["all_reduce"] == 1
    weights = [torch.load(tmp_path / "four" / f"weights_{rank}.pt", weights_only=True) for rank in range(4)]
    for name, value in weights[0].items():
        assert all(torch.equal(other[name], value) for other in weights), name


def test_accumulated_gradients_are_reduced_at_the_step(tmp_path: Path) -> None:
    """torch's static graph would fail here: it is left out."""
    counts = dry_run(tmp_path / "accumulated", 2, 10, "trainer.accumulate_grad_batches=3")[0]
    # The last step of the epoch has one batch alone.
    assert [found.get("all_reduce", 0) for found in counts[6:]] == [0, 0, 1, 1]
