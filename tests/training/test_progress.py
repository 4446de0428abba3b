"""Lines of a log, and their clock."""

import logging
import re
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import RichProgressBar
from torch.utils.data import DataLoader

from stts_lightning import create_model, progress
from stts_lightning.data.dataset import Batch
from stts_lightning.training import progress as training
from stts_lightning.training.module import ClassificationModule
from stts_lightning.training.optim import OptimSpec
from stts_lightning.training.progress import ProgressLines


class Clock:
    """A clock that goes on by half a minute whenever it is read."""

    def __init__(self, step: float) -> None:
        self.now, self.step = 0.0, step

    def monotonic(self) -> float:
        self.now += self.step
        return self.now


def trained(lines: ProgressLines, caplog: pytest.LogCaptureFixture, **options: Any) -> list[str]:
    torch.manual_seed(0)
    model = create_model("mvit_tiny", None, 4, frames=4, size=32)
    module = ClassificationModule(model, OptimSpec(lr=1e-3, weight_decay=0.0, epochs=2), 4)

    def batch(seed: int) -> Batch:
        clip = torch.randint(0, 256, (2, 1, 3, 4, 32, 32), dtype=torch.uint8)
        return Batch(clip, torch.tensor([0, 1]), torch.arange(2), torch.ones(2, dtype=torch.bool), (), (seed, seed + 1))

    loader: Any = DataLoader([batch(2 * number) for number in range(4)], batch_size=None)  # type: ignore[arg-type]
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_epochs=2, logger=False, enable_checkpointing=False, callbacks=[lines], **options
    )
    with caplog.at_level(logging.INFO, logger=training.__name__):
        trainer.fit(module, loader, loader)
        trainer.test(module, loader, verbose=False)
    return [record.getMessage() for record in caplog.records if record.name == training.__name__]


def test_a_line_an_epoch(caplog: pytest.LogCaptureFixture) -> None:
    lines = trained(ProgressLines(), caplog, num_sanity_val_steps=0)
    assert [line.split(":")[0] for line in lines] == ["epoch 1 of 2, step 4 of 8", "epoch 2 of 2, step 8 of 8"]
    for line in lines:
        accuracies = r"val/top1 [\d.]+%, val/loss [\d.]+, val/mean_class_accuracy [\d.]+%"
        assert re.search(rf": loss [\d.]+, {accuracies}, lr [-+\d.e]+, [\d.]+ clips/s, 0:00:\d\d left$", line), line


def test_lines_within_an_epoch_a_validation_and_a_test(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock(step=60.0)
    for module in (progress, training):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=clock.monotonic))
    lines = trained(ProgressLines(every_minutes=4), caplog, num_sanity_val_steps=0)
    kinds = {line.split(",")[0].split(":")[0] for line in lines}
    assert kinds == {"epoch 1 of 2", "epoch 2 of 2", "validation", "test"}, lines
    within = [line for line in lines if line.startswith("epoch") and "val/top1" not in line]
    assert within and all("left" in line for line in within)
    assert re.search(r"test, batches: \d of 4, [\d.]+ a second, \d+:\d\d:\d\d left", "\n".join(lines))


def test_the_loss_is_that_of_clips_however_gradients_are_accumulated(caplog: pytest.LogCaptureFixture) -> None:
    lines = trained(ProgressLines(), caplog, num_sanity_val_steps=0, accumulate_grad_batches=4)
    (loss,) = re.findall(r"step 1 of 2: loss ([\d.]+),", lines[0])
    assert float(loss) > 0.7, "of four classes, before anything is learnt"


def test_an_epoch_without_a_validation_has_no_accuracy(caplog: pytest.LogCaptureFixture) -> None:
    lines = trained(ProgressLines(), caplog, num_sanity_val_steps=0, check_val_every_n_epoch=2)
    assert ["val/top1" in line for line in lines] == [False, True]


def test_only_the_first_process_speaks(caplog: pytest.LogCaptureFixture) -> None:
    lines = ProgressLines()
    lines.disable()
    assert trained(lines, caplog, num_sanity_val_steps=0) == []


def test_a_bar_in_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for terminal, kind in ((True, RichProgressBar), (False, ProgressLines)):
        monkeypatch.setattr(training, "in_terminal", lambda terminal=terminal: terminal)
        assert isinstance(training.progress(), kind)
    with pytest.raises(ValueError, match="callbacks.progress.every_minutes=0: must be above 0"):
        training.progress(0)


def test_counting_in_a_log_file(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock(step=15.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=clock.monotonic))
    monkeypatch.setattr(progress, "in_terminal", lambda: False)
    with progress.counting("files", 10, every_minutes=1) as one_more:
        for _ in range(10):
            one_more()
    lines = capsys.readouterr().out.splitlines()
    assert 2 <= len(lines) <= 6
    assert all(
        re.fullmatch(r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\] files: \d+ of 10, [\d.]+ a second, \d+:\d\d:\d\d left", line)
        for line in lines
    ), lines
    with progress.counting("files", 10, quiet=True, every_minutes=1) as one_more:
        one_more()
    assert not capsys.readouterr().out


def test_a_run_that_goes_on_within_an_epoch_has_its_lines() -> None:
    """Lightning calls no start of an epoch there."""
    lines = ProgressLines()
    lines.on_train_start(SimpleNamespace(global_step=4), SimpleNamespace())  # type: ignore[arg-type]
    batch = SimpleNamespace(clip=torch.zeros(2, 1))
    trainer = SimpleNamespace(accumulate_grad_batches=1, world_size=1, num_training_batches=9)
    lines.on_train_batch_end(trainer, None, {"loss": torch.tensor(1.0)}, batch, 4)  # type: ignore[arg-type]
    assert lines.steps == 1
