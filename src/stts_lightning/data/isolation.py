"""Decoding in a process of its own: what native code does to it costs a file, not the run.

decord never returns from some files and dies of others. Each loader's worker therefore has a small process that decodes for
it (no torch in it), and replaces it when it hangs or dies: the file is then one that cannot be decoded, like any other.
On Windows, where subprocess hands on no file descriptors, a worker decodes itself.
"""

import contextlib
import logging
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from stts_lightning.data.decode import DecodeError, Frames, Reader, open_video

log = logging.getLogger(__name__)

HAS_ISOLATION = os.name == "posix"
"""Whether a child process can be handed a socket: `pass_fds` is for POSIX alone."""

ASKING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name))
"""Signals by which users (Ctrl-C) and schedulers ask a job to end; Windows has the first two alone."""

MEMORY = 8 * 2**30
"""Bytes that the decoding process may address: a broken header can ask for any amount."""


class RemoteReader:
    """A `Reader` whose video is open in another process."""

    note: str

    def __init__(self, process: "DecoderProcess", path: Path, decoder: str) -> None:
        self._process = process
        self._length, self._rate, self.note = process.ask("open", path, decoder)

    def __len__(self) -> int:
        return self._length

    @property
    def rate(self) -> float:
        """See `Reader.rate`."""
        return self._rate

    def frames(self, indices: NDArray[np.int64]) -> Frames:
        """See `Reader.frames`."""
        shape = self._process.ask("frames", indices)
        return self._process.receive(shape)

    def close(self) -> None:
        """See `Reader.close`."""
        self._process.ask("close")


class DecoderProcess:
    """A process that decodes, started when it is first needed and again when it is lost.

    Args:
        decode_timeout: seconds of silence after which it is taken to hang.
    """

    def __init__(self, decode_timeout: float) -> None:
        self.decode_timeout = decode_timeout
        self.lost: dict[Path, str] = {}
        """Files that took a process with them, and how; they are not tried again."""
        self._process: subprocess.Popen[bytes] | None = None
        self._starting = True
        self._path = Path()

    @contextmanager
    def open(self, path: Path, decoder: str) -> Iterator[Reader]:
        """As `open_video`, with the same errors, and one more for a file that the process is lost with."""
        path = Path(path)
        if path in self.lost:
            raise DecodeError(self.lost[path])
        self._path = path
        if self._process is None:
            self._start()
        reader = RemoteReader(self, path, decoder)
        try:
            yield reader
        finally:
            if self._process is not None:
                with contextlib.suppress(DecodeError):
                    reader.close()

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "stts_lightning.data.isolation", str(theirs.fileno())]
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        self._socket = ours
        self._connection = Connection(os.dup(ours.fileno()))
        self._starting = True

    def ask(self, *request: Any) -> Any:
        """Send a request; returns the answer. Raises DecodeError for a refusal or a lost process."""
        try:
            self._connection.send(request)
        except OSError:
            self._lose()
        self._wait()
        try:
            kind, answer = self._connection.recv()
        except (EOFError, OSError):
            self._lose()
        self._starting = False
        if kind == "error":
            raise DecodeError(answer)
        return answer

    def receive(self, shape: tuple[int, ...]) -> Frames:
        """The pixels after an answer, straight to their place."""
        pixels = np.empty(shape, np.uint8)
        left = pixels.reshape(-1).data
        while left:
            self._wait()
            count = 0
            with contextlib.suppress(OSError):
                count = self._socket.recv_into(left)
            if not count:
                self._lose()
            left = left[count:]
        return pixels

    def _wait(self) -> None:
        # The first answer waits for an interpreter to start, on a machine that may be busy with starting many.
        if not self._connection.poll(self.decode_timeout + 60 * self._starting):
            self._lose(f"hangs for more than {self.decode_timeout:g} s")

    def _lose(self, how: str = "") -> NoReturn:
        process = self._process
        assert process is not None
        if not how:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
        process.kill()
        code = process.wait()
        self.close()
        if not how:
            how = f"dies by {signal.Signals(-code).name}" if code < 0 else f"ends with status {code}"
        self.lost[self._path] = f"{self._path}: the decoder {how}"
        raise DecodeError(self.lost[self._path])

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._connection.close()
            self._socket.close()
            self._process.kill()
            self._process.wait()
            self._process = None


_OF_THIS_PROCESS: dict[tuple[int, float], DecoderProcess] = {}


def decoder_process(decode_timeout: float) -> DecoderProcess:
    """The one of this process, which a fork does not share."""
    key = (os.getpid(), decode_timeout)
    if key not in _OF_THIS_PROCESS:
        _OF_THIS_PROCESS[key] = DecoderProcess(decode_timeout)
    return _OF_THIS_PROCESS[key]


@cache
def can_isolate() -> bool:
    """Whether decoding can have a process of its own here; where not, the main process says so once."""
    if not HAS_ISOLATION and multiprocessing.parent_process() is None:
        log.warning(
            "clip.decode_timeout: has no effect on this system, where workers decode videos themselves; "
            "a file that a decoder hangs on or dies of stops its worker"
        )
    return HAS_ISOLATION


@contextmanager
def open_isolated(path: str | Path, decoder: str, decode_timeout: float | None) -> Iterator[Reader]:
    """As `open_video`, in a process that may be lost; in this one without a decode_timeout, or where there is no other way."""
    with (
        open_video(path, decoder)
        if decode_timeout is None or not can_isolate()
        else decoder_process(decode_timeout).open(Path(path), decoder) as reader
    ):
        yield reader


def _serve(ours: socket.socket) -> None:
    """Answer requests until the other side is gone."""
    connection = Connection(os.dup(ours.fileno()))
    opened: Any = None
    reader: Any = None
    while True:
        try:
            name, *arguments = connection.recv()
        except EOFError:
            return
        data: Frames | None = None
        try:
            if name == "open":
                opened = open_video(*arguments)
                reader = opened.__enter__()
                answer: Any = (len(reader), reader.rate, reader.note)
            elif name == "frames":
                try:
                    data = np.ascontiguousarray(reader.frames(*arguments))
                except Exception as error:
                    # open_video says it in its own words.
                    opened, last = None, opened
                    last.__exit__(type(error), error, error.__traceback__)
                    raise
                answer = data.shape
            else:
                opened, last = None, opened
                answer = last.__exit__(None, None, None) if last else None
        except DecodeError as error:
            connection.send(("error", str(error)))
            continue
        connection.send(("ok", answer))
        if data is not None:
            ours.sendall(data.reshape(-1).data)


if __name__ == "__main__":
    # Whoever asks the run to end leaves it a step more, which wants its frames.
    for number in ASKING:
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(ImportError, ValueError, OSError):  # Windows has no limits, macOS not this one.
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        _serve(socket.socket(fileno=int(sys.argv[1])))
