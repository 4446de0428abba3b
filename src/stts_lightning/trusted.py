"""What a configuration from a file may build: a run folder that somebody sent must not run code of its choice."""

from collections.abc import Mapping
from typing import Any

from stts_lightning.containers import leaves
from stts_lightning.errors import UserError

_OURS = "stts_lightning"
_CALLBACKS = (
    "DeviceStatsMonitor", "EarlyStopping", "GradientAccumulationScheduler", "LearningRateMonitor", "ModelCheckpoint",
    "ModelSummary", "RichProgressBar", "StochasticWeightAveraging", "Timer", "TQDMProgressBar",
)  # fmt: skip
_SOURCES = ("DemoSource", "FolderSource", "ListSource")
ALLOWED = frozenset(
    {
        *(f"{_OURS}.data.{module}.{name}" for name in _SOURCES for module in ("sources", "datamodule")),  # Now, and before 0.2.
        f"{_OURS}.sweeps.SweepEnd",
        f"{_OURS}.training.callbacks.EarlyStop",
        f"{_OURS}.training.callbacks.FailureLog",
        f"{_OURS}.training.callbacks.RatioAnnealing",
        f"{_OURS}.training.callbacks.SigmaAnnealing",
        f"{_OURS}.training.chance.ChanceWatch",
        f"{_OURS}.training.loading.LoadingWatch",
        f"{_OURS}.training.loggers.wandb_logger",
        f"{_OURS}.training.panels.SelectionPanels",
        f"{_OURS}.training.preemption.BestCheckpoint",
        f"{_OURS}.training.preemption.LastCheckpoint",
        f"{_OURS}.training.progress.progress",
        f"{_OURS}.training.starts.StartSearch",
        "lightning.pytorch.Trainer",
        "lightning.pytorch.loggers.CSVLogger",
        "lightning.pytorch.loggers.TensorBoardLogger",
        "lightning.pytorch.strategies.DDPStrategy",
        *(f"lightning.pytorch.callbacks.{name}" for name in _CALLBACKS),
    }
)
"""Classes that a stored configuration may build."""


class TrustError(UserError):
    """A stored configuration that would build a class which is not on the list of allowed ones."""


def named_classes(content: Mapping[str, Any]) -> dict[str, str]:
    """What a configuration would import, by key: targets of Hydra, and what is given by a dotted path."""
    return {key: str(value) for key, value in leaves(content) if _imports(key, value)}


def _imports(key: str, value: Any) -> bool:
    name = key.rpartition(".")[2]
    by_path = name in ("selector", "reducer", "backbone") or key.endswith("backbone.name")
    return name == "_target_" or (by_path and isinstance(value, str) and "." in value)


REFERENCE = "${run_dir}"
"""The one reference to another value that a stored configuration may hold, at the start of a text."""


def check_stored(content: Mapping[str, Any], source: str, also: Mapping[str, Any] | None = None) -> None:
    """Refuse a stored configuration that would build what is not allowed.

    Args:
        content: plain containers.
        source: the file, in words.
        also: a configuration that the user typed: what it names is allowed too.

    Raises:
        TrustError: names key and class.
    """
    typed = set(named_classes(also or {}).values())
    for key, value in leaves(content):
        # What a reference becomes is known only when it is read: it could name any class.
        if isinstance(value, str) and "${" in value.removeprefix(REFERENCE):
            raise TrustError(f"{source}: {key}={value} refers to another value; a stored configuration holds values alone")
        if not {"_partial_", "_args_"}.isdisjoint(key.split(".")):
            raise TrustError(f"{source}: {key}={value} is not allowed in a stored configuration")
    for key, target in named_classes(content).items():
        if target not in ALLOWED and target not in typed:
            raise TrustError(
                f"{source}: {key}={target} is not a class that a stored configuration may build; trust=true on the command "
                "line builds it, and so runs its code: only for files whose origin you trust"
            )
