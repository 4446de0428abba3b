"""Callbacks: the annealing of sigma, and the count of files that do not decode."""

import logging
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_only

from stts_lightning.data.dataset import Batch, Failure
from stts_lightning.training.module import ClassificationModule

log = logging.getLogger(__name__)


def annealed_sigma(sigma: float, step: int, total_steps: int) -> float:
    """Linear decay to zero (end of paper Sec. 3.2): sigma before optimiser step `step` of `total_steps`, from 0."""
    return sigma * max(0.0, 1.0 - step / max(total_steps, 1))


class SigmaAnnealing(pl.Callback):
    """Sets the selectors' sigma before each step from the step's number alone, so that a resumed run needs no state.

    Args:
        sigma: value at the first step.
        decay: decay linearly to 0, or keep the value.
    """

    def __init__(self, sigma: float, decay: bool = True) -> None:
        self.sigma, self.decay = float(sigma), decay

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Set and log sigma."""
        assert isinstance(pl_module, ClassificationModule)
        total = int(trainer.estimated_stepping_batches)
        sigma = annealed_sigma(self.sigma, trainer.global_step, total) if self.decay else self.sigma
        pl_module.model.slots.sigma.fill_(sigma)
        if pl_module.model.slots.at_block:
            pl_module.log("sigma", sigma)


class FailureLog(pl.Callback):
    """Counts files that do not decode, names each once, and remembers them over a resume."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self._said: set[str] = set()

    @rank_zero_only
    def _say(self, note: Failure) -> None:
        if note.reason not in self._said:
            log.info("%s is decoded by PyAV: %s (said once for each reason)", note.path, note.reason)
        self._said.add(note.reason)

    @rank_zero_only
    def _warn(self, failure: Failure) -> None:
        log.warning("cannot decode, replaced in training and left out of a test: %s", failure.reason)

    def _note(self, batch: Batch) -> None:
        for note in batch.notes:
            self._say(note)
        for failure in batch.failures:
            if failure.path not in self.counts:
                self._warn(failure)
            self.counts[failure.path] = self.counts.get(failure.path, 0) + 1

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Note failures of a training batch."""
        self._note(batch)

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Note failures of a validation batch."""
        self._note(batch)

    def on_test_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Note failures of a test batch."""
        self._note(batch)

    def state_dict(self) -> dict[str, Any]:
        """The counts."""
        return {"counts": dict(self.counts)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The counts."""
        self.counts = dict(state_dict["counts"])
