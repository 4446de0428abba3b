"""Pieces of work that may fail, and the memory that they leave."""

import gc
from collections.abc import Callable

import torch

from stts_lightning.analysis.speed import Work
from stts_lightning.errors import UserError


class Attempt:
    """A piece of work that may fail: what happened is kept in words, and it does nothing from then on.

    So an entrant that needs too much memory costs its own row and no other one.

    Args:
        build: makes the work, at the first call.

    Attributes:
        failure: "out of memory", or the error in one line; None while all is well.
    """

    def __init__(self, build: Callable[[], Work]) -> None:
        self.failure: str | None = None
        self._build = build
        self._work: Work | None = None

    def __call__(self) -> object:
        """Run it; None where it failed."""
        if self.failure is not None:
            return None
        try:
            if self._work is None:
                self._work = self._build()
            return self._work()
        except UserError:
            raise
        except Exception as error:
            self.failure = in_words(error)
        # What the work holds is needed by the others; the error that held it too is gone here.
        self._work = None
        empty_caches()
        return None


def in_words(error: Exception) -> str:
    """An error in one line; "out of memory" for all that say so."""
    said = str(error).lower()  # A compiler's errors and those of a CPU have other classes.
    if isinstance(error, torch.OutOfMemoryError) or "out of memory" in said or "can't allocate memory" in said:
        return "out of memory"
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"


def release() -> None:
    """Forget compiled models, and give back the memory that they and their graphs hold."""
    torch.compiler.reset()
    empty_caches()


def empty_caches() -> None:
    """Give back memory that nobody holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
