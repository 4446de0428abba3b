"""A training that starves says so, once and with numbers; one that does not says nothing."""

import logging
import time

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from stts_lightning.data.dataset import Batch
from stts_lightning.training.loading import LoadingWatch


class Slow(Dataset[Batch]):
    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __len__(self) -> int:
        return 40

    def __getitem__(self, item: int) -> Batch:
        time.sleep(self.seconds)
        number = torch.zeros(2, dtype=torch.int64)
        return Batch(torch.zeros(2, 1, 3, 1, 4, 4, dtype=torch.uint8), number, number, number.bool(), ())


class Step(pl.LightningModule):
    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        time.sleep(self.seconds)
        return self.weight * batch.clip.float().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def said(loading: float, step: float, caplog: pytest.LogCaptureFixture) -> list[str]:
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[LoadingWatch(steps=10)],
    )  # fmt: skip
    with caplog.at_level(logging.WARNING, "stts_lightning"):
        trainer.fit(Step(step), DataLoader(Slow(loading), batch_size=None))
    return [record.getMessage() for record in caplog.records if "waits" in record.getMessage()]


def test_a_training_that_starves_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    (line,) = said(0.04, 0.02, caplog)
    share = int(line.split("waits ")[1].split("%")[0])
    assert 55 <= share <= 80
    assert "loader.num_workers=" in line and "prepare_data task=encode" in line


def test_a_training_that_does_not_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    # On a busy machine even a batch of zeros takes some milliseconds.
    assert not said(0.0, 0.1, caplog)
