"""What a run leaves on disk: `result.json`, written whole or not at all, its configuration, and what it logged."""

import csv
import json
import platform
import subprocess
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

import stts_lightning
from stts_lightning.configuration import conf_dir
from stts_lightning.containers import leaves
from stts_lightning.files import write_json
from stts_lightning.run_folders import CONFIG

PACKAGES = ("torch", "torchvision", "lightning", "hydra-core", "decord", "av", "timm", "torchmetrics", "fvcore")


def versions() -> dict[str, str]:
    """Versions of Python, this package and what it stands on."""
    # The metadata of an editable installation are those of the day it was made.
    installed = {"python": platform.python_version(), "stts-lightning": stts_lightning.__version__}
    for name in PACKAGES:
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            continue
    return installed


def tested_hash(data: Mapping[str, Any]) -> str | None:
    """What tells the list that was tested from others, of a result's `dataset`; None where an earlier version did not say."""
    return data.get(f"{data.get('tested', 'val')}_hash")


def commit() -> str | None:
    """Commit of the checkout the package runs from, with a `+` if it has changes; None outside a checkout."""
    folder = Path(__file__).parent
    try:
        run = {"cwd": folder, "capture_output": True, "text": True, "check": True, "timeout": 10}
        head = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], **run).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain", "--untracked-files=no"], **run).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{head}{'+' if changed else ''}"


def printable(text: str) -> str:
    """A text that any UTF-8 file or terminal takes: a byte of a file's name that is no UTF-8 is shown by its code."""
    return text.encode("utf-8", "backslashreplace").decode()


def write_result(path: str | Path, result: dict[str, Any]) -> None:
    """Write a result as JSON. The names of files that are no UTF-8 are read back as they were."""
    write_json(path, result, indent=2)


def read_result(path: str | Path) -> dict[str, Any]:
    """Read the result of a run, given its folder or the file."""
    path = Path(path)
    return json.loads((path / "result.json" if path.is_dir() else path).read_text(encoding="utf-8"))


def _flat(content: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Values of a configuration by full key, as they are typed on a command line."""
    words = {None: "null", True: "true", False: "false"}
    for name, value in leaves(content, key, lists=False):
        yield name, words[value] if value is None or isinstance(value, bool) else printable(str(value))


@cache
def _defaults() -> dict[str, str]:
    """What `train` takes where nothing is chosen, by full key; without what follows from other keys, model and data set."""
    conf = Path(conf_dir())
    pairs = dict(_flat({key: value for key, value in _yaml(conf / "train.yaml").items() if key not in ("defaults", "hydra")}))
    for group in ("loader", "clip", "trainer", "callbacks"):
        pairs |= _flat(_yaml(conf / group / "default.yaml"), group)
    return {key: value for key, value in pairs.items() if "${" not in value}


def _yaml(file: Path) -> dict[str, Any]:
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{file}: holds no mapping")
    return content


def read_configuration(run: str | Path) -> dict[str, str] | None:
    """The whole configuration of a run by full key; None if its folder holds none.

    A key that an older version did not know has today's default. Places in the run's own folder start with `run_dir`.

    Raises:
        ValueError: if the file cannot be read.
    """
    file = Path(run) / CONFIG
    if not file.is_file():
        return None
    try:
        content = _yaml(file)
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"{file}: {error}") from error
    pairs = dict(_flat(content))
    run_dir = pairs.get("run_dir")
    for key, value in pairs.items():
        if run_dir and (value == run_dir or value.startswith(f"{run_dir}/")):
            pairs[key] = f"run_dir{value.removeprefix(run_dir)}"
    groups = {key.rpartition(".")[0] for key in pairs}
    return {**{key: value for key, value in _defaults().items() if key not in groups}, **pairs}


def read_history(run: str | Path) -> dict[str, dict[int, float]]:
    """All that a run logged, by name and step, from all pieces of one that broke off and went on: the latest counts."""
    pieces = sorted(Path(run).glob("metrics_*.csv"), key=lambda file: int(file.stem.rpartition("_")[2]))
    history: dict[str, dict[int, float]] = {}
    for file in [*pieces, Path(run) / "metrics.csv"]:
        if not file.is_file():
            continue
        with file.open(newline="", encoding="utf-8") as lines:
            for row in csv.DictReader(lines):
                step = row.pop("step", None)
                for name, value in row.items():
                    if step and value and name != "epoch":
                        history.setdefault(name, {})[int(step)] = float(value)
    return history


def read_metrics(run: str | Path, name: str) -> dict[int, float]:
    """What a run logged under a name as in "train/loss", by step."""
    return read_history(run).get(name, {})
