"""A list of videos as a map-style dataset of clips."""

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from stts_lightning.data.annotations import VideoList
from stts_lightning.data.decode import DECODERS, DecodeError
from stts_lightning.data.isolation import open_isolated
from stts_lightning.data.resumable_sampler import Pick
from stts_lightning.data.sampling import SAMPLINGS
from stts_lightning.data.truth import boxes_at

Transform = Callable[[Tensor], Tensor]
"""From frames `(T, 3, H, W)` to `(crops, T, 3, H', W')`; what follows boxes, too, is a `BoxTransform`."""
BoxTransform = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""The same, also from boxes `(T, 4)`, as shares of the frames, to `(crops, T, 4)`, as shares of the crops."""


class Failure(NamedTuple):
    """A file that did not decode, or not by the decoder asked for, and why."""

    path: str
    reason: str


class Batch(NamedTuple):
    """Clips of one step.

    Attributes:
        clip: `(B, V, 3, T, H, W)` uint8; V counts each crop of each clip and is 1 in training.
        label: `(B,)` int64.
        video: `(B,)` int64, the video's number in its list.
        valid: `(B,)` bool; False where an evaluation was allowed to go on without the video.
        failures: files that did not decode on the way.
        draws: in training a number for each video, which all that is random about it follows from.
        notes: files that another decoder than the one asked for reads: the first one for each reason.
        truth: where the action is in each frame, `(B, V, T, 4)`: left, top, right, bottom as shares of the picture, NaN where
            there is none. None where the data set does not say.
    """

    clip: Tensor
    label: Tensor
    video: Tensor
    valid: Tensor
    failures: tuple[Failure, ...]
    draws: tuple[int, ...] = ()
    notes: tuple[Failure, ...] = ()
    truth: Tensor | None = None


@contextmanager
def drawing_from(seed: int) -> Iterator[None]:
    """Let torch's default generator start from a seed, and put it back; devices have their own."""
    state = torch.get_rng_state()
    # torch.manual_seed would queue work for devices that a worker process never uses.
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


@dataclass(frozen=True)
class ClipSpec:
    """How a clip is cut.

    Attributes:
        frames: frames of it.
        stride: source frames from one to the next; with "slowfast" the clip spans frames * stride / 30 seconds.
        views: clips of a video in evaluation.
        sampling: which; a name of `SAMPLINGS`.
    """

    frames: int
    stride: int
    views: int = 1
    sampling: str = "spread"

    def __post_init__(self) -> None:
        for name, key in (("stride", "clip.stride"), ("views", "clip.test_views")):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{key}={value}: must be 1 or more")
        if self.sampling not in SAMPLINGS:
            raise ValueError(f"clip.sampling={self.sampling!r}: allowed are {', '.join(SAMPLINGS)}")


@dataclass(frozen=True)
class Reading:
    """How files are read.

    Attributes:
        decoder: "decord" or "pyav".
        decode_timeout: seconds after which a decoder that says nothing is given up, and its file with it; None decodes in the
            worker itself, which a broken file can then take with it.
        on_error: what an undecodable file is in evaluation: "raise" an error, or "skip" it, marked invalid and counted.
    """

    decoder: str = "decord"
    on_error: str = "raise"
    decode_timeout: float | None = None

    def __post_init__(self) -> None:
        for name, allowed in (("decoder", tuple(DECODERS)), ("on_error", ("raise", "skip"))):
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"clip.{name}={value!r}: allowed are {', '.join(allowed)}")
        if self.decode_timeout is not None and self.decode_timeout <= 0:
            raise ValueError(f"clip.decode_timeout={self.decode_timeout}: must be above 0 seconds, or null")


class ClipDataset(Dataset[Batch]):
    """Clips of videos: a random one in training, the views of a test in evaluation.

    Args:
        videos: the list.
        clip: how clips are cut.
        transform: from `(T, 3, H, W)` uint8 to `(crops, T, 3, H, W)` at the model's size.
        train: random offset and transform, undecodable files replaced by another sample; else fixed views.
        reading: decoder, and what to do about an undecodable file in evaluation.
        boxes: as `transform`, with boxes, for videos beside which the truth lies (see `truth`); None where there is none.
    """

    max_replacements = 20

    def __init__(
        self,
        videos: VideoList,
        clip: ClipSpec,
        transform: Transform,
        train: bool,
        reading: Reading | None = None,
        boxes: BoxTransform | None = None,
    ) -> None:
        self.videos, self.clip, self.transform, self.train, self.boxes = videos, clip, transform, train, boxes
        self.sampling = SAMPLINGS[clip.sampling](clip.frames, clip.stride)
        self.reading = reading or Reading()
        self._notes: dict[str, Failure] = {}
        self._told: set[str] = set()

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, item: int | Pick) -> Batch:
        """One video as a batch of size 1. Raises DecodeError in evaluation, or when no replacement decodes.

        Args:
            item: number of the video; in training with what its random choices follow from, else they follow from torch's
                default generator.
        """
        if isinstance(item, Pick):
            with drawing_from(item.draw):
                return self._read(item.video)._replace(draws=(item.draw,))
        return self._read(item)

    def _read(self, index: int) -> Batch:
        failures: list[Failure] = []
        for _ in range(self.max_replacements):
            video = self.videos.videos[index]
            try:
                clip, truth = self._decode(index)
                return self._item(index, clip, truth, video.label, True, failures)._replace(notes=self._new_notes())
            except DecodeError as error:
                if not self.train and self.reading.on_error == "raise":
                    raise
                failures.append(Failure(str(video.path), str(error)))
                if not self.train:
                    return self._item(index, None, None, video.label, False, failures)
                index = int(torch.randint(len(self), ()))
        raise DecodeError(f"{len(failures)} training files in a row cannot be decoded; the last: {failures[-1].reason}")

    def _decode(self, index: int) -> tuple[Tensor, Tensor | None]:
        video = self.videos.videos[index]
        with open_isolated(video.path, video.decoder or self.reading.decoder, self.reading.decode_timeout) as reader:
            total = video.frames or len(reader)
            if total > len(reader) and video.path.is_dir():
                raise DecodeError(f"{video.path}: {len(reader)} pictures, but the list says {total} frames")
            if reader.note:
                self._notes.setdefault(reader.note, Failure(str(video.path), reader.note))
            if self.train:
                rng = np.random.default_rng(int(torch.randint(2**62, ())))
                views = self.sampling.train(total, rng, reader.rate)[None]
            else:
                views = self.sampling.views(total, self.clip.views, reader.rate)
            pixels = reader.frames(views.ravel())
        frames = torch.from_numpy(pixels).permute(0, 3, 1, 2)
        if self.boxes is None:
            return _by_view(self.transform(frames), len(views)).transpose(1, 2), None
        clip, truth = self.boxes(frames, boxes_at(video.path, views))
        return _by_view(clip, len(views)).transpose(1, 2), _by_view(truth, len(views))

    def _new_notes(self) -> tuple[Failure, ...]:
        """Notes that no batch of this process has had."""
        new = tuple(note for reason, note in self._notes.items() if reason not in self._told)
        self._told.update(self._notes)
        return new

    def _item(
        self, index: int, clip: Tensor | None, truth: Tensor | None, label: int, valid: bool, failures: list[Failure]
    ) -> Batch:
        if clip is None:
            blank = torch.zeros(self.clip.views * self.clip.frames, 3, 8, 8, dtype=torch.uint8)
            clip = _by_view(self.transform(blank), self.clip.views).transpose(1, 2)
            if self.boxes is not None:
                truth = torch.full((*clip.shape[:1], clip.shape[2], 4), torch.nan)
        labels = torch.tensor(label), torch.tensor(index), torch.tensor(valid)
        return Batch(clip.contiguous(), *labels, tuple(failures), truth=truth)


def _by_view(crops: Tensor, views: int) -> Tensor:
    """Crops of the frames of V clips, `(crops, V T, ...)` -> `(V * crops, T, ...)`, a clip's crops one after the other."""
    return crops.unflatten(1, (views, -1)).transpose(0, 1).flatten(0, 1)


def collate(items: list[Batch]) -> Batch:
    """Stack items; failures, draws and notes are joined."""
    clip, label, video, valid = (default_collate([item[i] for item in items]) for i in range(4))
    failures = tuple(chain.from_iterable(item.failures for item in items))
    draws = tuple(chain.from_iterable(item.draws for item in items))
    notes = tuple(chain.from_iterable(item.notes for item in items))
    truths = [item.truth for item in items if item.truth is not None]
    return Batch(clip, label, video, valid, failures, draws, notes, torch.stack(truths) if truths else None)


def list_hash(videos: VideoList) -> str:
    """Twelve hexadecimal digits that tell two lists apart: of file names and labels, in order."""
    text = "\n".join(f"{video.path.name} {video.label}" for video in videos.videos)
    return hashlib.sha256(os.fsencode(text)).hexdigest()[:12]
