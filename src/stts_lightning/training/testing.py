"""The test: logits of every view of every video, each exactly once whatever the number of processes, kept on disk."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np

from stts_lightning.analysis.evaluation import FILE, Predictions, write_tables
from stts_lightning.data.datamodule import VideoDataModule
from stts_lightning.data.dataset import Batch
from stts_lightning.kernels import prepacked_weights
from stts_lightning.training.module import ClassificationModule


class _Collect(pl.Callback):
    """Keeps a process's share of the predictions and leaves it in a file of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.parts: list[Predictions] = []

    def file(self, rank: int) -> Path:
        return self.folder / f"predictions_of_rank_{rank}.npz"

    def on_test_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        values = (outputs, batch.label, batch.video, batch.valid)
        self.parts.append(Predictions(*(value.cpu().numpy() for value in values)))

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        names = ("logits", "label", "video", "valid")
        joined = Predictions(*(np.concatenate([getattr(part, name) for part in self.parts]) for name in names))
        joined.save(self.file(trainer.global_rank))
        self.parts.clear()
        trainer.strategy.barrier("predictions")


def run_test(trainer: pl.Trainer, module: ClassificationModule, data: VideoDataModule, folder: str | Path) -> Predictions | None:
    """Test a model and keep `predictions.npz`, `per_class.csv` and `confusion.csv` in a folder that all processes share.

    Returns:
        The predictions on the first process, None on the others.
    """
    collect = _Collect(Path(folder))
    collect.folder.mkdir(parents=True, exist_ok=True)
    trainer.callbacks.append(collect)  # type: ignore[attr-defined]
    try:
        with prepacked_weights():
            trainer.test(module, data, verbose=False)
    finally:
        trainer.callbacks.remove(collect)  # type: ignore[attr-defined]
    if not trainer.is_global_zero:
        return None
    files = [collect.file(rank) for rank in range(trainer.world_size)]
    # A share of 1.0 is all; the integer 1, equal to it, is one batch.
    limited = isinstance(trainer.limit_test_batches, int) or trainer.limit_test_batches != 1.0
    whole = Predictions.merged([Predictions.load(file) for file in files], None if limited else len(data.tested))
    whole.save(collect.folder / FILE)
    write_tables(whole, data.classes, collect.folder)
    for file in files:
        file.unlink()
    return whole
