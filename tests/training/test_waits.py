"""What a step reads from its device: on `meta`, where nothing can be read, each read is counted and answered with a number."""

import importlib
from collections import Counter
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader

from stts_lightning import create_model
from stts_lightning.data.dataset import Batch
from stts_lightning.training import module as training_module
from stts_lightning.training import panels, step_figures
from stts_lightning.training.callbacks import FailureLog, SigmaAnnealing
from stts_lightning.training.module import ClassificationModule
from stts_lightning.training.optim import OptimSpec, build_optimizer
from stts_lightning.training.panels import SelectionPanels
from stts_lightning.training.preemption import LastCheckpoint
from stts_lightning.training.progress import Bar, ProgressLines

BATCHES, EVERY = 6, 3
READS = ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "cpu", "numpy")


class Reads(TorchFunctionMode):
    """Answers what would read a tensor of the device; anything else that waits is an error on `meta`."""

    def __init__(self) -> None:
        super().__init__()
        self.now: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in READS and isinstance(args[0], Tensor) and args[0].is_meta:
            self.now[name] += 1
            zeros = torch.zeros(args[0].shape, dtype=args[0].dtype)
            return zeros if name == "cpu" else getattr(zeros, name)()
        if name == "to" and args[0].is_meta and torch.device("cpu") in args:
            self.now[name] += 1
            return torch.zeros(args[0].shape, dtype=args[0].dtype)
        return func(*args, **(kwargs or {}))


class Watch(pl.Callback):
    """Counts from the start of a batch to the start of the next: what Lightning does between them, too."""

    def __init__(self, reads: Reads) -> None:
        self.reads, self.training, self.validation = reads, [], []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx:
            self.training.append(dict(self.reads.now))
        self.reads.now.clear()

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx:
            self.validation.append(dict(self.reads.now))
        self.reads.now.clear()


def batches() -> DataLoader[Batch]:
    def batch(seed: int) -> Batch:
        clip = torch.zeros(2, 1, 3, 4, 32, 32, dtype=torch.uint8)
        return Batch(clip, torch.tensor([0, 1]), torch.arange(2), torch.ones(2, dtype=torch.bool), (), (seed, seed + 1))

    return DataLoader([batch(2 * number) for number in range(BATCHES)], batch_size=None)  # type: ignore[arg-type]


class ReadsLater(step_figures.HostCopy):
    """A copy on its way from `meta`, as from a GPU."""

    def __init__(self, tensor: Tensor) -> None:
        self.late, self.zeros = True, torch.zeros(tensor.shape, dtype=tensor.dtype)

    def read(self) -> Tensor:
        return self.zeros


def fused_on_meta(*args: Any, **_: Any) -> Any:
    optimizer, schedule = build_optimizer(*args, fused=False)
    for settings in (optimizer.defaults, *optimizer.param_groups):
        settings["fused"] = True
    return optimizer, schedule


def fit(folder: Path, device: str, bar: bool, *more: pl.Callback, **options: Any) -> Watch:
    model = create_model("mvit_tiny", "t0_0.5", 6, frames=4, size=32, depth=3, dropout=0.1)
    module = ClassificationModule(model, OptimSpec(lr=1e-2, weight_decay=0.05, epochs=1), 6)
    reads = Reads()
    watch = Watch(reads)
    used = [SigmaAnnealing(0.5), LastCheckpoint(str(folder)), FailureLog(), pl.callbacks.LearningRateMonitor("step")]
    used += [SelectionPanels(str(folder)), Bar() if bar else ProgressLines(), watch, *more]
    if device == "meta":
        options["strategy"] = SingleDeviceStrategy(torch.device("meta"))
    trainer = pl.Trainer(
        accelerator="gpu" if device == "cuda" else "cpu", devices=1, max_epochs=1, callbacks=used,
        logger=CSVLogger(folder), num_sanity_val_steps=0, enable_model_summary=False, **{"log_every_n_steps": EVERY, **options},
    )  # fmt: skip
    with reads:
        trainer.fit(module, batches(), batches())
    return watch


@pytest.mark.parametrize("bar", [False, True])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_step_waits_for_nothing_but_to_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clip: float | None, bar: bool
) -> None:
    monkeypatch.setattr(training_module, "HostCopy", ReadsLater)
    monkeypatch.setattr(training_module.ClassificationModule, "_check_weights", lambda self: self.look(wait=True))
    monkeypatch.setattr(panels, "HostCopy", ReadsLater)
    monkeypatch.setattr(SelectionPanels, "_look", lambda *_: {})
    monkeypatch.setattr(LastCheckpoint, "_save", lambda *_: None)
    monkeypatch.setattr(CPUAccelerator, "setup_device", lambda *_: None)
    # The fused AdamW knows shapes on `meta`, but refuses to be built for it.
    monkeypatch.setattr(
        importlib.import_module("torch.optim.optimizer"), "_get_fused_kernels_supported_devices", lambda: ["meta"]
    )
    monkeypatch.setattr(training_module, "build_optimizer", fused_on_meta)
    watch = fit(tmp_path, "meta", bar, gradient_clip_val=clip)
    counts = [sum(reads.values()) for reads in watch.training]
    assert len(counts) == BATCHES - 1
    for number, count in enumerate(counts, 1):
        # Loss, accuracy and sigma.
        assert count == (3 if number % EVERY == 0 else 0), f"step {number}: {watch.training[number - 1]}"
    assert watch.validation == [{}] * (BATCHES - 1)


class RefusesWaits(pl.Callback):
    """torch itself raises at any wait, from the third batch to the last."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if pl_module.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error" if 2 <= batch_idx < BATCHES - 1 else "default")


@pytest.mark.parametrize("device", [
    # That all else of this test runs: on a CPU nothing waits.
    "cpu",
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]),
])  # fmt: skip
def test_torch_finds_no_wait_between_two_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setattr(SelectionPanels, "_look", lambda *_: {})
    options: dict[str, Any] = {"log_every_n_steps": 100, "gradient_clip_val": 1.0, "precision": "bf16-mixed"}
    try:
        watch = fit(tmp_path, device, False, RefusesWaits(), **options)
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert len(watch.training) == BATCHES - 1
