"""Whose run a folder is, whether it can go on, and what a run's folder is called. Light: nothing here imports torch."""

import hashlib
import json
import os
import re
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from omegaconf import OmegaConf

JOB, RESULT, CONFIG, LAST = "job.json", "result.json", "config.yaml", "checkpoints/last.ckpt"
_DECISION = "STTS_CAN_RESUME"


def folder_name(text: str, longest: int = 120) -> str:
    """A text as the name of one folder: no slashes, and not too long for a file system."""
    name = re.sub(r"[^\w.,=+-]+", "_", text) or "job"
    return name if len(name) <= longest else f"{name[:longest]}_{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def run_stamp() -> str:
    """What tells a run's folder from others: the time, where one process starts it once.

    Under a launcher of several processes, or a scheduler that may start it again: what all of them and all starts share.
    """
    array, job = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_JOB_ID")
    if array:
        return f"slurm_{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    if job:
        return f"slurm_{job}"
    if "TORCHELASTIC_RUN_ID" in os.environ or "RANK" in os.environ:
        return f"run_{hashlib.sha256(' '.join(sys.argv[1:]).encode()).hexdigest()[:8]}"
    return f"{datetime.now():%Y-%m-%d_%H-%M-%S}"


OmegaConf.register_new_resolver("folder_name", folder_name, replace=True)
OmegaConf.register_new_resolver("run_stamp", run_stamp, replace=True)


def overrides_of(folder: Path) -> list[str] | None:
    """Of the run that a folder belongs to; None if it is nobody's."""
    file = folder / JOB
    return json.loads(file.read_text())["overrides"] if file.is_file() else None


def claim(folder: Path, overrides: Sequence[str]) -> None:
    """Note that a folder belongs to the run of these overrides. Of several processes the first one writes."""
    if any(os.environ.get(rank, "0") != "0" for rank in ("SLURM_PROCID", "RANK", "LOCAL_RANK")):
        return
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f".{JOB}.{os.getpid()}"
    part.write_text(json.dumps({"overrides": list(overrides)}, indent=1) + "\n")
    part.replace(folder / JOB)


def can_resume(folder: Path, overrides: Sequence[str]) -> bool:
    """Whether a folder holds an unfinished run of the same overrides, with a checkpoint.

    The first process decides, and those that it starts follow: by then it may have begun to write.
    """
    if (said := os.environ.get(_DECISION)) is not None:
        return said == str(folder)
    resumable = overrides_of(folder) == list(overrides) and not (folder / RESULT).is_file()
    resumable = resumable and all((folder / name).is_file() for name in (CONFIG, LAST))
    os.environ[_DECISION] = str(folder) if resumable else ""
    return resumable


def let_lightning_launch() -> None:
    """Let Lightning start the processes of all devices where a scheduler started one alone, instead of waiting for others."""
    if os.environ.get("SLURM_NTASKS") == "1":
        for name in ("SLURM_NTASKS", "SLURM_NTASKS_PER_NODE", "SLURM_TASKS_PER_NODE"):
            os.environ.pop(name, None)
