"""Loggers that need a decision at run time."""

import netrc
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import WandbLogger

from stts_lightning.analysis.results import tested_hash


def wandb_logger(run_dir: str, project: str, tags: Sequence[str | None] = (), **kwargs: Any) -> WandbLogger:
    """A W&B logger that never waits for a login: online with a key, offline into the run folder without.

    The run's id is kept in `wandb_id.txt` of the run folder, so that a resumed run continues the same one.
    """
    folder = Path(run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / "wandb_id.txt"
    offline = os.environ.get("WANDB_MODE") in ("offline", "disabled") or not _has_key()
    logger = WandbLogger(
        project=project,
        save_dir=run_dir,
        offline=offline,
        id=kept.read_text().strip() if kept.is_file() else None,
        resume=None if offline else "allow",
        tags=[tag for tag in tags if tag],  # A run without an experiment has no name of one.
        **kwargs,
    )
    if (run_id := logger.version) is not None or (run_id := getattr(logger.experiment, "id", None)):
        kept.write_text(str(run_id))
    return logger


SUMMARY = ("top1", "top5", "gflops", "gflops_per_view", "tokens_kept", "sigma", "parameters", "clips_per_second")
"""Figures of a whole run under the names that dashboards rely on; `sigma` is the first value, not the last."""


def log_config(trainer: pl.Trainer, config: Mapping[str, Any]) -> None:
    """Give W&B the resolved configuration of the run."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger) and trainer.is_global_zero:
            logger.experiment.config.update(dict(config), allow_val_change=True)


def log_summary(trainer: pl.Trainer, result: Mapping[str, Any]) -> None:
    """Put what `SUMMARY` names of a result where W&B's scatter panels look for it: the run's summary."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            values = {name: result[name] for name in SUMMARY if name in result}
            logger.experiment.summary.update({**values, "val_hash": tested_hash(result["dataset"])})


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False
