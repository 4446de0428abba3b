"""What every command does around its work: errors in one line, and a screen without what helps nobody."""

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from lightning.fabric.utilities.exceptions import MisconfigurationException

from stts_lightning.errors import UserError
from stts_lightning.run_config import ConfigError
from stts_lightning.run_folders import EXIT_INTERRUPTED, EXIT_REFUSED, is_first_process, remove_unused


@contextmanager
def as_user_errors() -> Iterator[None]:
    """While objects are built from a configuration, a value that one of them refuses is the user's to fix."""
    try:
        yield
    except (UserError, MisconfigurationException):
        raise
    except InstantiationException as error:
        raise ConfigError(f"configuration: {error.__cause__ or error}") from error
    except (ValueError, TypeError) as error:
        raise ConfigError(str(error)) from error


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn errors that are the user's to fix into one line and exit status 2; set HYDRA_FULL_ERROR=1 to see more.

    A command that was refused, or interrupted before it wrote anything, leaves no output folder.
    """
    try:
        yield
    except (UserError, MisconfigurationException) as error:
        _remove_unused_folder()
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        print(f"error: {what_is_wrong(error)}", file=sys.stderr)
        raise SystemExit(EXIT_REFUSED) from error
    except KeyboardInterrupt as error:
        _remove_unused_folder()
        print("interrupted", file=sys.stderr)
        raise SystemExit(EXIT_INTERRUPTED) from error


def what_is_wrong(error: Exception) -> str:
    """The part of an error that says what is wrong, as one line.

    A worker's error comes with the worker's stack trace, whose last line it is; others begin with it.
    """
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    if any("Traceback (most recent call last)" in line for line in lines):
        return lines[-1].removeprefix(f"{type(error).__module__}.{type(error).__name__}: ")
    return "; ".join(line for line in lines[:LINES] if line)


LINES = 3
"""Of an error of many lines, how many are shown."""


def _remove_unused_folder() -> None:
    if HydraConfig.initialized():
        remove_unused(Path(HydraConfig.get().runtime.output_dir))


def quiet() -> None:
    """Keep off the screen what is not the user's to fix: tips, device inventories, libraries' own deprecations.

    Of several processes the first one speaks; of the others only warnings are shown and logged.
    """
    if not is_first_process():
        logging.getLogger().setLevel(logging.WARNING)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*torch.jit.*",
        ".*treespec.*",
        ".*does not have many workers.*",
        ".*Experiment logs directory.*",
        ".*broadcast_buffers.*",
        # Of depthwise kernels, whose second side is 1: in memory they are the same.
        ".*Grad strides do not match bucket view strides.*",
    ):
        warnings.filterwarnings("ignore", message=message)
    warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")
    warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty.*")
