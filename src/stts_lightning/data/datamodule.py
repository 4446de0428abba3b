"""The LightningDataModule: sources of videos in, loaders of clips out."""

import csv
import hashlib
import io
import math
import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch.utils.data import DataLoader

from stts_lightning.data.annotations import VideoList
from stts_lightning.data.dataset import Batch, ClipDataset, ClipSpec, Reading, collate, list_hash
from stts_lightning.data.isolation import can_isolate
from stts_lightning.data.manifest import manifest_hash, read_manifest, with_manifest
from stts_lightning.data.resumable_sampler import EpochOrder, LoaderError, TrainLoader

# Runs of earlier versions stored the sources under this module's name.
from stts_lightning.data.sources import DemoSource as DemoSource
from stts_lightning.data.sources import FolderSource as FolderSource
from stts_lightning.data.sources import ListSource as ListSource
from stts_lightning.data.sources import Source, SplitSource
from stts_lightning.data.transforms import EvalTransform, TrainTransform
from stts_lightning.data.workers import LoaderOptions, UnpaddedDistributedSampler, begin_worker, end_workers
from stts_lightning.files import fingerprint, write_text


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
        Finalize(None, end_workers, exitpriority=100)
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
        self._train_loader = self._first_epoch()
        if self._resumed:
            self._train_loader.load_state_dict(self._resumed)
        return self._train_loader

    def first_batches(self, clips: int) -> Iterator[Batch]:
        """Batches that a training begins with, until all processes have this many clips; it is not moved on by them."""
        return islice(self._first_epoch(), math.ceil(clips / self.loader.batch_size))

    def _first_epoch(self) -> TrainLoader:
        transform = self._train_transform
        boxes = transform.with_boxes if self.source.truth else None
        dataset = ClipDataset(self.splits["train"], self._clip, transform, train=True, reading=self._reading, boxes=boxes)
        self._check_shared(self.splits["train"])
        self.per_device(self.loader.batch_size)
        labels = self.splits["train"].labels if self.loader.balanced else None
        order = EpochOrder(len(dataset), self.loader.batch_size, self.seed, labels)
        return TrainLoader(dataset, order, **self._workers())

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
