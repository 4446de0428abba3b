"""The processes that decode: how many, how they begin and end, and which videos each process of a test has."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from torch.utils.data import DistributedSampler

from stts_lightning.data.dataset import ClipDataset
from stts_lightning.data.isolation import ASKING
from stts_lightning.data.resumable_sampler import LoaderError


@dataclass(frozen=True)
class LoaderOptions:
    """Batches and workers.

    Attributes:
        batch_size: videos a step over all devices together; each gives one clip, or `copies` of one.
        num_workers: decoding processes a device, or "auto"; see `workers`.
        eval_batch_size: videos a step in evaluation over all devices; None is `batch_size`.
        timeout: seconds after which a worker that delivers nothing is an error (0: never).
        balanced: training draws all classes equally often; see `EpochOrder`.
        prefetch_factor: batches that each worker makes ahead.
    """

    batch_size: int
    num_workers: int | str = "auto"
    eval_batch_size: int | None = None
    timeout: float = 300.0
    balanced: bool = False
    prefetch_factor: int = 2

    def __post_init__(self) -> None:
        if isinstance(self.num_workers, str) and self.num_workers != "auto":
            raise LoaderError(f"loader.num_workers={self.num_workers}: must be a number, or auto")
        for name, least in (("batch_size", 1), ("eval_batch_size", 1), ("num_workers", 0), ("prefetch_factor", 1)):
            value = getattr(self, name)
            if isinstance(value, int) and value < least:
                raise LoaderError(f"loader.{name}={value}: must be {least} or more")

    def workers(self, trainer: pl.Trainer | None) -> int:
        """Decoding processes of this process: as many as asked for, or what its cores are good for.

        "auto" is, beside a GPU, a worker for each core of this process but the one that drives the GPU, up to `MOST_WORKERS`.
        Where the model runs on the same cores, more than `WORKERS_BESIDE_A_CPU` only slow it down.
        """
        if isinstance(self.num_workers, int):
            return self.num_workers
        if trainer is None or trainer.strategy.root_device.type == "cpu":
            return WORKERS_BESIDE_A_CPU
        return min(max(own_cores(trainer) - 1, 1), MOST_WORKERS)


MOST_WORKERS = 16
"""Each holds batches in shared memory: 16 x 2 batches of 32 clips of 16 frames at 224 pixels are 2.5 GB."""
WORKERS_BESIDE_A_CPU = 2


def own_cores(trainer: pl.Trainer) -> int:
    """Cores that a process of a training may use: those of its affinity or container, shared with the others of its machine.

    A task of Slurm that is bound to cores of its own shares them with nobody.
    """
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    environment = getattr(trainer.strategy, "cluster_environment", None)
    on_node = int(os.environ.get("SLURM_CPUS_ON_NODE", bound))
    if isinstance(environment, SLURMEnvironment) and bound < on_node:
        return bound
    return max(min(bound, cpu_quota()) // max(trainer.num_devices, 1), 1)


def cpu_quota(file: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Cores that a container may keep busy, which its affinity does not tell."""
    with suppress(OSError, ValueError):
        quota, period = file.read_text().split()
        if quota != "max":
            return max(int(quota) // int(period), 1)
    return sys.maxsize


def begin_worker(worker: int, niceness: int = 0) -> None:
    """What a decoding process does first.

    It lives on when a scheduler asks its whole group to end: the trainer wants its step's batch first. And it gives way to a
    model that runs on the same cores: a thread that a worker holds up holds up all threads of a product.
    """
    for number in ASKING:
        signal.signal(number, signal.SIG_IGN)
    if niceness and hasattr(os, "nice"):
        os.nice(niceness)


def end_workers() -> None:
    """Before multiprocessing asks those that are left at the end to go, and waits: they do not listen."""
    if hasattr(signal, "SIGCHLD"):  # Not on Windows.
        with suppress(ValueError):  # torch's handler would take their end for a failure.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


class UnpaddedDistributedSampler(DistributedSampler[int]):
    """Every item exactly once over all processes; nothing is repeated.

    Args:
        dataset: of the items.
        without: numbers of items that are left out.
    """

    def __init__(self, dataset: ClipDataset, without: Collection[int] = ()) -> None:
        self.items = [item for item in range(len(dataset)) if item not in without]
        together = dist.is_available() and dist.is_initialized()
        super().__init__(
            dataset,
            num_replicas=dist.get_world_size() if together else 1,
            rank=dist.get_rank() if together else 0,
            shuffle=False,
        )

    def __iter__(self) -> Iterator[int]:
        """Numbers of this process's items."""
        return iter(self.items[self.rank :: self.num_replicas])

    def __len__(self) -> int:
        """How many those are."""
        return len(self.items[self.rank :: self.num_replicas])
