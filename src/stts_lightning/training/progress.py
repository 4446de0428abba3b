"""Progress of training and tests: Lightning's bar in a terminal, lines in a log file."""

import logging
import time
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
from torch import Tensor

from stts_lightning.data.dataset import Batch
from stts_lightning.progress import EVERY_MINUTES, Timer, duration, in_terminal, line
from stts_lightning.training.module import ClassificationModule

log = logging.getLogger(__name__)


def progress(every_minutes: float = EVERY_MINUTES) -> ProgressBar:
    """A bar in a terminal; else `ProgressLines`.

    Args:
        every_minutes: between two lines within an epoch.
    """
    return Bar(leave=False) if in_terminal() else ProgressLines(every_minutes)


class Bar(RichProgressBar):
    """Lightning's bar, with the loss of the latest step that the host knows of: nothing waits for the device to show it."""

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """What stands at the end of the bar."""
        known = getattr(pl_module, "known", None)
        loss = {"train/loss": round(known.loss, 4)} if known is not None and known.step >= 0 else {}
        return {**super().get_metrics(trainer, pl_module), **loss}


class ProgressLines(ProgressBar):
    """Logs a line after each epoch, and every few minutes within one: what a Slurm or nohup log is read for.

    A line holds the epoch, the step, the mean loss since the last line, accuracies, learning rates, sigma, clips a second
    and the time that is left. Nothing waits for the device but a line.

    Args:
        every_minutes: between two lines within an epoch, a validation or a test.
    """

    def __init__(self, every_minutes: float = EVERY_MINUTES) -> None:
        super().__init__()
        try:
            self.timer = Timer(every_minutes)
        except ValueError as error:
            raise ValueError(f"callbacks.progress.{error}") from error
        self.shown = True
        self.loss: Tensor | float = 0.0
        self.steps = self.clips = 0
        self.seconds = 0.0
        self.accuracies: dict[str, Any] = {}

    def enable(self) -> None:
        """Log."""
        self.shown = True

    def disable(self) -> None:
        """Log nothing, as on all processes but the first."""
        self.shown = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count from here. A run that goes on within an epoch begins none."""
        self.begun, self.first_step = time.monotonic(), trainer.global_step
        self.batch_end = self.begun

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Time until the first batch is there counts as training."""
        self.batch_end = time.monotonic()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Add up; log where it is time to."""
        now = time.monotonic()
        self.seconds, self.batch_end = self.seconds + now - self.batch_end, now
        # Lightning has divided it where gradients are accumulated.
        self.loss, self.steps = self.loss + outputs["loss"].detach() * trainer.accumulate_grad_batches, self.steps + 1
        self.clips += batch.clip.shape[0] * batch.clip.shape[1] * trainer.world_size
        if batch_idx + 1 < trainer.num_training_batches and self.timer.due():
            self._log(trainer, pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Validation begins."""
        self.evaluation_begun = time.monotonic()

    on_test_start = on_validation_start

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Log where it is time to."""
        self._count("validation", batch_idx + 1, sum(trainer.num_val_batches))
        self.batch_end = time.monotonic()  # Where it stands in the middle of an epoch: no training time.

    def on_test_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Log where it is time to."""
        self._count("test", batch_idx + 1, sum(trainer.num_test_batches))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note what it found, for the next line alone: not every epoch ends with a validation."""
        self.accuracies = {name: value for name, value in trainer.callback_metrics.items() if name.startswith("val/")}

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Log the epoch."""
        self._log(trainer, pl_module)

    def _count(self, what: str, done: int, total: int) -> None:
        if self.shown and self.timer.due():
            log.info("%s", line(f"{what}, batches", done, total, time.monotonic() - self.evaluation_begun))

    def _log(self, trainer: pl.Trainer, module: ClassificationModule) -> None:
        total, done = int(trainer.estimated_stepping_batches), trainer.global_step
        loss = float(torch.as_tensor(self.loss)) / max(self.steps, 1)
        parts = [f"loss {loss:.4f}"]
        for name, value in self.accuracies.items():
            parts.append(f"{name} {float(value):.4f}" if name == "val/loss" else f"{name} {float(value):.2%}")
        parts.append(f"lr {rates(trainer.optimizers[0])}")
        if not module.model.slots.empty:
            parts.append(f"sigma {float(module.model.slots.sigma):.3g}")
        parts.append(f"{self.clips / max(self.seconds, 1e-9):.1f} clips/s")
        taken = time.monotonic() - self.begun
        left = taken / max(done - self.first_step, 1) * (total - done)
        parts.append(f"{duration(left)} left")
        if self.shown:
            log.info(
                "epoch %d of %s, step %d of %d: %s", trainer.current_epoch + 1, trainer.max_epochs, done, total, ", ".join(parts)
            )
        self.loss, self.steps, self.clips, self.seconds, self.accuracies = 0.0, 0, 0, 0.0, {}
        self.timer.last = time.monotonic()


def rates(optimizer: torch.optim.Optimizer) -> str:
    """Learning rates: one where all parts of the model learn at the same, else each with its part; of layers, the highest."""
    highest: dict[str, float] = {}
    for group in optimizer.param_groups:
        part = str(group["name"]).partition("/")[0]
        highest[part] = max(group["lr"], highest.get(part, 0.0))
    rates = {part: f"{rate:.1e}" for part, rate in highest.items()}
    same = len(set(rates.values())) == 1
    return next(iter(rates.values())) if same else " ".join(f"{rate} ({part})" for part, rate in rates.items())
