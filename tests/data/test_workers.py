"""How many workers there are, and that batches are pinned as what they are."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from torch.utils.data._utils.pin_memory import pin_memory

from stts_lightning.data import workers
from stts_lightning.data.dataset import Batch, Failure
from stts_lightning.data.resumable_sampler import LoaderError
from stts_lightning.data.workers import LoaderOptions, cpu_quota


def trainer(device: str = "cuda", processes: int = 1, environment: Any = None) -> Any:
    return SimpleNamespace(
        strategy=SimpleNamespace(root_device=torch.device(device), cluster_environment=environment), num_devices=processes
    )


@pytest.fixture(autouse=True)
def cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(24)), raising=False)
    monkeypatch.setattr(workers, "cpu_quota", lambda: 1000)
    monkeypatch.delenv("SLURM_CPUS_ON_NODE", raising=False)


@pytest.mark.parametrize(("processes", "workers"), [(1, 16), (2, 11), (8, 2), (24, 1), (50, 1)])
def test_auto_shares_the_cores_among_the_processes_of_a_machine(processes: int, workers: int) -> None:
    options = LoaderOptions(8)
    assert options.workers(trainer(processes=processes)) == workers
    assert options.workers(trainer("cpu", processes)) == 2
    assert LoaderOptions(8, 5).workers(trainer(processes=processes)) == 5


def test_a_bound_task_of_slurm_shares_its_cores_with_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "96")
    environment = object.__new__(SLURMEnvironment)
    assert LoaderOptions(8).workers(trainer(processes=4, environment=environment)) == 16
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "24")  # Not bound.
    assert LoaderOptions(8).workers(trainer(processes=4, environment=environment)) == 5


def test_a_container_may_have_fewer_cores_than_its_affinity_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for text, quota in (("400000 100000\n", 4), ("50000 100000\n", 1)):
        (tmp_path / "cpu.max").write_text(text)
        assert cpu_quota(tmp_path / "cpu.max") == quota
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert cpu_quota(tmp_path / "cpu.max") > 1000 and cpu_quota(tmp_path / "none") > 1000
    monkeypatch.setattr(workers, "cpu_quota", lambda: 4)
    assert LoaderOptions(8).workers(trainer()) == 3


@pytest.mark.parametrize("values", [{"num_workers": "many"}, {"num_workers": -1}, {"prefetch_factor": 0}])
def test_options_that_cannot_be_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(LoaderError, match=f"loader.{next(iter(values))}="):
        LoaderOptions(8, **values)


def test_a_batch_is_pinned_as_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[int] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self.numel()) or self)
    number = torch.zeros(2, dtype=torch.int64)
    batch = Batch(torch.zeros(2, 1, 3), number, number, number.bool(), (Failure("a", "b"),), (3, 4))
    again = pin_memory(batch)
    assert isinstance(again, Batch) and again.draws == (3, 4) and again.failures == batch.failures
    assert sorted(pinned) == [2, 2, 2, 6]
