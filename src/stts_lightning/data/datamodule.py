"""The LightningDataModule: sources of videos in, loaders of clips out."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch.utils.data import DataLoader

from stts_lightning.data.annotations import VideoList, check_files, read_folder, read_list
from stts_lightning.data.dataset import Batch, ClipDataset, ClipSpec, Reading, collate, list_hash
from stts_lightning.data.demo import DemoSpec, make_demo
from stts_lightning.data.transforms import EvalTransform, TrainTransform


class Source(ABC):
    """Where videos come from. A new kind of data set is a subclass, named by `_target_` in a dataset option."""

    name: str

    def prepare(self) -> None:  # noqa: B027 (most sources have nothing to prepare)
        """Make or fetch what is needed, once a machine, before `videos` is called."""

    @abstractmethod
    def videos(self, split: str) -> VideoList:
        """Videos of "train" or "val"."""


class FolderSource(Source):
    """Class folders: `root/train/<class>/*.mp4` and `root/val/<class>/*.mp4`."""

    def __init__(self, root: str, name: str = "folder") -> None:
        self.root, self.name = Path(root), name

    def videos(self, split: str) -> VideoList:
        """Videos of `root/<split>`; classes are train's."""
        train = read_folder(self.root / "train")
        return train if split == "train" else read_folder(self.root / split, train.classes)


class ListSource(Source):
    """List files: `path label` text, csv, Kinetics or Something-Something JSON.

    Args:
        train: list of the training videos.
        val: list of the validation videos.
        root: folder that paths in the lists start from; None is each list's own folder.
        classes: file with a class name a line; None: see `read_list`.
        name: how results call the data set.
        check: look for every listed file at start-up.
    """

    def __init__(
        self, train: str, val: str, root: str | None = None, classes: str | None = None, name: str = "list", check: bool = True
    ) -> None:
        self.files = {"train": train, "val": val}
        self.root, self.classes, self.name, self.check = root, classes, name, check

    def videos(self, split: str) -> VideoList:
        """Videos of the split's list."""
        names = Path(self.classes).read_text(encoding="utf-8").splitlines() if self.classes else None
        if names is None and split != "train":
            names = self.videos("train").classes
        videos = read_list(self.files[split], self.root, names)
        if self.check:
            check_files(videos, f"list file {self.files[split]}")
        return videos


class DemoSource(Source):
    """Videos generated from a seed; see `demo`."""

    name = "demo"

    def __init__(self, root: str, **spec: Any) -> None:
        self.root, self.spec = Path(root), DemoSpec(**spec)

    def prepare(self) -> None:
        """Generate the files unless they are there."""
        make_demo(self.root, self.spec)

    def videos(self, split: str) -> VideoList:
        """Videos of the split."""
        return read_list(self.root / f"{split}.csv")


class LoaderError(ValueError):
    """Loader options that cannot be honoured: names the key, the value and what is allowed."""


@dataclass(frozen=True)
class LoaderOptions:
    """Batches and workers.

    Attributes:
        batch_size: clips a step over all devices together.
        num_workers: decoding processes a device.
        eval_batch_size: videos a step in evaluation over all devices; None is `batch_size`.
        timeout: seconds after which a worker that delivers nothing is an error (0: never).
    """

    batch_size: int
    num_workers: int
    eval_batch_size: int | None = None
    timeout: float = 300.0

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("eval_batch_size", 1), ("num_workers", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise LoaderError(f"loader.{name}={value}: must be {least} or more")


class VideoDataModule(pl.LightningDataModule):
    """Clips of a source, for training, validation (one centre view) and test (V views).

    Args:
        source: where the videos come from.
        clip_size: frames, height and width of the model's clips.
        stride: source frames from one frame of a clip to the next.
        test_views: evenly spread clips of each test video.
        loader: batches and workers.
        train_transform: arguments of `TrainTransform` besides the size.
        short_side: of the evaluation's resize; None is 256/224 of the crop.
        decoder: see `Reading`.
        on_error: see `Reading`.
    """

    def __init__(
        self,
        source: Source,
        clip_size: Sequence[int],
        stride: int,
        test_views: int,
        loader: LoaderOptions,
        train_transform: dict[str, Any] | None = None,
        short_side: int | None = None,
        decoder: str = "decord",
        on_error: str = "raise",
    ) -> None:
        super().__init__()
        frames, *size = clip_size
        self.source, self.loader, self.stride, self.test_views = source, loader, stride, test_views
        self._train_clip, self._val_clip, self._test_clip = (ClipSpec(frames, stride, v) for v in (1, 1, test_views))
        self._reading = Reading(decoder, on_error)
        self._train_transform = TrainTransform(size, **(train_transform or {}))
        self._eval_transform = EvalTransform(size, short_side)
        self.splits: dict[str, VideoList] = {}

    def prepare_data(self) -> None:
        """Make what the source needs, on one process."""
        self.source.prepare()

    def setup(self, stage: str | None = None) -> None:
        """Read the lists."""
        if not self.splits:
            self.splits = {split: self.source.videos(split) for split in ("train", "val")}

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, by label."""
        return self.splits["train"].classes

    def summary(self) -> dict[str, Any]:
        """Facts of the data for tables and results."""
        return {
            "name": self.source.name,
            "classes": len(self.classes),
            **{f"{split}_videos": len(videos) for split, videos in self.splits.items()},
            **{f"{split}_hash": list_hash(videos) for split, videos in self.splits.items()},
        }

    def per_device(self, batch_size: int) -> int:
        """Share of a device in a global batch. Raises LoaderError if the devices cannot share it evenly."""
        devices = self.trainer.world_size if self.trainer else 1
        if batch_size % devices:
            raise LoaderError(
                f"loader.batch_size={batch_size}: is for all devices and must be a multiple of their number, {devices}"
            )
        return batch_size // devices

    def _loader(self, split: str, clip: ClipSpec, train: bool = False) -> DataLoader[Batch]:
        transform = self._train_transform if train else self._eval_transform
        options = self.loader
        size = options.batch_size if train else options.eval_batch_size or options.batch_size
        return DataLoader(
            ClipDataset(self.splits[split], clip, transform, train, self._reading),
            batch_size=self.per_device(size),
            shuffle=train,
            drop_last=train and len(self.splits[split]) >= size,
            num_workers=options.num_workers,
            collate_fn=collate,
            persistent_workers=options.num_workers > 0,
            timeout=options.timeout if options.num_workers > 0 else 0,
        )

    def train_dataloader(self) -> DataLoader[Batch]:
        """Random clips of the training videos."""
        return self._loader("train", self._train_clip, train=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        """The centre clip of each validation video."""
        return self._loader("val", self._val_clip)

    def test_dataloader(self) -> DataLoader[Batch]:
        """V clips of each validation video."""
        return self._loader("val", self._test_clip)
