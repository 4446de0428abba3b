"""Sweeps: each job of `train -m ...` is a process of its own, so that none inherits another's process group, memory or ports.

Hydra calls the task function once a job, in one process. The function starts the training command for that job's overrides
and waits (`run_job`). What is finished is not run again, what broke off goes on from its last checkpoint, what fails is
named while the rest goes on; `SweepEnd` writes the report. Light: torch is imported by the jobs.
"""

import ctypes
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from filelock import FileLock, Timeout
from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from stts_lightning.errors import UserError
from stts_lightning.overrides import for_hydra
from stts_lightning.run_folders import CONSOLE, EXIT_INTERRUPTED, EXIT_REQUEUE, JOB, LAST, RESULT, lock, note_owner, overrides_of

log = logging.getLogger(__name__)

PARENT = "STTS_SWEEP_PROCESS"
_GRACE = 60.0
# Of a launcher or a former process group; a job that inherits them joins the wrong one.
INHERITED = re.compile(
    r"(LOCAL_RANK|NODE_RANK|GROUP_RANK|RANK|WORLD_SIZE|MASTER_\w+|TORCHELASTIC_\w+|PL_GLOBAL_SEED|STTS_CAN_RESUME"
    r"|SLURM_NTASKS\w*|SLURM_PROCID|SLURM_LOCALID|SLURM_NODEID)"
)


class JobFailed(RuntimeError):
    """A job that ended without a result: names it and the place of its output."""


def is_job_of_sweep() -> bool:
    """Whether this process is to start a process for the job, rather than to run it.

    Under a cluster's launcher with several tasks a job they are that job's processes already. A job never starts jobs.
    """
    alone = int(os.environ.get("SLURM_NTASKS", "1")) == 1 and PARENT not in os.environ
    return HydraConfig.get().mode == RunMode.MULTIRUN and alone


def follow_parent() -> None:
    """In a job's process: end when the sweep's process ends, however it does. On Linux; elsewhere it stays."""
    parent = os.environ.pop(PARENT, None)
    if parent and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        if os.getppid() != int(parent):
            raise SystemExit("the sweep that started this job is gone")


def run_job(objectives: list[str] | None) -> Any:
    """Run the present job of a sweep in a process of its own, unless it has its result.

    Args:
        objectives: keys of `result.json` that a sweeper optimises; None is top-1 alone, as a single number.

    Returns:
        The objective or objectives; not a number where the job failed, so that a plain sweep goes on.

    Raises:
        JobFailed: instead, where a sweeper that learns from results must be told of failures.
        SystemExit: if the folder holds another job.
    """
    hc = HydraConfig.get()
    folder = Path(hc.runtime.output_dir)
    overrides = for_hydra(list(hc.overrides.task))  # As the job's own command line will have them: a sweeper's lack the marks.
    name = f"job {hc.job.num} ({folder.name})"
    _claim(folder, overrides)
    if not (folder / RESULT).is_file():
        _run(hc, folder, overrides, name)
    else:
        log.info("%s: has its result already", name)
    if not (folder / RESULT).is_file():
        message = f"{name} failed: {_last_line(folder / CONSOLE)} (all of its output: {folder / CONSOLE})"
        if "optuna" in str(hc.sweeper.get("_target_", "")):
            raise JobFailed(message)
        log.error("%s", message)
        return float("nan")
    result = json.loads((folder / RESULT).read_text())
    if objectives:
        return [float(result[key]) for key in objectives]
    return result.get("top1")


def _claim(folder: Path, overrides: list[str]) -> None:
    """Note whose folder it is; refuse one of another job, whose result would be taken for this one's."""
    if (before := overrides_of(folder)) not in (None, overrides):
        print(
            f"error: {folder} holds a job of other overrides ({' '.join(before or [])}); these are {' '.join(overrides)}; "
            "give another hydra.sweep.dir",
            file=sys.stderr,
        )
        raise SystemExit(2)
    folder.mkdir(parents=True, exist_ok=True)
    if before is None:  # Else it is noted, with what the job was resumed with since.
        note_owner(folder, overrides)


def _command(hc: HydraConf, folder: Path, overrides: list[str]) -> list[str]:
    own = [f"hydra.run.dir='{folder}'", "hydra.output_subdir=null", "hydra.mode=RUN"]
    for source in hc.runtime.config_sources:
        if source.provider == "command-line":
            own += ["--config-dir", source.path]
    if hc.job.config_name != "train":
        own += ["--config-name", str(hc.job.config_name)]
    # It goes on by itself where its folder holds a checkpoint.
    return [sys.executable, "-m", "stts_lightning.train", *overrides, *own]


def _run(hc: HydraConf, folder: Path, overrides: list[str], name: str) -> None:
    sweep = Path(hc.sweep.dir).resolve()
    environment = {key: value for key, value in os.environ.items() if not INHERITED.fullmatch(key)}
    environment |= {"WANDB_RUN_GROUP": sweep.name, PARENT: str(os.getpid())}
    command = _command(hc, folder, overrides)
    start = time.monotonic()
    with _devices(hc, sweep) as chosen, (folder / CONSOLE).open("a") as output:
        how = "goes on" if (folder / LAST).is_file() else "starts"
        log.info("%s: %s; output in %s", name, how, folder / CONSOLE)
        with _ends_with_this(
            subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env={**environment, **chosen}, start_new_session=True
            )
        ) as process:
            code = process.wait()
    result = json.loads((folder / RESULT).read_text()) if (folder / RESULT).is_file() else {}
    top1 = f"top-1 {result['top1']:.2%}, " if "top1" in result else ""
    log.info("%s: %sexit status %d after %.0f s", name, top1, code, time.monotonic() - start)


@contextmanager
def _ends_with_this(process: "subprocess.Popen[bytes]") -> Iterator["subprocess.Popen[bytes]"]:
    """Leave no process of the job behind, whatever ends this one; pass on what a scheduler says."""

    def passed_on(number: int, frame: FrameType | None) -> None:
        process.send_signal(number)
        former = before[signal.Signals(number)]
        if callable(former):  # submitit's requeues; the job has until the scheduler's last signal to save.
            with suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE)
            former(number, frame)

    def ended(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    handlers = {signal.SIGUSR1: passed_on, signal.SIGUSR2: passed_on, signal.SIGTERM: ended}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield process
    except SystemExit:
        # The job may save where it is; then this sweep, too, is one that goes on.
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            if process.wait(_GRACE) == EXIT_REQUEUE:
                raise SystemExit(EXIT_REQUEUE) from None
        raise
    except KeyboardInterrupt:
        log.warning("interrupted: the job saves where it is; the same command goes on")
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
            process.wait(_GRACE)
        raise SystemExit(EXIT_INTERRUPTED) from None
    finally:
        for number, seconds in ((signal.SIGTERM, 30), (signal.SIGKILL, 5)):
            try:
                os.killpg(process.pid, number if process.poll() is None else signal.SIGKILL)
                process.wait(seconds)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _devices(hc: HydraConf, sweep: Path) -> Iterator[dict[str, str]]:
    """Environment with a share of the machine's devices for one of several jobs at a time; empty where jobs run one by one."""
    jobs = int(hc.launcher.get("n_jobs", 1) or 1)
    if jobs == 1:
        yield {}
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    jobs = cores if jobs < 0 else jobs
    shared = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(cores // jobs, 1)))}
    import torch  # For its count of devices alone.

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]
    each = len(gpus) // jobs
    if each == 0:
        yield shared
        return
    (sweep / ".devices").mkdir(exist_ok=True)
    while True:
        for number in range(len(gpus) // each):
            lock = FileLock(sweep / ".devices" / f"{number}.lock")
            try:
                with lock.acquire(timeout=0):
                    yield {**shared, "CUDA_VISIBLE_DEVICES": ",".join(gpus[number * each : (number + 1) * each])}
                    return
            except Timeout:
                continue
        time.sleep(1)


def _last_line(file: Path) -> str:
    """The last line that was written, of the end of a file that may be long."""
    if not file.is_file():
        return "no output"
    with file.open("rb") as content:
        content.seek(max(file.stat().st_size - 4096, 0))
        text = content.read().decode(errors="replace")
    # Hydra ends with a hint.
    lines = [line.strip() for line in text.splitlines() if line.strip() and "HYDRA_FULL_ERROR" not in line]
    return lines[-1] if lines else "no output"


class SweepEnd(Callback):
    """Hydra callback: locks a sweep's folder, and at its end writes `report.html` and names failed jobs; exit status 1 if any."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Keep the folder to this sweep. Two commands that start the same sweep would start each job twice."""
        try:
            lock(Path(config.hydra.sweep.dir))
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from error

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Write the report of all jobs of the folder."""
        from stts_lightning.analysis.page import write_report
        from stts_lightning.analysis.runs import find_runs, left_out

        sweep = Path(config.hydra.sweep.dir)
        jobs = sorted(file.parent for file in sweep.glob(f"*/{JOB}"))
        failed = [job for job in jobs if not (job / RESULT).is_file()]
        lines = [f"{job.name}: {_last_line(job / CONSOLE)}" for job in failed]
        broken = [line for line in left_out([sweep]) if not any(line.startswith(f"{job}:") for job in failed)]
        if runs := find_runs([sweep]):
            page = write_report(runs, sweep, [*lines, *broken])
            log.info("%d of %d jobs have a result; %s", len(jobs) - len(failed), len(jobs), page)
        for line in [*lines, *broken]:
            log.error("failed: %s", line)
        if failed:
            log.error("the same command again repeats these alone")
            raise SystemExit(1)
