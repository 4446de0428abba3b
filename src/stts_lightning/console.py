"""What every command does around its work: errors in one line, and libraries kept quiet."""

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from hydra.errors import InstantiationException
from lightning.fabric.utilities.exceptions import MisconfigurationException

from stts_lightning.errors import UserError
from stts_lightning.run_config import ConfigError


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
    """Turn errors that are the user's to fix into one line and exit status 2; set HYDRA_FULL_ERROR=1 to see more."""
    try:
        yield
    except (UserError, MisconfigurationException) as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        # A worker's error comes with the worker's stack trace; its last line is the error.
        line = str(error).strip().splitlines()[-1].removeprefix(f"{type(error).__module__}.{type(error).__name__}: ")
        print(f"error: {line}", file=sys.stderr)
        raise SystemExit(2) from error


def quiet_libraries() -> None:
    """Keep what is not the user's to fix off the screen: tips, device inventories, libraries' own deprecations."""
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
