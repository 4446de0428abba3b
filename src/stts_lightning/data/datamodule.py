"""The LightningDataModule: sources of videos in, loaders of clips out."""

import csv
import hashlib
import io
import multiprocessing
import os
import signal
import sys
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from torch.utils.data import DataLoader, DistributedSampler

from stts_lightning.data.annotations import AnnotationError, VideoList, check_files, held_out, read_folder, read_list
from stts_lightning.data.dataset import Batch, ClipDataset, ClipSpec, Reading, collate, list_hash
from stts_lightning.data.demo import DemoSpec, make_demo
from stts_lightning.data.isolation import ASKING, can_isolate
from stts_lightning.data.labels import read_class_names
from stts_lightning.data.manifest import manifest_hash, read_manifest, with_manifest
from stts_lightning.data.resumable_sampler import EpochOrder, LoaderError, TrainLoader
from stts_lightning.data.transforms import EvalTransform, TrainTransform
from stts_lightning.files import fingerprint, write_text


class Source(ABC):
    """Where videos come from. A new kind of data set is a subclass, named by `_target_` in a dataset option."""

    name: str
    manifest: str | None = None
    """What `prepare_data` found out about the files: those that do not decode are left out, and counted."""
    truth = False
    """Whether a file beside each video says where the action is; see `truth`."""
    has_test = False
    """Whether there are videos of "test": they are tested instead of those of "val", by which the best weights are chosen."""

    def prepare(self) -> None:  # noqa: B027 (most sources have nothing to prepare)
        """Make or fetch what is needed, once a machine, before `videos` is called."""

    @abstractmethod
    def videos(self, split: str) -> VideoList:
        """Videos of "train", "val" or, where there are some, "test"."""


class SplitSource(Source):
    """A source that may hold out a share of its training videos, where it has none for validation.

    Args:
        val_fraction: the share, of each class; None where there are validation videos.
        split_seed: which videos.
    """

    def __init__(self, val_fraction: float | None, split_seed: int) -> None:
        self.val_fraction, self.split_seed = val_fraction, split_seed

    @abstractmethod
    def listed(self, split: str) -> VideoList:
        """Videos of a split that there is."""

    def videos(self, split: str) -> VideoList:
        """See `Source.videos`."""
        if self.val_fraction is None or split == "test":
            return self.listed(split)
        train, val = held_out(self.listed("train"), self.val_fraction, self.split_seed, f"data set {self.name}")
        return train if split == "train" else val


class FolderSource(SplitSource):
    """Class folders: `root/train/<class>/*.mp4`, `root/val/<class>/*.mp4` and, if it is there, `root/test/<class>/*.mp4`.

    Raises:
        AnnotationError: if there is a folder `val`, and a share of `train` is to be held out.
    """

    def __init__(
        self,
        root: str,
        name: str = "folder",
        manifest: str | None = None,
        truth: bool = False,
        val_fraction: float | None = None,
        split_seed: int = 0,
    ) -> None:
        super().__init__(val_fraction, split_seed)
        self.root, self.name, self.manifest, self.truth = Path(root), name, manifest, truth
        self.has_test = (self.root / "test").is_dir()
        if val_fraction is not None and (self.root / "val").is_dir():
            raise AnnotationError(f"dataset.val_fraction={val_fraction}: there is a folder {self.root / 'val'}; give one of them")

    def listed(self, split: str) -> VideoList:
        """Videos of `root/<split>`; classes are train's."""
        train = read_folder(self.root / "train")
        if split == "train":
            return train
        if split == "val" and not (self.root / "val").is_dir():
            hint = f"dataset.val_fraction=0.2 holds out a fifth of {self.root / 'train'}"
            raise AnnotationError(f"data folder {self.root / 'val'}: does not exist; {hint}")
        return read_folder(self.root / split, train.classes)


class ListSource(SplitSource):
    """List files: `path label` text, csv, Kinetics or Something-Something JSON.

    Args:
        train: list of the training videos; None where there is only a test.
        val: list of the validation videos; None with `val_fraction`.
        root: folder that paths in the lists start from; None is each list's own folder.
        classes: file with a class name a line, or JSON; None: see `read_list`.
        name: how results call the data set.
        check: look for every listed file at start-up; a manifest has done that.
        manifest, truth: see `Source`.
        val_fraction, split_seed: see `SplitSource`.
        test: list of videos that are tested instead of those of `val`.

    Raises:
        AnnotationError: unless one of `val` and `val_fraction` is given.
    """

    def __init__(
        self,
        train: str | None,
        val: str | None,
        root: str | None = None,
        classes: str | None = None,
        name: str = "list",
        check: bool = True,
        manifest: str | None = None,
        truth: bool = False,
        val_fraction: float | None = None,
        split_seed: int = 0,
        test: str | None = None,
    ) -> None:
        super().__init__(val_fraction, split_seed)
        if (val is None) == (val_fraction is None):
            raise AnnotationError(
                "dataset.val: give a list; or null, and dataset.val_fraction=0.2 to hold out a fifth of dataset.train"
            )
        self.files, self.truth, self.has_test = {"train": train, "val": val, "test": test}, truth, test is not None
        self.root, self.classes, self.name, self.check = root, classes, name, check and not manifest
        self.manifest = manifest

    def listed(self, split: str) -> VideoList:
        """Videos of the split's list."""
        file = self.files[split]
        if file is None:
            raise AnnotationError(f"dataset.{split}: must be given, as in dataset.{split}=FILE")
        names = read_class_names(Path(self.classes)) if self.classes else None
        if names is None and split != "train" and self.files["train"] is not None:
            names = self.listed("train").classes
        videos = read_list(file, self.root, names)
        if self.check:
            check_files(videos, f"list file {file}")
        return videos


class DemoSource(Source):
    """Videos generated from a seed; see `demo`."""

    truth = True

    def __init__(self, root: str, **spec: Any) -> None:
        self.root, self.spec = Path(root), DemoSpec(**spec)
        self.name = f"demo_{self.spec.setting}"

    def prepare(self) -> None:
        """Generate the files unless they are there."""
        make_demo(self.root, self.spec)

    def videos(self, split: str) -> VideoList:
        """Videos of the split."""
        return read_list(self.root / f"{split}.csv")


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


def _end_workers() -> None:
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


class VideoDataModule(pl.LightningDataModule):
    """Clips of a source, for training, validation (one centre view) and test (V views).

    Args:
        source: where the videos come from.
        clip_size: frames, height and width of the model's clips.
        stride: source frames from one frame of a clip to the next.
        test_views: clips of each test video.
        test_crops: crops of each of those, 1 or 3.
        sampling: which frames make a clip; see `SAMPLINGS`.
        loader: batches and workers.
        train_transform: arguments of `TrainTransform` besides the size.
        short_side: of the evaluation's resize; None is 256/224 of the crop.
        test_short_side: the same for the test; None is `short_side`.
        decoder: see `Reading`.
        on_error: see `Reading`.
        decode_timeout: see `Reading`.
        seed: the order of the training videos, and all that is random about their clips, follow from it.
    """

    def __init__(
        self,
        source: Source,
        clip_size: Sequence[int],
        stride: int,
        test_views: int,
        loader: LoaderOptions,
        train_transform: dict[str, Any] | None = None,
        short_side: int | str | None = None,
        test_short_side: int | str | None = None,
        test_crops: int = 1,
        sampling: str = "spread",
        decoder: str = "decord",
        on_error: str = "raise",
        decode_timeout: float | None = 60.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        frames, *size = clip_size
        self.source, self.loader, self.seed = source, loader, seed
        self.test_views = test_views * test_crops
        """Views of each test video: every crop of every clip."""
        self._clip = ClipSpec(frames, stride, 1, sampling)
        self._test_clip = replace(self._clip, views=test_views)
        self._reading = Reading(decoder, on_error, decode_timeout)
        if decode_timeout is not None:
            can_isolate()  # Said in the main process, before there are workers.
        self._train_transform = TrainTransform(size, **(train_transform or {}))
        self.copies = self._train_transform.copies
        """Clips of each video of a training batch."""
        self._val_transform = EvalTransform(size, short_side)
        self._test_transform = EvalTransform(size, short_side if test_short_side is None else test_short_side, test_crops)
        self.splits: dict[str, VideoList] = {}
        self._known: dict[str, Any] = {}
        self._train_loader: TrainLoader | None = None
        self.tested_before: Collection[int] = ()
        """Numbers of videos that the test leaves out: an ended test has their logits."""
        self._resumed: dict[str, Any] = {}

    def prepare_data(self) -> None:
        """Make what the source needs, on one process."""
        self.source.prepare()

    def setup(self, stage: str | None = None) -> None:
        """Read the lists; a test needs only the one of its videos."""
        tested = "test" if self.source.has_test else "val"
        for split in (tested,) if stage == "test" else dict.fromkeys(("train", "val", tested)):
            if split not in self.splits:
                self.splits[split] = self._decodable(split, self.source.videos(split))

    def _decodable(self, split: str, listed: VideoList) -> VideoList:
        if not self.source.manifest:
            return listed
        manifest = read_manifest(self.source.manifest)
        videos = with_manifest(listed, manifest, f"manifest {self.source.manifest}")
        self._known |= {f"{split}_undecodable": len(listed) - len(videos), "manifest_hash": manifest_hash(manifest.values())}
        return videos

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, by label."""
        return self.tested.classes

    @property
    def tested(self) -> VideoList:
        """The videos of the test: of a split of its own, or else those of the validation."""
        return self.splits["test" if self.source.has_test else "val"]

    @property
    def test_hash(self) -> str:
        """What tells the list of the test from another."""
        return list_hash(self.tested)

    def summary(self) -> dict[str, Any]:
        """Facts of the data for tables and results."""
        return {
            "name": self.source.name,
            "tested": "test" if self.source.has_test else "val",
            "classes": len(self.classes),
            **{f"{split}_videos": len(videos) for split, videos in self.splits.items()},
            **{f"{split}_hash": list_hash(videos) for split, videos in self.splits.items()},
            **self._known,
        }

    def per_device(self, batch_size: int, key: str = "batch_size") -> int:
        """Share of a device in a global batch. Raises LoaderError if the devices cannot share it evenly."""
        devices = self.trainer.world_size if self.trainer else 1
        if batch_size % devices:
            raise LoaderError(f"loader.{key}={batch_size}: is for all devices and must be a multiple of their number, {devices}")
        return batch_size // devices

    def _workers(self) -> dict[str, Any]:
        """What all loaders have in common."""
        workers = self.loader.workers(self.trainer)
        device = None if self.trainer is None else self.trainer.strategy.root_device.type
        on_cpu = device == "cpu"
        Finalize(None, _end_workers, exitpriority=100)
        return {
            "num_workers": workers,
            "prefetch_factor": self.loader.prefetch_factor if workers > 0 else None,
            "pin_memory": device == "cuda",  # Lightning copies pinned tensors without waiting.
            "collate_fn": collate,
            "worker_init_fn": partial(begin_worker, niceness=10 if on_cpu else 0),
            "persistent_workers": workers > 0,
            "timeout": self.loader.timeout if workers > 0 else 0,
        }

    def _check_shared(self, videos: VideoList) -> None:
        devices = self.trainer.world_size if self.trainer else 1
        if len(videos) < devices:
            split = next(name for name, there in self.splits.items() if there is videos)
            raise LoaderError(
                f"data set {self.source.name}: {len(videos)} videos of {split} cannot be shared by {devices} devices"
            )

    def test_question(self) -> str:
        """What a test's logits follow from, besides the model: the files, the clips and how they are cut and read."""
        files = hashlib.sha256()
        for video in self.tested.videos:
            files.update(os.fsencode(f"{fingerprint(video.path)} {video.label}\n"))
        return f"{files.hexdigest()} {self._test_clip} {vars(self._test_transform)} {self._reading}"

    def _eval_loader(
        self, videos: VideoList, clip: ClipSpec, transform: EvalTransform, without: Collection[int] = ()
    ) -> DataLoader[Batch]:
        options = self.loader
        boxes = transform.with_boxes if self.source.truth else None
        dataset = ClipDataset(videos, clip, transform, train=False, reading=self._reading, boxes=boxes)
        self._check_shared(videos)
        key = "batch_size" if options.eval_batch_size is None else "eval_batch_size"
        size = self.per_device(options.eval_batch_size or options.batch_size, key)
        return DataLoader(dataset, batch_size=size, sampler=UnpaddedDistributedSampler(dataset, without), **self._workers())

    def _left_out(self) -> Collection[int]:
        """Videos that were tested before, but for a few where the rest would leave a process without any."""
        devices = self.trainer.world_size if self.trainer else 1
        short = devices - (len(self.tested) - len(self.tested_before))
        return set(sorted(self.tested_before)[max(short, 0) :])

    def train_dataloader(self) -> TrainLoader:
        """Random clips of the training videos."""
        transform = self._train_transform
        boxes = transform.with_boxes if self.source.truth else None
        dataset = ClipDataset(self.splits["train"], self._clip, transform, train=True, reading=self._reading, boxes=boxes)
        self._check_shared(self.splits["train"])
        self.per_device(self.loader.batch_size)
        labels = self.splits["train"].labels if self.loader.balanced else None
        order = EpochOrder(len(dataset), self.loader.batch_size, self.seed, labels)
        self._train_loader = TrainLoader(dataset, order, **self._workers())
        if self._resumed:
            self._train_loader.load_state_dict(self._resumed)
        return self._train_loader

    def state_dict(self) -> dict[str, Any]:
        """Where the training stands in its epoch, and which lists it is about."""
        return {**self._train_loader.state_dict(), "lists": self._hashes()} if self._train_loader else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let the training's loader go on from there. Lightning would tell the loader itself too late."""
        self._resumed = {key: value for key, value in state_dict.items() if key != "lists"}

    def check_lists(self, state_dict: dict[str, Any]) -> None:
        """Compare the lists with those of a checkpoint; one of an earlier version says nothing of them.

        Raises:
            LoaderError: if a list is not the one that the run began with.
        """
        now = self._hashes()
        for split, value in state_dict.get("lists", {}).items():
            if now.get(split) != value:
                raise LoaderError(
                    f"resume: the {split} list was {value}, and is {now.get(split)} (hashes of names and labels); "
                    "a resumed run keeps its lists"
                )

    def _hashes(self) -> dict[str, str]:
        return {split: list_hash(videos) for split, videos in self.splits.items()}

    def val_dataloader(self) -> DataLoader[Batch]:
        """The centre clip of each validation video."""
        return self._eval_loader(self.splits["val"], self._clip, self._val_transform)

    def test_dataloader(self) -> DataLoader[Batch]:
        """V clips of each test video."""
        return self._eval_loader(self.tested, self._test_clip, self._test_transform, self._left_out())

    def write_split(self, folder: Path) -> None:
        """Write down what `val_fraction` held out: the lists `train.csv` and `val.csv`, with the names of their classes."""
        if not isinstance(self.source, SplitSource) or self.source.val_fraction is None:
            return
        for split in ("train", "val"):
            videos = self.splits[split]
            rows = ((os.path.abspath(video.path), videos.classes[video.label]) for video in videos.videos)
            text = io.StringIO()
            csv.writer(text, lineterminator="\n").writerows([("path", "label"), *rows])
            write_text(folder / f"{split}.csv", text.getvalue())
