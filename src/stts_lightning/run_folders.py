"""Whose run a folder is, whether it can resume, and what a run's folder is called. Light: nothing here imports torch."""

import getpass
import hashlib
import json
import logging
import os
import re
import shutil
import signal
import socket
import sys
import uuid
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import OmegaConf

from stts_lightning.errors import UserError
from stts_lightning.files import write_json

log = logging.getLogger(__name__)

JOB, RESULT, CONFIG, LAST = "job.json", "result.json", "config.yaml", "checkpoints/last.ckpt"
CLASSES = "classes.txt"
LOCK, OWNER = ".lock", ".owner.json"
TEST, SPLIT = "test", "split"
"""Folders, in a run's, of its test, and of the lists that `dataset.val_fraction` made."""
OUTPUTS = (RESULT, CONFIG, JOB, CLASSES, "checkpoints", "panels", TEST, SPLIT, "metrics.csv", "report.html")
"""What a run writes into its folder."""
CONSOLE = "console.log"
"""What a job of a sweep printed: it tells why the job was refused."""
EXIT_REQUEUE = os.EX_TEMPFAIL if hasattr(os, "EX_TEMPFAIL") else 75
"""Exit status of a command that was asked to end and can resume: what schedulers requeue on."""
EXIT_REFUSED = 2
"""Exit status of a command with an error that is the user's to fix."""
EXIT_INTERRUPTED = 130
"""Exit status of a command that Ctrl-C ended, as shells have it."""
_DECISION = "STTS_CAN_RESUME"
_LOCKS: dict[Path, FileLock] = {}
"""Held until the process ends, however it does."""


class RunError(UserError):
    """A run that has no such checkpoint, or a folder that is no run's: names what is there."""


class FolderInUseError(UserError):
    """A folder in which another process works: names both."""


def folder_name(text: str, longest: int = 120) -> str:
    """A text as the name of one folder: no slashes, and not too long for a file system."""
    text = re.sub(r"(^|,)\++", r"\1", text)  # How Hydra is told to add a key.
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
    # Many runs may start in the same second: of 50, two would share four digits in one case of 50.
    return f"{datetime.now():%Y-%m-%d_%H-%M-%S}_{uuid.uuid4().hex[:8]}"


OmegaConf.register_new_resolver("folder_name", folder_name, replace=True)
OmegaConf.register_new_resolver("run_stamp", run_stamp, replace=True, use_cache=True)


def is_first_process() -> bool:
    """Whether this process is the one of its run that owns the folder."""
    return all(os.environ.get(rank, "0") == "0" for rank in ("SLURM_PROCID", "RANK", "LOCAL_RANK"))


def run_checkpoint(run: str | Path, which: str) -> Path:
    """A checkpoint of a run: "last", or "best" by its validation. Raises RunError if it is not there."""
    run = Path(run)
    file = run / "checkpoints" / f"{which}.ckpt"
    if file.is_file():
        return file
    if run.is_file():
        raise RunError(f"run {run}: is a file; give the folder of a run, or checkpoint={run}")
    if there := sorted(one.stem for one in file.parent.glob("*.ckpt")):
        raise RunError(f"run {run}: has no checkpoint {which!r}; there is {' and '.join(there)}")
    if runs := sorted(str(one.parent.parent) for one in run.glob("*/checkpoints/*.ckpt")):
        raise RunError(f"run {run}: has no checkpoints; runs in it: {', '.join(dict.fromkeys(runs[:6]))}")
    raise RunError(f"run {run}: there is no {file}; give the folder of a run that wrote a checkpoint")


def run_classes(checkpoint: Path) -> tuple[str, ...] | None:
    """Names of the classes, by label, that lie beside a run's checkpoint; None for files of other places."""
    file = checkpoint.parent.parent / CLASSES
    return read_names(file) if checkpoint.parent.name == "checkpoints" and file.is_file() else None


def read_names(file: Path) -> tuple[str, ...]:
    """Names in a file, one a line."""
    return tuple(file.read_text(encoding="utf-8", errors="surrogateescape").splitlines())


def overrides_of(folder: Path) -> list[str] | None:
    """Of the run that a folder belongs to; None if it is nobody's."""
    return _job(folder).get("overrides")


def changes_of(folder: Path) -> list[str]:
    """Overrides with which a run was resumed since, in order."""
    return _job(folder).get("resumed_with", [])


def _job(folder: Path) -> dict[str, Any]:
    file = folder / JOB
    if not file.is_file():
        return {}
    try:
        return dict(json.loads(file.read_text()))
    except (ValueError, TypeError) as error:
        raise UserError(f"{file}: cannot be read ({error}); remove it, if the run is to begin anew") from error


def note_owner(folder: Path, overrides: Sequence[str], resumed_with: Sequence[str] = ()) -> None:
    """Note that a folder belongs to the run of these overrides. Of several processes the first one writes."""
    if is_first_process():
        write_json(folder / JOB, {"overrides": list(overrides), "resumed_with": list(resumed_with)})


def lock(folder: Path) -> None:
    """Keep a folder to this process, until it ends. Of several processes of a run the first one does it for all.

    Raises:
        FolderInUseError: if another process has it: names it.
    """
    if not is_first_process() or folder.resolve() in _LOCKS:
        return
    folder.mkdir(parents=True, exist_ok=True)
    held = FileLock(folder / LOCK)
    try:
        held.acquire(timeout=0)
    except Timeout as error:
        owner: dict[str, Any] = {}
        with suppress(OSError, ValueError):
            owner = json.loads((folder / OWNER).read_text())
        who = "process {process} of {user} on {host}, since {since}".format_map(owner) if owner else "another process"
        raise FolderInUseError(f"{folder}: in use by {who}; two runs cannot share a folder") from error
    except (OSError, NotImplementedError) as error:
        log.warning("%s cannot be locked (%s): do not start two runs in it", folder, error)
        return
    _LOCKS[folder.resolve()] = held
    since = f"{datetime.now():%Y-%m-%d %H:%M:%S}"
    write_json(folder / OWNER, {"process": os.getpid(), "user": _user(), "host": socket.gethostname(), "since": since})


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # No name for this number.
        return "an unknown user"


def claim(folder: Path, overrides: Sequence[str]) -> None:
    """Lock a folder for a new run of these overrides; what an earlier run left in it is moved into `earlier_<n>`.

    Raises:
        FolderInUseError: see `lock`.
    """
    if not is_first_process():
        return
    lock(folder)
    _set_aside(folder)
    note_owner(folder, overrides)


def _set_aside(folder: Path) -> None:
    """Move what a run left into a folder of its own: a new run would mix with it, and take its result for its own."""
    if not (folder / RESULT).is_file() and not (folder / LAST).is_file():
        return
    number = next(n for n in range(1, 10**6) if not (folder / f"earlier_{n}").exists())
    earlier = folder / f"earlier_{number}"
    earlier.mkdir()
    for path in [folder / name for name in OUTPUTS] + sorted(folder.glob("metrics_*.csv")):
        if path.exists():
            path.replace(earlier / path.name)
    log.warning("%s held another run; what it left is in %s", folder, earlier.name)


def exit_status(number: int) -> int:
    """Exit status of a command that a signal asked to end, and that can resume."""
    return EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_REQUEUE


def how_to_resume(folder: Path) -> str:
    """What to type to go on in a folder, whose command may have made it by the time of day."""
    run = folder.parent if folder.name == TEST else folder
    return f"resume={run} goes on" if (run / JOB).is_file() else f"the same command with hydra.run.dir={folder} goes on"


def remove_unused(folder: Path) -> None:
    """Remove the output folder of a command that was refused: one in which nothing lies but what every command writes first."""
    if not is_first_process() or not folder.is_dir() or folder.resolve() == Path.cwd():
        return
    written = list(folder.iterdir())
    if all(path.name in (".hydra", LOCK, OWNER, JOB) or (path.suffix == ".log" and path.name != CONSOLE) for path in written):
        with suppress(OSError):  # On Windows a log is open.
            for path in written:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            for place in (folder.resolve(), *folder.resolve().parents):
                if Path.cwd() not in place.parents:
                    break
                place.rmdir()  # Fails for one that holds anything else.


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
