"""Commands in processes that need not import torch first: forked off one that has, once for all tests of a worker."""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from subprocess import CompletedProcess

import torch

LONGEST = 900.0
"""Seconds after which a command is taken to hang. Generous: on a busy machine a short run takes minutes."""
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["stts_lightning.assembly", "stts_lightning.training.panels", "torchvision.transforms.v2"])


def _run(module: str, arguments: list[str], folder: str, environment: dict[str, str], out: str, err: str) -> None:
    for stream, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    # torch asked for it when it was imported, in the process that this one is forked off.
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", "1")))
    sys.argv = [module, *arguments]
    # Workers of a DataLoader are processes of this one, which multiprocessing forbids to its daemons.
    multiprocessing.set_start_method("fork", force=True)
    if module.endswith(".py"):
        sys.path.insert(0, str(Path(module).parent))
        runpy.run_path(module, run_name="__main__")
    else:
        runpy.run_module(module, run_name="__main__", alter_sys=True)


def run_command(
    command: Sequence[str], folder: Path, environment: dict[str, str], timeout: float = LONGEST
) -> CompletedProcess[str]:
    """What a command gives, run in a folder. One that hangs is ended with all the processes that it started."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True, **pipes) as process:  # type: ignore[call-overload]
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired as error:
            os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
            raise TimeoutError(f"{' '.join(command)}: {out}{err}") from error
    return CompletedProcess(command, process.returncode, out, err)


def python_m(
    module: str, arguments: list[str], folder: Path, environment: dict[str, str], timeout: float = LONGEST
) -> CompletedProcess[str]:
    """What `python -m module arguments` gives, or `python script.py arguments`, run in a folder."""
    with tempfile.TemporaryDirectory() as place:
        out, err = (Path(place) / name for name in ("out", "err"))
        process = PROCESSES.Process(target=_run, args=(module, arguments, str(folder), environment, str(out), str(err)))
        process.start()
        process.join(timeout)
        if process.is_alive():
            os.killpg(process.pid or 0, signal.SIGKILL)
            raise TimeoutError(f"{module} {arguments}: {out.read_text()}{err.read_text()}")
        code = process.exitcode or 0
        return CompletedProcess([module, *arguments], code, out.read_text(), err.read_text())
