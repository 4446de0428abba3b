"""Work on many video files in processes that may hang or die: decoders run native code, and some files keep it for ever."""

import multiprocessing
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from stts_lightning.data.decode import DecodeError, examine, probe
from stts_lightning.data.embed import Embedding
from stts_lightning.data.encode import Encoding
from stts_lightning.data.manifest import Entry
from stts_lightning.data.streams import is_transport_stream, why_not_decord

# A fresh interpreter: a fork of a process with threads may hold their locks.
PROCESSES = multiprocessing.get_context("spawn")
START_TIMEOUT = 300
"""Seconds that an interpreter may take to start: on a busy machine that is no fault of the first file."""


@dataclass(frozen=True)
class Task:
    """A file to be looked at, or to be written again and then looked at.

    Attributes:
        path: the file, or a folder of pictures.
        target: where it is written again; None only looks at it.
        how: how it is written.
    """

    path: Path
    target: Path | None = None
    how: Encoding | Embedding | None = None


def _serve(connection: Connection) -> None:
    """What a process does: a task in, its findings out piece by piece, so that what was found before a hang is not lost."""
    connection.send(("ready", None))
    while (task := connection.recv()) is not None:
        for name, value in _findings(task):
            connection.send((name, value))
        connection.send(("done", None))


def _findings(task: Task) -> Iterator[tuple[str, Any]]:
    path, warning = task.path, ""
    if not path.exists():
        yield "status", "missing"
        return
    if task.target is not None and task.how is not None:
        try:
            warning = task.how.write(path, task.target)
        except DecodeError as error:
            yield "warning", str(error)
            yield "status", "broken"
            return
        path = task.target
    contents = examine(path)
    yield "contents", contents._replace(samples={})
    yield "warning", "; ".join(text for text in (warning, contents.warning) if text)
    if not contents.frames:
        yield "status", "broken"
        return
    # From here on it is known to decode: what follows tells by which decoder.
    yield "decoder", "pyav"
    yield "status", "ok"
    if path.is_dir():
        return
    reason = why_not_decord(path)
    yield "reason", reason
    if is_transport_stream(path):  # decord never returns from a far seek in one.
        return
    if trouble := probe(path, contents.frames, "decord", contents.samples):
        yield "trouble", trouble
    elif not reason:
        yield "decoder", "decord"


class _Worker:
    """A process that is killed and replaced when it hangs."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        self.connection, there = PROCESSES.Pipe()
        self.process = PROCESSES.Process(target=_serve, args=(there,), daemon=True)
        self.process.start()
        there.close()
        self.starting = True

    def close(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()

    def run(self, task: Task, timeout: float) -> Entry:
        """Findings of a task, whatever becomes of the process. The timeout is for each finding."""
        findings: dict[str, Any] = {}
        trouble = ""
        self.connection.send(task)
        while True:
            try:
                if not self.connection.poll(timeout + START_TIMEOUT * self.starting):
                    trouble = f"hangs for more than {timeout:g} s"
                    break
                name, value = self.connection.recv()
            except (EOFError, ConnectionResetError):
                self.process.join(5)
                trouble = f"the decoder dies (exit status {self.process.exitcode})"
                break
            self.starting = False
            if name == "ready":
                continue
            if name == "done":
                break
            findings[name] = value
        if trouble:
            self.close()
            self.start()
        return _entry(task, findings, trouble)


def _entry(task: Task, findings: dict[str, Any], trouble: str) -> Entry:
    # What went wrong after it was known to decode is decord's doing.
    by_decord = findings.get("trouble") or (trouble if "decoder" in findings else "")
    texts = [findings.get("warning", ""), findings.get("reason", "")]
    texts.append(f"decord: {by_decord}" if by_decord else trouble)
    lost = "hangs" if trouble.startswith("hangs") else "crashes"
    contents = findings.get("contents")
    facts: dict[str, Any] = {}
    if contents is not None:
        facts = {name: getattr(contents, name) for name in ("frames", "promised", "width", "height", "rate", "codec")}
    status = findings.get("status", lost)
    path = task.target if task.target is not None and status == "ok" else task.path
    decoder, warning = findings.get("decoder", ""), "; ".join(text for text in texts if text)
    return Entry(str(path.absolute()), status, **facts, decoder=decoder, warning=warning)


def work(tasks: Sequence[Task], jobs: int, timeout: float, done: Callable[[Entry], None] = lambda entry: None) -> list[Entry]:
    """Work through tasks in `jobs` processes, in order of the tasks; `done` is called for each as it ends.

    Args:
        tasks: files.
        jobs: processes at a time.
        timeout: seconds of silence after which a process is killed and its file has `hangs`.
        done: for a progress bar; called from threads, one at a time.
    """
    thread = threading.local()
    workers: list[_Worker] = []
    lock = threading.Lock()

    def one(task: Task) -> Entry:
        if not hasattr(thread, "worker"):
            thread.worker = _Worker()
            with lock:
                workers.append(thread.worker)
        entry = thread.worker.run(task, timeout)
        with lock:
            done(entry)
        return entry

    pool = ThreadPoolExecutor(max(min(jobs, len(tasks)), 1))
    try:
        return list(pool.map(one, tasks))
    finally:
        pool.shutdown(cancel_futures=True)
        for worker in workers:
            worker.close()
