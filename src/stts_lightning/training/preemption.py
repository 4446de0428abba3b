"""What lets a run be broken off at any moment and go on: checkpoints that are whole, and an orderly end on request."""

import contextlib
import io
import logging
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from stts_lightning.data.isolation import ASKING
from stts_lightning.errors import UserError
from stts_lightning.files import replacing
from stts_lightning.run_folders import exit_status, how_to_resume
from stts_lightning.training.module import ClassificationModule
from stts_lightning.training.processes import gathered

log = logging.getLogger(__name__)


class SaveError(UserError):
    """A checkpoint that cannot be written or read: names it."""


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place and moves it there when it is on the disk: the one before is there until then."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write. Raises SaveError where the disk is full or the folder is not to be written in."""
        path = Path(path)
        # By way of memory: torch's writer ends the process where a disk is full.
        content = io.BytesIO()
        torch.save(checkpoint, content)
        try:
            with replacing(path) as part, part.open("wb") as file:
                file.write(content.getbuffer())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            kept = "; the one before it is whole" if path.is_file() else ""
            raise SaveError(f"checkpoint {path}: cannot be written ({error.strerror or error}){kept}") from error

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read. Raises SaveError for a file that is not whole."""
        try:
            return super().load_checkpoint(path, map_location, weights_only)
        except Exception as error:  # torch raises many kinds; all mean that this file is no use.
            others = sorted(str(file) for file in Path(path).parent.glob("*.ckpt") if file != Path(path))
            hint = f"; beside it there is {', '.join(others)} (start anew from it with pretrained=)" if others else ""
            reason = str(error).splitlines()[0].split(". ")[0][:200]
            size = Path(path).stat().st_size
            raise SaveError(f"checkpoint {path}: cannot be read, {size} bytes ({reason}){hint}") from error


class BestCheckpoint(ModelCheckpoint):
    """Lightning's, but a run whose folder was moved or copied goes on with the best score it had: its files moved along."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The state, its paths in today's folder. Lightning's drops the score where the folder is another."""
        here, before = str(self.dirpath), str(state_dict["dirpath"])

        def moved(path: str) -> str:
            inside = path and Path(path).is_relative_to(before)
            return str(here / Path(path).relative_to(before)) if inside else path

        paths = {name: moved(state_dict[name]) for name in ("best_model_path", "kth_best_model_path", "last_model_path")}
        best = {moved(path): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict({**state_dict, **paths, "best_k_models": best, "dirpath": here})


class LastCheckpoint(Checkpoint):
    """Keeps `last.ckpt`: after each epoch, now and then in between, and when a scheduler asks the run to end.

    Asked by Ctrl-C, SIGTERM, SIGUSR1 or SIGUSR2, a run finishes its step (all batches whose gradients it accumulates; in a
    validation: that), writes the checkpoint on the word of any of its processes, and exits with status 75 (after Ctrl-C 130). A
    scheduler's signal's former handler is called then: submitit's requeues the job. Ctrl-C twice ends the run at once.

    Args:
        folder: where.
        every_minutes: between two checkpoints within an epoch; None: none for that reason.
        every_n_steps: the same, in steps.
    """

    def __init__(self, folder: str, every_minutes: float | None = 15.0, every_n_steps: int | None = None) -> None:
        for name, value in (("every_minutes", every_minutes), ("every_n_steps", every_n_steps)):
            if value is not None and value <= 0:
                raise ValueError(f"callbacks.last.{name}={value}: must be above 0, or null")
        self.file = Path(folder) / "last.ckpt"
        self.every_minutes, self.every_n_steps = every_minutes, every_n_steps
        self.saved_at, self.saved_step = time.monotonic(), 0
        self.metrics: dict[str, float] = {}
        """Of the last epoch: a run that broke off after it has them still."""
        self.asked: signal.Signals | None = None
        self.before: dict[signal.Signals, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """From here on signals are requests. Lightning's own handler talks to the other processes from within, which can hang."""

        def asked(number: int, frame: FrameType | None) -> None:
            if number == signal.SIGINT:
                if self.asked == signal.SIGINT:
                    signal.default_int_handler(number, frame)
                if trainer.is_global_zero:
                    log.warning("ends after this step, and saves; press Ctrl-C again to end at once")
            self.asked = signal.Signals(number)

        self.saved_at = time.monotonic()
        # A broadcast, and a wait for it, before each step. What it is there for is seen to here.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None
        with contextlib.suppress(ValueError):  # Not the main thread: whoever runs this there sees to signals.
            self.before = {number: signal.signal(number, asked) for number in ASKING}

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Give the signals back."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Tell the other processes of requests, with the figures of this step."""
        if trainer.world_size > 1:
            assert isinstance(pl_module, ClassificationModule)
            pl_module.figures.tell(self.asked is not None, trainer.is_global_zero and self._time_is_up())

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Save if it is time to; end if that was asked for."""
        if batch_idx + 1 >= trainer.num_training_batches:
            return  # Validation, if any, and the end of the epoch follow.
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return  # No checkpoint holds gradients: one that was written here would lose them.
        asked, due = self._told(trainer, pl_module)
        if asked or due or (self.every_n_steps and trainer.global_step % self.every_n_steps == 0):
            self._log_step(trainer)
            self._save(trainer)
        if asked:
            self._end(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save; end if that was asked for."""
        metrics = trainer.callback_metrics.items()
        self.metrics = {
            name: float(value) for name, value in sorted(metrics) if name.startswith(("val/", "train/", "selection/"))
        }
        self._save(trainer)
        asked = any(gathered(trainer, self.asked is not None))
        if asked and trainer.current_epoch + 1 < (trainer.max_epochs or 0):
            self._end(trainer)

    def state_dict(self) -> dict[str, Any]:
        """The last epoch's metrics."""
        return {"metrics": dict(self.metrics)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The last epoch's metrics."""
        self.metrics = dict(state_dict["metrics"])

    def _told(self, trainer: pl.Trainer, module: ClassificationModule) -> tuple[bool, bool]:
        """Whether the run was asked to end, and whether a checkpoint is due: the same on all processes.

        Of several it is known of the step before, which the figures of a step told: that costs nothing.
        """
        if trainer.world_size == 1:
            return self.asked is not None, self._time_is_up()
        known = module.look()
        return known.asked, known.due and known.step >= self.saved_step

    def _time_is_up(self) -> bool:
        return self.every_minutes is not None and time.monotonic() - self.saved_at > 60 * self.every_minutes

    @staticmethod
    def _log_step(trainer: pl.Trainer) -> None:
        """What this step logged, which Lightning hands to loggers only after the callbacks: too late for a run that ends here."""
        if trainer.global_step % trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return
        names = ("train/", "sigma")
        values = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith(names)}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step - 1)

    def _save(self, trainer: pl.Trainer) -> None:
        trainer.save_checkpoint(self.file)
        for logger in trainer.loggers:
            logger.save()  # What was logged up to here is on the disk too.
        self.saved_at, self.saved_step = time.monotonic(), trainer.global_step

    def _end(self, trainer: pl.Trainer) -> None:
        name = self.asked.name if self.asked else "another process"
        if trainer.is_global_zero:
            told = how_to_resume(self.file.parent.parent)
            log.warning("asked to end by %s: %s holds step %d; %s", name, self.file, trainer.global_step, told)
        former: Callable[..., Any] | Any = self.before.get(self.asked) if self.asked else None
        if callable(former) and self.asked not in (signal.SIGINT, signal.SIGTERM):
            former(int(self.asked or 0), None)
        # Lightning takes the end of a process that it started, with any status but 0, for a failure, and kills the others.
        started = isinstance(getattr(trainer.strategy, "cluster_environment", None), LightningEnvironment)
        raise SystemExit(exit_status(self.asked or 0) if trainer.is_global_zero or not started else 0)
