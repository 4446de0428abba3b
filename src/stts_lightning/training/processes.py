"""What the processes of a run tell each other, and how all of them end at an error."""

from typing import Any, NoReturn, TypeVar

import lightning.pytorch as pl
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def gathered(trainer: pl.Trainer, value: T) -> list[T]:
    """The value of each process, in their order; all of them must call this together."""
    if trainer.world_size == 1:
        return [value]
    values: list[Any] = [None] * trainer.world_size
    dist.all_gather_object(values, value)
    return values


def mean_of_all(trainer: pl.Trainer, value: Tensor) -> Tensor:
    """Mean over the processes, on their devices; all of them must call this together.

    Lightning's reduction waits on the host for all processes before it begins.
    """
    if trainer.world_size == 1:
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return total / trainer.world_size


def end_all(trainer: pl.Trainer, error: Exception) -> NoReturn:
    """Raise an error that all processes have found together: the first one says it, the others end without a word."""
    # A launcher takes another status for a failure and kills the first process, which may not have spoken yet.
    raise error if trainer.is_global_zero else SystemExit(0)
