"""Has a model that training started from a checkpoint of unlearned what it knew? Looked at after each validation."""

import logging
import math
from typing import Any

import lightning.pytorch as pl
import numpy as np
from numpy.typing import NDArray

from stts_lightning.training.module import ClassificationModule

log = logging.getLogger(__name__)

LEAST = 50
"""Videos of a validation; fewer say too little."""
DEVIATIONS = 2
"""Standard deviations, of the accuracy of one answer for all videos, that a model must be better than it."""


def same_answer(labels: NDArray[np.int64]) -> tuple[float, float]:
    """Top-1 of a model that answers all videos alike, as well as that can be done.

    Args:
        labels: of the videos, `(N,)`.

    Returns:
        The share of the largest class; and two standard deviations more, above which an accuracy of N videos is no chance.
    """
    share = float(np.bincount(labels).max()) / len(labels)
    return share, share + DEVIATIONS * math.sqrt(share * (1 - share) / len(labels))


class ChanceWatch(pl.Callback):
    """Warns once if fine-tuning has left a model no better than the same answer for every video.

    Selectors that drop the action make the network unlearn it, and then no gradient tells them what to keep; a rate that is too
    high does the same. Of a model with new weights or a new head, which begins at chance, nothing is said.
    """

    def __init__(self) -> None:
        self.done = False

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compare, after a validation of all videos within a training."""
        assert isinstance(pl_module, ClassificationModule)
        model, share = pl_module.model, trainer.limit_val_batches
        whole = share == 1.0 and isinstance(share, float)  # The integer 1, equal to it, is one batch.
        if self.done or trainer.sanity_checking or not whole or model.tells_nothing:
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        labels = data.splits["val"].labels
        same, least = same_answer(labels)
        top1 = float(trainer.callback_metrics["val/top1"])
        if len(labels) < LEAST or not top1 <= least < 1:
            return
        self.done = True
        if trainer.is_global_zero:
            log.warning(
                "val/top1 is %.1f%%, and %.1f%% for the same answer to every video: the model has lost what it knew. %s",
                100 * top1, 100 * same, SELECTS if model.slots.learns else "A lower optim.lr may help.",
            )  # fmt: skip


SELECTS = (
    "Its selectors may drop what tells the classes apart: look at selection/*/changed and choices in the log and at panels/; try "
    "another seed, callbacks.starts.draws=48, or recipe=learn_selection (docs/study.md)."
)
"""What to do about it if the selection is learned."""
