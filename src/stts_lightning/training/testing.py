"""The test: logits of every view of every video, each exactly once whatever the number of processes, kept on disk."""

import logging
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
from numpy.typing import NDArray

from stts_lightning.analysis.evaluation import FILE, Predictions, write_tables
from stts_lightning.data.datamodule import VideoDataModule
from stts_lightning.data.dataset import Batch
from stts_lightning.kernels import prepacked_weights
from stts_lightning.run_folders import exit_status, how_to_resume
from stts_lightning.training.module import ClassificationModule
from stts_lightning.training.partial import Asked, PartialResults, listening, question

log = logging.getLogger(__name__)


class _Collect(pl.Callback):
    """Writes a process's predictions as they come: every few seconds, at the end, and when it is asked to end."""

    every_seconds = 10.0

    def __init__(self, partial: PartialResults, asked: Asked) -> None:
        self.partial, self.asked = partial, asked
        self.parts: list[Predictions] = []
        self.written = time.monotonic()

    def on_test_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        values = (outputs, batch.label, batch.video, batch.valid)
        self.parts.append(Predictions(*(value.cpu().numpy() for value in values)))
        if self.asked or time.monotonic() - self.written > self.every_seconds:
            self._write()
        if self.asked:
            told = how_to_resume(self.partial.folder.parent)
            log.warning("asked to end: %s holds what is done; %s", self.partial.folder, told)
            raise SystemExit(exit_status(self.asked.number))

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._write()
        trainer.strategy.barrier("predictions")

    def _write(self) -> None:
        self.written = time.monotonic()
        if self.parts:
            whole = _joined(self.parts)
            # NaN ends the test with an error; what had it is to be tested again.
            sound: NDArray[np.bool_] = np.isfinite(whole.logits).all((1, 2))  # type: ignore[assignment]
            if sound.any():
                whole.only(sound).save(self.partial.new_piece(".npz"))
            self.parts.clear()


def _joined(parts: list[Predictions]) -> Predictions:
    names = ("logits", "label", "video", "valid")
    return Predictions(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def _each_once(parts: list[Predictions]) -> list[Predictions]:
    """Predictions without videos that an earlier part has: a few may be tested again when a test goes on."""
    seen: set[int] = set()
    kept: list[Predictions] = []
    for part in parts:
        new = np.array([video not in seen for video in part.video.tolist()], bool)
        seen.update(part.video.tolist())
        kept.append(part.only(new))
    return kept


def run_test(
    trainer: pl.Trainer, module: ClassificationModule, data: VideoDataModule, folder: str | Path, model: str = ""
) -> Predictions | None:
    """Test a model and keep `predictions.npz`, `per_class.csv` and `confusion.csv` in a folder that all processes share.

    A test that was ended goes on with the videos that are left.

    Args:
        trainer: runs it.
        module: the model.
        data: its test videos.
        folder: of the outcome.
        model: what tells the weights from others; empty tests all videos anew.

    Returns:
        The predictions on the first process, None on the others.
    """
    folder = Path(folder)
    # A share of 1.0 is all; the integer 1, equal to it, is one batch.
    limited = isinstance(trainer.limit_test_batches, int) or trainer.limit_test_batches != 1.0
    asked = question(model, data.test_question() if model else "", trainer.precision, trainer.limit_test_batches)
    partial = PartialResults(folder / "partial", asked)
    if trainer.is_global_zero:
        if limited or not model:
            partial.clear()
        partial.open()
    trainer.strategy.barrier("partial results")
    done = set[int]().union(*(Predictions.load(piece).video.tolist() for piece in partial.pieces(".npz")))
    data.tested_before = done
    if done and trainer.is_global_zero:
        log.info("%d of %d videos were tested before; the test goes on", len(done), len(data.tested))
    module.model.slots.forget_seen()
    with listening() as ending:
        collect = _Collect(partial, ending)
        trainer.callbacks.append(collect)  # type: ignore[attr-defined]
        try:
            if len(done) < len(data.tested):
                with prepacked_weights():
                    trainer.test(module, data, verbose=False)
        finally:
            trainer.callbacks.remove(collect)  # type: ignore[attr-defined]
            data.tested_before = set()
            if trainer.is_global_zero and not partial.pieces(".npz"):
                partial.clear()
    if not trainer.is_global_zero:
        return None
    parts = _each_once([Predictions.load(piece) for piece in partial.pieces(".npz")])
    whole = Predictions.merged(parts, None if limited else len(data.tested))
    whole.save(folder / FILE)
    write_tables(whole, data.classes, folder)
    partial.clear()
    return whole
