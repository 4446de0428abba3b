"""In which order an epoch goes through the videos, and what the random choices of each follow from.

Everything follows from the seed, the epoch and the position in the epoch's one global order: not from the number of
processes or workers, nor from what ran before. An interrupted and resumed run sees the same clips as an uninterrupted one.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Sampler

from stts_lightning.errors import UserError


class LoaderError(UserError):
    """Loader options that cannot be honoured: names the key, the value and what is allowed."""


class Pick(NamedTuple):
    """One video of an epoch.

    Attributes:
        video: its number in the list.
        draw: seeds all that is random about this clip of it: crop, augmentation, the selectors' noise.
    """

    video: int
    draw: int


class EpochOrder(Sampler[list[Pick]]):
    """Of each global batch the share of this process; a batch sampler.

    Every video is in at most one batch of an epoch. What is left over after the last whole batch is left out; a list that is
    shorter than one batch is one batch. A balanced epoch is as long, but draws each video anew: first a class, each with the
    same chance, then one of its videos; a video may come several times or not at all.

    Args:
        videos: length of the list.
        batch_size: videos of a step over all processes together; a multiple of their number.
        seed: of the run.
        labels: of the videos, `(videos,)`, for balanced epochs.
    """

    def __init__(self, videos: int, batch_size: int, seed: int, labels: NDArray[np.int64] | None = None) -> None:
        self.videos, self.batch_size, self.seed, self.labels = videos, batch_size, seed, labels
        self.balanced = labels is not None
        self.epoch, self.done = 0, 0

    @property
    def sampler(self) -> "EpochOrder":
        """Where Lightning looks for `set_epoch`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch; an epoch that was begun before the run broke off goes on, and is not gone back to."""
        if epoch > self.epoch:
            self.epoch, self.done = epoch, 0

    def __len__(self) -> int:
        """Steps of a whole epoch."""
        return max(self.videos // self.batch_size, 1)

    def __iter__(self) -> Iterator[list[Pick]]:
        """Batches from where the epoch stands."""
        together = dist.is_available() and dist.is_initialized()
        rank, processes = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
        rng = np.random.default_rng((self.seed, self.epoch))
        order, draws = self._order(rng), rng.integers(2**62, size=self.videos)
        share = min(self.batch_size, self.videos) // processes
        for step in range(self.done, len(self)):
            first = step * self.batch_size + rank * share
            yield [Pick(int(order[at]), int(draws[at])) for at in range(first, first + share)]

    def _order(self, rng: np.random.Generator) -> NDArray[np.int64]:
        if self.labels is None:
            return rng.permutation(self.videos)
        chances = 1 / np.bincount(self.labels)[self.labels]
        return rng.choice(self.videos, self.videos, p=chances / chances.sum())


class TrainLoader(DataLoader[Any]):
    """A loader of an `EpochOrder` that remembers how far it is, in checkpoints too."""

    def __init__(self, dataset: Any, order: EpochOrder, **options: Any) -> None:
        super().__init__(dataset, batch_sampler=order, **options)
        self.order = order

    def __iter__(self) -> Any:
        """Batches; each that is handed out counts as done."""
        return self._counted(super().__iter__())

    def _counted(self, batches: Any) -> Iterator[Any]:
        for batch in batches:
            self.order.done += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Where the epoch stands, and what the numbers mean."""
        order, after = self.order, self.order.done >= len(self.order)
        return {
            "epoch": order.epoch + after,
            "done": 0 if after else order.done,
            "batch_size": order.batch_size,
            "videos": order.videos,
            "seed": order.seed,
            "balanced": order.balanced,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there. Raises LoaderError in the middle of an epoch of other batches."""
        keys = {"batch_size": "loader.batch_size", "videos": "length of the training list", "seed": "seed"}
        for name, key in {**keys, "balanced": "loader.balanced"}.items():
            before = state.get(name, False)  # A run of an earlier version was never balanced.
            if state["done"] and (now := getattr(self.order, name)) != before:
                raise LoaderError(
                    f"resume: {key} was {before} and is {now}; the run stands in the middle of an epoch, "
                    "which can only go on as it began"
                )
        self.order.epoch, self.order.done = state["epoch"], state["done"]
