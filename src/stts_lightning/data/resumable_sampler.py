"""In which order an epoch goes through the videos, and what the random choices of each follow from.

Everything follows from the seed, the epoch and the position in the epoch's one global order: not from the number of
processes or workers, nor from what ran before. A run that goes on where it broke off is the run that did not break off.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch.distributed as dist
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

    Every video stands in at most one batch of an epoch. What is left over after the last whole batch is left out; a list
    that is shorter than one batch is one batch.

    Args:
        videos: length of the list.
        batch_size: videos of a step over all processes together; a multiple of their number.
        seed: of the run.
    """

    def __init__(self, videos: int, batch_size: int, seed: int) -> None:
        self.videos, self.batch_size, self.seed = videos, batch_size, seed
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
        order, draws = rng.permutation(self.videos), rng.integers(2**62, size=self.videos)
        share = min(self.batch_size, self.videos) // processes
        for step in range(self.done, len(self)):
            first = step * self.batch_size + rank * share
            yield [Pick(int(order[at]), int(draws[at])) for at in range(first, first + share)]


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
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there. Raises LoaderError in the middle of an epoch of other batches."""
        for name in ("batch_size", "videos", "seed"):
            if state["done"] and (now := getattr(self.order, name)) != state[name]:
                key = "seed" if name == "seed" else f"loader.{name}" if name == "batch_size" else "length of the training list"
                raise LoaderError(
                    f"resume: {key} was {state[name]} and is {now}; the run stands in the middle of an epoch, "
                    "which can only go on as it began"
                )
        self.order.epoch, self.order.done = state["epoch"], state["done"]
