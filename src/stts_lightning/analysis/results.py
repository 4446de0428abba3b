"""What a run leaves on disk: `result.json`, written whole or not at all, and what it logged."""

import csv
import json
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "torchvision", "lightning", "hydra-core", "decord", "av", "timm", "torchmetrics", "fvcore")


def versions() -> dict[str, str]:
    """Versions of Python, this package and what it stands on."""
    installed = {"python": platform.python_version()}
    for name in ("stts-lightning", *PACKAGES):
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            continue
    return installed


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


def write_result(path: str | Path, result: dict[str, Any]) -> None:
    """Write a result as JSON, by way of a temporary file in the same folder."""
    path = Path(path)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(result, indent=2) + "\n")
    part.replace(path)


def read_result(path: str | Path) -> dict[str, Any]:
    """Read the result of a run, given its folder or the file."""
    path = Path(path)
    return json.loads((path / "result.json" if path.is_dir() else path).read_text())


def read_metrics(run: str | Path, name: str) -> dict[int, float]:
    """What a run logged under a name, by step, from all pieces of one that broke off and went on: the latest counts.

    Args:
        run: its folder.
        name: as in "train/loss".
    """
    pieces = sorted(Path(run).glob("metrics_*.csv"), key=lambda file: int(file.stem.rpartition("_")[2]))
    values: dict[int, float] = {}
    for file in [*pieces, Path(run) / "metrics.csv"]:
        if file.is_file():
            with file.open(newline="", encoding="utf-8") as lines:
                values |= {int(row["step"]): float(row[name]) for row in csv.DictReader(lines) if row.get(name) and row["step"]}
    return values
