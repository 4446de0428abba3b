"""How far a long piece of work is: a bar in a terminal, a line every few minutes in a log file. Light: no torch."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta

from rich import get_console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

EVERY_MINUTES = 5.0


class Timer:
    """Tells when it is time for another line.

    Args:
        every_minutes: from one line to the next.
    """

    def __init__(self, every_minutes: float = EVERY_MINUTES) -> None:
        if every_minutes <= 0:
            raise ValueError(f"every_minutes={every_minutes}: must be above 0")
        self.seconds, self.last = 60 * every_minutes, time.monotonic()

    def due(self) -> bool:
        """Whether the time is up; it then starts anew."""
        now = time.monotonic()
        if now - self.last < self.seconds:
            return False
        self.last = now
        return True


def in_terminal() -> bool:
    """Whether somebody sees a bar move: standard output is a terminal."""
    return get_console().is_terminal


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, as 1:02:03."""
    return str(timedelta(seconds=round(max(seconds, 0))))


def line(what: str, done: int, total: int, seconds: float) -> str:
    """Where a count stands after some seconds, and how long the rest will take."""
    rate = done / max(seconds, 1e-9)
    left = f", {duration((total - done) / rate)} left" if done else ""
    return f"{what}: {done:,} of {total:,}, {rate:,.1f} a second{left}"


@contextmanager
def counting(what: str, total: int, quiet: bool = False, every_minutes: float = EVERY_MINUTES) -> Iterator[Callable[[], None]]:
    """Show how many of so many things are done.

    Args:
        what: the things, in the plural.
        total: how many there are.
        quiet: show nothing (a process that is not the first).
        every_minutes: between two lines in a log file.

    Yields:
        A function to call when one more is done.
    """
    if quiet or not in_terminal():
        timer, begun, done = Timer(every_minutes), time.monotonic(), 0

        def count() -> None:
            nonlocal done
            done += 1
            if not quiet and timer.due():
                # Some commands switch logging off.
                print(f"[{datetime.now():%Y-%m-%d %H:%M:%S}] {line(what, done, total, time.monotonic() - begun)}", flush=True)

        yield count
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as bar:
        task = bar.add_task(what, total=total)
        yield lambda: bar.advance(task)
