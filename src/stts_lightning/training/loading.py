"""Does loading keep up with the device? Measured over the first steps of a training."""

import logging
import math
import time
from typing import Any

import lightning.pytorch as pl
import torch

from stts_lightning.data.dataset import Batch
from stts_lightning.data.workers import own_cores

log = logging.getLogger(__name__)

WARM_UP = 5
"""Steps that are not measured, beside those that the workers' stock of batches lasts for."""


class LoadingWatch(pl.Callback):
    """Warns once, with numbers, if the device waits for clips.

    While it measures, each step waits for the device: else the host, which runs ahead, would take the device's time for its own.

    Args:
        steps: that are measured; more where a round of all workers is longer.
        share: of the time that may pass in waiting.
    """

    def __init__(self, steps: int = 20, share: float = 0.1) -> None:
        self.steps, self.share = steps, share
        self.seen = self.measured = self.clips = 0
        self.waiting = self.working = 0.0
        self.ended: float | None = None
        """When the last step ended; None where other things than loading came after it."""
        self.waited: float | None = None
        self.done = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find out how many batches the workers hold."""
        loader = trainer.train_dataloader
        self.workers = int(getattr(loader, "num_workers", 0))
        self.warm_up = WARM_UP + self.workers * (getattr(loader, "prefetch_factor", None) or 0)
        self.window = max(self.steps, 2 * self.workers)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """An epoch's first batch takes longer: it does not count."""
        self.ended = None

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A validation is no waiting."""
        self.ended = None

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """The batch is there."""
        self.begun = time.perf_counter()
        self.waited = None if self.ended is None else self.begun - self.ended

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Add up; say so at the end of the measurement."""
        self.seen += 1
        if self.done or self.seen < self.warm_up:
            return
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize(trainer.strategy.root_device)
        now = time.perf_counter()
        if self.waited is not None:
            self.waiting, self.working = self.waiting + self.waited, self.working + now - self.begun
            self.clips += batch.clip.shape[0] * batch.clip.shape[1]
            self.measured += 1
        self.ended = now
        if self.measured == self.window:
            self.done = True
            if self.waiting > self.share * (self.waiting + self.working) and trainer.is_global_zero:
                log.warning("%s", self._told(own_cores(trainer)))

    def _told(self, cores: int) -> str:
        together = self.waiting + self.working
        needed = math.ceil(max(self.workers, 1) * together / self.working)
        return (
            f"the device waits {self.waiting / together:.0%} of the time for clips: {self.workers} workers deliver "
            f"{self.clips / together:.1f} clips/s a device, the step could take {self.clips / self.working:.1f}; give it "
            f"{needed} cores (loader.num_workers={needed}; this process has {cores}), or re-encode with prepare_data task=encode"
        )
