"""A dry run under DDP without a GPU, which counts its collectives a step. Lightning starts its other processes."""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader

from stts_lightning import assembly, console
from stts_lightning.configuration import conf_dir
from stts_lightning.data.dataset import Batch

SMALL = ["backbone=mvit_tiny", "backbone.frames=4", "backbone.size=32", "+backbone.depth=3", "selection=t0_0.5"]


class Collectives(pl.Callback):
    """Counts what is sent from the start of a batch to the start of the next."""

    def __init__(self) -> None:
        self.counts: list[dict[str, int]] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx:
            self._end()
        self.profile = profile(activities=[ProfilerActivity.CPU], acc_events=True)
        self.profile.start()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._end()

    def _end(self) -> None:
        self.profile.stop()
        names = [event.key for event in self.profile.events() or () if event.key.startswith("gloo:")]
        self.counts.append(dict(Counter(name.removeprefix("gloo:") for name in names)))


def batches(rank: int, count: int) -> DataLoader[Batch]:
    def batch(number: int) -> Batch:
        seed = 1000 * rank + 2 * number
        clip = torch.randint(0, 256, (2, 1, 3, 4, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
        return Batch(clip, torch.tensor([0, 1]), torch.arange(2), torch.ones(2, dtype=torch.bool), (), (seed, seed + 1))

    return DataLoader([batch(number) for number in range(count)], batch_size=None)  # type: ignore[arg-type]


def main(out: str, steps: str, *overrides: str) -> None:
    """Train so many batches with a configuration; leave counts and weights in files of each process."""
    torch.set_num_threads(1)
    console.quiet()
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        cfg = compose("train", [*SMALL, "trainer=ddp", "trainer.accelerator=cpu", "trainer.precision=32-true", *overrides])
    OmegaConf.set_struct(cfg, False)
    cfg.run_dir, cfg.callbacks.panels, cfg.callbacks.best = out, None, None
    cfg.logger = {"csv": {"_target_": "lightning.pytorch.loggers.CSVLogger", "save_dir": out}}
    cfg.trainer.update({"max_epochs": 1, "limit_val_batches": 0})
    pl.seed_everything(0, verbose=False)
    trainer = assembly.build_trainer(cfg)
    module = assembly.build_module(cfg, assembly.build_model(cfg, 4))
    counted = Collectives()
    trainer.callbacks.append(counted)  # type: ignore[attr-defined]
    trainer.fit(module, batches(trainer.global_rank, int(steps)))
    weights = {name: value.detach() for name, value in module.model.state_dict().items()}
    torch.save(weights, Path(out) / f"weights_{trainer.global_rank}.pt")
    (Path(out) / f"counts_{trainer.global_rank}.json").write_text(json.dumps(counted.counts))


if __name__ == "__main__":
    main(*sys.argv[1:])
