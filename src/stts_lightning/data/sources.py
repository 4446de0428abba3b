"""Where videos come from: a folder of classes, list files, or the demo. A new kind of data set is a subclass of `Source`."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from stts_lightning.data.annotations import (
    AnnotationError,
    VideoList,
    check_files,
    existing_folder,
    held_out,
    read_folder,
    read_list,
)
from stts_lightning.data.demo import DemoSpec, make_demo
from stts_lightning.data.labels import read_class_names


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

    def splits(self) -> list[str]:
        """Splits that there are videos of."""
        return ["train", "val", *(["test"] if self.has_test else [])]

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

    With `val_fraction` and no folder `train`, the class folders may lie in `root` itself.

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
        self._listed: VideoList | None = None
        self.has_test = (self.root / "test").is_dir()
        self.train = self.root / "train"
        if val_fraction is not None and not self.train.is_dir() and not self.has_test:
            self.train = self.root
        if val_fraction is not None and (self.root / "val").is_dir():
            raise AnnotationError(f"dataset.val_fraction={val_fraction}: there is a folder {self.root / 'val'}; give one of them")

    def splits(self) -> list[str]:
        """See `Source.splits`."""
        there = self.val_fraction is not None or (self.root / "val").is_dir()
        return [split for split in super().splits() if split != "val" or there]

    def listed(self, split: str) -> VideoList:
        """Videos of `root/<split>`; classes are train's."""
        existing_folder(self.root)
        if not self.train.is_dir():
            hint = (
                f"videos are looked for in {self.train}/<class>/; dataset.val_fraction=0.2 takes them from {self.root}/<class>/"
            )
            raise AnnotationError(f"data folder {self.train}: does not exist; {hint}, and holds out a fifth of them")
        if self._listed is None:
            self._listed = read_folder(self.train)
        if split == "train":
            return self._listed
        if split == "val" and not (self.root / "val").is_dir():
            hint = f"dataset.val_fraction=0.2 holds out a fifth of {self.train}"
            raise AnnotationError(f"data folder {self.root / 'val'}: does not exist; {hint}")
        return read_folder(self.root / split, self._listed.classes)


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

    def splits(self) -> list[str]:
        """See `Source.splits`."""
        return [split for split in super().splits() if self.files[split] or (split == "val" and self.val_fraction is not None)]

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
