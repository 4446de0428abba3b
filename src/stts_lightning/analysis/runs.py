"""Run folders: what they hold, and what their configurations say of them. `points` compares them."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from stts_lightning.analysis.results import printable, read_configuration, read_result
from stts_lightning.run_folders import CONFIG, JOB

RESULTS = ("result.json", "evaluation.json")
NEEDED: dict[str, Any] = {
    "dataset": dict, "backbone": str, "selection": str, "slots": dict, "gflops_per_view": (int, float), "views": int, "clip": list
}  # fmt: skip
"""What a result is compared by, beside its top-1."""

UNTESTED = "has no top-1: the run was not tested"

NO_SETTING = re.compile(
    r"(seed|run_dir|experiment_name|resume|test|trust|objectives|paths|logger|loader\.(num_workers|prefetch_factor|timeout)"
    r"|clip\.decode_timeout|clip\.patience|callbacks\.(best|last|panels|lr|failures|progress|loading)"
    r"|trainer\.(default_root_dir|log_every_n_steps|enable_\w+))(\..*)?"
)
"""Keys that make no other experiment: the seed, places, and how a run is named, watched, saved and fed."""

NO_QUESTION = re.compile(
    r"(run|checkpoint|which|predictions|backbone|selection|dataset|hydra\b.*|(loader|callbacks|dataset)\..*"
    r"|trainer\b(?!\.limit_test_batches$).*)"
)
"""Overrides of a test that its result tells better, or that say where it ran."""


@dataclass(frozen=True)
class Run:
    """A folder with a result.

    Attributes:
        folder: of the result.
        result: what it says; of a test, and of the training where the test does not know it.
        settings: what makes its experiment: its configuration by full key, and facts of its result. Without the seed.
        tests: the run that this is a later test of.
        copies: folders that hold the very same result.
    """

    folder: Path
    result: dict[str, Any]
    settings: tuple[tuple[str, str], ...] = ()
    tests: Path | None = None
    copies: tuple[Path, ...] = ()


def find_runs(folders: Iterable[str | Path]) -> list[Run]:
    """Runs with a top-1 at any depth below folders, in order of their paths: trained ones, and tests of checkpoints.

    Raises:
        FileNotFoundError: for a folder that does not exist.
    """
    return _read([Path(folder) for folder in folders])[0]


def left_out(folders: Iterable[str | Path]) -> list[str]:
    """A line for each run below folders that cannot be compared: it did not end, was not tested, or its result is broken.

    Raises:
        FileNotFoundError: for a folder that does not exist.
    """
    roots = [Path(folder) for folder in folders]
    return [*_read(roots)[1], *(f"{folder}: has no result; it still runs, or broke off" for folder in _unfinished(roots))]


def _below(roots: Sequence[Path], names: Sequence[str]) -> list[Path]:
    """Files of these names, each once where folders overlap; not those that Hydra keeps for itself."""
    files: dict[Path, Path] = {}
    for root in roots:
        if not root.is_dir():
            raise FileNotFoundError(f"runs={root}: no such folder")
        for name in names:
            for file in sorted(root.rglob(name)):
                if file.parent.name != ".hydra":
                    files.setdefault(file.resolve(), file)
    return list(files.values())


def _read(roots: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """Runs that can be compared, and a line for each result that cannot."""
    runs: list[Run] = []
    problems: dict[Path, str] = {}
    for file in _below(roots, RESULTS):
        try:
            result = read_result(file)
        except (OSError, ValueError) as error:
            problems[file] = f"cannot be read ({error})"
            continue
        if problem := _problem(result):
            # An answer from the predictions of a test says nothing of a model, and is none to compare.
            if file.name == RESULTS[0] or "dataset" in result:
                problems[file] = problem
        else:
            runs.append(_run(file, result))
    later = {run.tests.resolve() for run in runs if run.tests}
    shown = {file: text for file, text in problems.items() if text != UNTESTED or file.parent.resolve() not in later}
    return runs, [printable(f"{file.parent}: {file.name} {' '.join(text.split())}") for file, text in shown.items()]


def _problem(result: Any) -> str:
    """Why a result cannot be compared; empty if it can."""
    if not isinstance(result, dict):
        return "holds no result"
    lacking = [key for key, kind in NEEDED.items() if not isinstance(result.get(key), kind)]
    if not lacking and result["slots"]:
        lacking = [key for key in ("scorer", "estimator", "sigma") if key not in result]
    if not lacking and "name" not in result["dataset"]:
        lacking = ["dataset.name"]
    if lacking:
        return f"says nothing of {', '.join(lacking)}"
    if "top1" not in result:
        return UNTESTED
    top1 = result["top1"]
    return "" if isinstance(top1, int | float) and math.isfinite(top1) else f"has a top-1 of {top1!r}"


def _unfinished(roots: Sequence[Path]) -> list[str]:
    """Folders of runs without a result."""
    claimed, configured = ({file.parent for file in _below(roots, [name])} for name in (JOB, CONFIG))
    # A logger may keep a config.yaml of its own within a run's folder.
    folders = claimed | {folder for folder in configured if not configured & set(folder.parents)}
    return [printable(str(one)) for one in sorted(folders) if not any((one / name).is_file() for name in RESULTS)]


def _run(file: Path, result: dict[str, Any]) -> Run:
    """A run, or a test with what the run that it tests knows."""
    folder = file.parent
    if file.name == RESULTS[0]:
        return Run(folder, result, _settings(folder, folder, result))
    home = _tested_run(folder, result)
    if home is None:
        return Run(folder, result, _settings(folder, None, result, _question(folder)))
    try:
        trained = read_result(home)
        trained = trained if _problem(trained) in ("", UNTESTED) else {}
    except (OSError, ValueError):
        trained = {}
    # A test knows the list of its own videos alone.
    lists = {key: value for key, value in trained.get("dataset", {}).items() if key.endswith("_hash")}
    known = {key: trained[key] for key in ("steps", "weights", "precision", "batch_size") if key in trained}
    # What a test says of these is of itself: its weights are those that the run made.
    facts = {key: value for key, value in result.items() if key not in ("weights", "precision", "batch_size")}
    whole = {**facts, **known, "dataset": {**lists, **result["dataset"]}}
    extra = _question(folder) if home != folder else {}
    if (which := Path(result.get("checkpoint", "last.ckpt")).stem) != "last":
        extra["evaluate.checkpoint"] = printable(which)
    settings = _settings(folder, home, whole)
    if (precision := str(result.get("precision"))) != dict(settings).get("trainer.precision", precision):
        extra["evaluate.precision"] = precision
    return Run(folder, {**result, **whole}, tuple({**dict(settings), **extra}.items()), home)


def _tested_run(folder: Path, result: dict[str, Any]) -> Path | None:
    """Folder of the run that a test is of; None if nothing tells."""
    checkpoint = Path(result.get("checkpoint", ""))
    places = [folder, *([checkpoint.parent.parent] if checkpoint.parent.name == "checkpoints" else []), folder.parent]
    return next((place for place in places if (place / CONFIG).is_file()), None)


def _question(folder: Path) -> dict[str, str]:
    """What a test was asked beyond its run's configuration, from its overrides."""
    file = folder / ".hydra" / "overrides.yaml"
    try:
        overrides = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else []
    except (OSError, ValueError, yaml.YAMLError):
        overrides = [f"overrides=unreadable in {folder}"]
    pairs = (str(one).lstrip("+~").partition("=") for one in overrides or [])
    return {
        key if "." in key else f"evaluate.{key}": printable(value)
        for key, _, value in pairs
        if not NO_QUESTION.fullmatch(key) and not NO_SETTING.fullmatch(key)
    }


def _weights(file: str) -> str:
    """Name of a file of weights; those of runs are called alike, so with the name of the run's folder."""
    path = Path(file)
    return printable(f"{path.parent.parent.name}/{path.name}" if path.parent.name == "checkpoints" else path.name)


def _settings(
    folder: Path, home: Path | None, result: dict[str, Any], extra: dict[str, str] | None = None
) -> tuple[tuple[str, str], ...]:
    """What makes the experiment of a result.

    Args:
        folder: of the result.
        home: of its configuration.
        result: what is known of training and test.
        extra: other settings.
    """
    data, unknown = result["dataset"], {}
    try:
        config = read_configuration(home) if home else None
    except ValueError:
        config, unknown = None, {CONFIG: f"unreadable in {printable(str(folder))}"}
    if config is None:
        # Nobody knows what else differs: a seed is one setting more.
        unknown = unknown or {CONFIG: "none", "seed": str(result.get("seed"))}
    hashes = {key: str(data[key]) for key in ("train_hash", "val_hash", "test_hash", "manifest_hash") if key in data}
    # A list is known by its hash, wherever it lies; numbers are the size of the demo's.
    places = [f"dataset.{split}" for split in ("train", "val", "test") if f"{split}_hash" in hashes]
    places += ["dataset.root", "dataset.classes", "dataset.manifest"] if len(places) >= 2 else []
    pairs = {
        key: value
        for key, value in (config or {}).items()
        if not NO_SETTING.fullmatch(key) and (key not in places or value.isdigit())
    }
    start, _, report = str(result.get("weights", "")).partition(" (")
    start = pairs.get("pretrained") or {"random": "null"}.get(start, start)
    facts = {
        "pretrained": _weights(start) if start else None,
        "weights": report.removesuffix(")"),
        "loader.batch_size": result.get("batch_size"),
        "trainer.precision": result.get("precision"),
        "steps": result.get("steps"),
        "clip": "x".join(map(str, result["clip"])),
        **{f"dataset.{key}": value for key, value in hashes.items()},
    }
    known = {key: printable(str(value)) for key, value in facts.items() if value not in (None, "")}
    return tuple({**pairs, **known, **unknown, **(extra or {})}.items())
