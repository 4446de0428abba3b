"""Every recipe, precision, kind of clipping and trainer option together: each takes real optimiser steps."""

import functools
from collections.abc import Iterator
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from hydra import compose, initialize_config_dir
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import DataLoader

from stts_lightning import assembly, console
from stts_lightning.configuration import conf_dir
from stts_lightning.data.dataset import Batch
from stts_lightning.run_config import ConfigError

RECIPES = sorted(file.stem for file in (Path(conf_dir()) / "recipe").glob("*.yaml"))
TRAINERS = sorted(file.stem for file in (Path(conf_dir()) / "trainer").glob("*.yaml"))
SMALL = [
    "backbone=mvit_tiny",
    "backbone.frames=4",
    "backbone.size=32",
    "+backbone.depth=3",
    "selection=t0_0.5",
    "selection.samples=8",
    "selection.sigma=1",
    "logger=none",
]
CLIPPING = {
    "none": {"gradient_clip_val": None},
    "norm": {"gradient_clip_val": 1.0},
    "value": {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"},
}
STEPS = 2
"""The first of a warm-up has no rate."""


@pytest.fixture(scope="module", autouse=True)
def composer() -> Iterator[None]:
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        yield
    rank_zero_only.rank = 0
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@functools.cache
def composed(recipe: str, trainer: str) -> DictConfig:
    return compose("train", [*SMALL, f"recipe={recipe}", f"trainer={trainer}"])


def batches(copies: int) -> DataLoader[Batch]:
    def batch(seed: int) -> Batch:
        clip = torch.randint(0, 256, (2, copies, 3, 4, 32, 32), dtype=torch.uint8)
        return Batch(clip, torch.tensor([0, 1]), torch.arange(2), torch.ones(2, dtype=torch.bool), (), (seed, seed + 1))

    return DataLoader([batch(seed) for seed in range(0, 2 * STEPS, 2)], batch_size=None)  # type: ignore[arg-type]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed", None])  # None: what the trainer option itself says.
@pytest.mark.parametrize("trainer", TRAINERS)
def test_each_combination_takes_real_steps(tmp_path: Path, trainer: str, precision: str | None) -> None:
    console.quiet()
    for recipe in RECIPES:
        for clipping in CLIPPING:
            cfg = composed(recipe, trainer).copy()
            OmegaConf.set_struct(cfg, False)
            cfg.run_dir = str(tmp_path)
            cfg.callbacks, cfg.trainer.accelerator, cfg.trainer.devices = {}, "cpu", 1
            cfg.trainer.update({"enable_checkpointing": False, "limit_val_batches": 1, **CLIPPING[clipping]})
            if precision:
                # Lightning takes float16 on a CPU for a mistake: it is put in behind its back.
                cfg.trainer.precision = "32-true" if precision == "16-mixed" else precision
            if recipe != "none":
                cfg.trainer.max_steps = STEPS
            with console.as_user_errors():
                built = assembly.build_trainer(cfg)
                if precision == "16-mixed":
                    built.strategy.precision_plugin = float16()
                module = assembly.build_module(cfg, assembly.build_model(cfg, 4))
            before = {name: value.detach().clone() for name, value in module.named_parameters()}
            steps(built, module, batches(cfg.clip.train_transform.copies))
            changed = {name for name, value in module.named_parameters() if not torch.equal(value, before[name])}
            told = f"{recipe}, {clipping}"
            if recipe == "none":
                assert not changed and not built.global_step, told
                continue
            assert built.global_step == STEPS, told
            assert any(".slots." in name for name in changed), told
            assert all(bool(value.isfinite().all()) for value in module.parameters()), told
            if recipe == "selectors_only":
                assert all(".slots." in name for name in changed), told


def float16() -> MixedPrecision:
    """Float16 with a scale of the loss that needs no first steps to be found."""
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=256.0))


def steps(trainer: pl.Trainer, module: pl.LightningModule, loader: DataLoader[Batch]) -> None:
    trainer.fit(module, loader, loader)  # Validated in that precision, too.


def test_fused_wherever_no_loss_is_scaled(tmp_path: Path) -> None:
    for precision, fused in (("32-true", True), ("bf16-mixed", True), ("16-mixed", False)):
        plain = "32-true" if precision == "16-mixed" else precision
        own = [f"trainer.precision={plain}", "trainer.accelerator=cpu", "trainer.devices=1", f"run_dir={tmp_path}"]
        cfg = compose("train", [*SMALL, *own, "+trainer.enable_checkpointing=false"])
        cfg.trainer.max_steps, cfg.callbacks = 1, {}
        trainer = assembly.build_trainer(cfg)
        if precision == "16-mixed":
            trainer.strategy.precision_plugin = float16()
        steps(trainer, assembly.build_module(cfg, assembly.build_model(cfg, 4)), batches(2))
        assert trainer.optimizers[0].defaults["fused"] is fused


def test_gpu_options_are_alike_and_a_machine_without_one_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name in ("gpu", "ddp"):
        cfg = compose("train", [f"trainer={name}"])
        assert (cfg.trainer.accelerator, cfg.trainer.precision, cfg.trainer.float32_matmul_precision) == (
            "gpu",
            "bf16-mixed",
            "high",
        )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="trainer.accelerator=gpu: torch .* finds no GPU on this machine; trainer=cpu"):
        assembly.build_trainer(compose("train", ["trainer=ddp", "run_dir=x"]))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match=r"trainer.devices=4: torch sees 2 GPU\(s\) here"):
        assembly.build_trainer(compose("train", ["trainer=ddp", "trainer.devices=4", "run_dir=x"]))


@pytest.mark.parametrize(("rank", "said"), [("", ""), ("0", "process 0 of 2 waits for the others"), ("1", "")])
def test_processes_that_somebody_else_starts_are_waited_for_aloud(
    rank: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank:
        monkeypatch.setenv("LOCAL_RANK", rank)
    two = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.precision=32-true", f"run_dir={tmp_path}"]
    assembly.build_trainer(compose("train", two))
    assert (said in caplog.text) and bool(said) == ("LOCAL_RANK is set" in caplog.text)
