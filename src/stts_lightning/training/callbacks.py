"""Callbacks: the annealing of sigma, and the count of files that do not decode."""

import logging
import math
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.utilities import rank_zero_only

from stts_lightning.data.dataset import Batch, Failure
from stts_lightning.errors import UserError
from stts_lightning.training.module import ClassificationModule, is_logged
from stts_lightning.training.processes import gathered

log = logging.getLogger(__name__)


def annealed_sigma(sigma: float, step: int, total_steps: int, until: float = 1.0) -> float:
    """Linear decay to zero (end of paper Sec. 3.2): sigma before optimiser step `step` of `total_steps`, from 0.

    Args:
        sigma: before the first step.
        step: number of the step, from 0.
        total_steps: of the run.
        until: share of the run after which sigma is 0; the paper's is 1, the whole run.
    """
    return sigma * max(0.0, 1.0 - step / max(total_steps * until, 1e-9))


class SigmaAnnealing(pl.Callback):
    """Sets the selectors' sigma before each step from the step's number alone, so that a resumed run needs no state.

    Args:
        sigma: value at the first step.
        decay: decay linearly to 0, or keep the value.
        until: share of the run after which sigma is 0, above 0: below 1 the network learns the rest of it with hard selections.
    """

    def __init__(self, sigma: float, decay: bool = True, until: float = 1.0) -> None:
        self.sigma, self.decay, self.until = float(sigma), decay, until

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Set and log sigma."""
        assert isinstance(pl_module, ClassificationModule)
        self._set(trainer, pl_module)
        if not pl_module.model.slots.empty and is_logged(trainer):
            pl_module.log("sigma", pl_module.model.slots.sigma)  # A number of the host would be copied to the device.

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Set sigma once more, after the last step: where a resumed run had no step left, for the first time."""
        assert isinstance(pl_module, ClassificationModule)
        self._set(trainer, pl_module)

    def _set(self, trainer: pl.Trainer, module: ClassificationModule) -> None:
        total = int(trainer.estimated_stepping_batches)
        sigma = annealed_sigma(self.sigma, trainer.global_step, total, self.until) if self.decay else self.sigma
        module.model.slots.sigma.fill_(sigma)


class RatioAnnealing(pl.Callback):
    """Lets the reducers `evit` and `received` fall to their ratio from 1, by the cosine of EViT (ICLR 2022).

    EViT does so where it trains from the start, over a third of the run, and not where it fine-tunes.

    The share of tokens that they keep before optimiser step s of S is ratio + (1 - ratio) (1 + cos(pi s / (until S))) / 2. Like
    sigma it follows from the step's number alone.

    Args:
        until: share of the run after which they keep their ratio; 0: from the first step on.
    """

    def __init__(self, until: float = 0.0) -> None:
        self.until = until

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse what cannot be.

        Raises:
            UserError: if no reducer of the model can fall to its ratio, or one behind it was built for a fixed number of tokens.
        """
        assert isinstance(pl_module, ClassificationModule)
        if not self.until:
            return
        slots = pl_module.model.slots
        if not slots.keep_more(1.0):
            raise UserError(
                f"callbacks.ratio.until={self.until}: no reducer of this model falls to its ratio; evit and received do, with a "
                "ratio (selection=r3_0.7 selection.reducer=evit)"
            )
        if behind := slots.fixed_behind_falling():
            raise UserError(
                f"callbacks.ratio.until={self.until}: more tokens would reach {', '.join(behind)} than it was built for; behind "
                "evit and received only these two may stand, each with a ratio"
            )

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Set how much more than their ratio they keep."""
        assert isinstance(pl_module, ClassificationModule)
        if self.until:
            done = min(trainer.global_step / (int(trainer.estimated_stepping_batches) * self.until), 1.0)
            pl_module.model.slots.keep_more((1 + math.cos(math.pi * done)) / 2)


class EarlyStop(EarlyStopping):
    """Ends a training that a validation has found no better for some epochs, and says why.

    Sigma is then what the schedule had come to, above 0: what was tested has met soft selections alone.

    Args:
        monitor: what is watched; see `ClassificationModule.measured`.
        mode: whether it is to be "max" or "min".
        patience: validations without improvement after which training ends; None: it never does.
        min_delta: what counts as an improvement.

    Attributes:
        reason: why the training ended; empty if it was not by this.
    """

    def __init__(self, monitor: str = "val/top1", mode: str = "max", patience: int | None = None, min_delta: float = 0.0) -> None:
        super().__init__(monitor, min_delta=min_delta, patience=patience or 0, mode=mode, check_on_train_epoch_end=False)
        self.active = patience is not None
        self.reason = ""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Nothing to check before there is a validation."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A run that was ended, broke off in its test and goes on is not trained any further."""
        if self.active and self.stopped_epoch:
            self._end(trainer)
            trainer.should_stop = True

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look, after a validation of a training."""
        if not self.active:
            return
        super().on_validation_end(trainer, pl_module)
        if trainer.should_stop and self.stopped_epoch:
            self._end(trainer)

    def _end(self, trainer: pl.Trainer) -> None:
        self.reason = f"{self.monitor} has not been better than {float(self.best_score):.4g} for {self.patience} validations"
        if trainer.is_global_zero:
            log.info("stops after epoch %d of %s: %s", self.stopped_epoch + 1, trainer.max_epochs, self.reason)


def check_monitors(trainer: pl.Trainer, measured: Sequence[str]) -> None:
    """Refuse to watch what no validation measures; Lightning would say so after the first epoch.

    Raises:
        UserError: names the callback, and what is measured.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        monitor = getattr(callback, "monitor", None)
        if monitor is not None and monitor not in measured:
            key = "early_stopping" if isinstance(callback, EarlyStop) else "best"
            raise UserError(f"callbacks.{key}.monitor={monitor}: is not measured; allowed are {', '.join(measured)}")


class FailureLog(pl.Callback):
    """Counts files that do not decode at any process, names each once, and remembers them over a resume.

    Processes tell each other at the end of an epoch and of a test, and before a checkpoint is written.

    Attributes:
        counts: how often each file failed, by path; the same on all processes.
    """

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self._new: list[Failure] = []
        self._notes: dict[str, Failure] = {}
        self._said: set[str] = set()

    @rank_zero_only
    def _warn(self, failure: Failure) -> None:
        log.warning("cannot decode, replaced in training and left out of a test: %s", failure.reason)

    @rank_zero_only
    def _say(self, note: Failure) -> None:
        log.info("%s is decoded by PyAV: %s (said once for each reason)", note.path, note.reason)

    def _share(self, trainer: pl.Trainer) -> None:
        own, self._new = (self._new, list(self._notes.values())), []
        for failures, notes in gathered(trainer, own):
            for note in notes:
                if note.reason not in self._said:
                    self._say(note)
                    self._said.add(note.reason)
            for failure in failures:
                if failure.path not in self.counts:
                    self._warn(failure)
                self.counts[failure.path] = self.counts.get(failure.path, 0) + 1

    def _note(self, trainer: pl.Trainer, batch: Batch) -> None:
        self._new += batch.failures
        for note in batch.notes:
            self._notes.setdefault(note.reason, note)
        if trainer.world_size == 1:
            self._share(trainer)  # There is nobody to wait for.

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Note failures of a training batch."""
        self._note(trainer, batch)

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Note failures of a validation batch."""
        self._note(trainer, batch)

    def on_test_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Note failures of a test batch."""
        self._note(trainer, batch)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Tell all processes those of the epoch and its validation."""
        self._share(trainer)

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Tell all processes those of the test."""
        self._share(trainer)

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Tell all processes, then put the counts in the place of those that Lightning has put there before."""
        self._share(trainer)
        checkpoint["callbacks"][self.state_key] = self.state_dict()

    def state_dict(self) -> dict[str, Any]:
        """The counts."""
        return {"counts": dict(self.counts)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The counts."""
        self.counts = dict(state_dict["counts"])
