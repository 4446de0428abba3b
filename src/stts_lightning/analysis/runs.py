"""Run folders as points of a comparison: which runs are seeds of one row, the Pareto front, sweeps over one number."""

import json
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
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
    r"(run|checkpoint|which|predictions|hydra\b.*|(loader|callbacks|dataset)\..*|trainer\b(?!\.limit_test_batches$).*)"
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


@dataclass(frozen=True)
class Point:
    """Runs whose whole configurations differ in the seed alone, paths aside.

    Attributes:
        dataset, backbone, selection, keeps, estimator: as in `result.json`; keeps puts the slots into one line.
        sigma: at the first step.
        gflops: of a view.
        settings: as of each of its runs.
        runs: one a seed, or several where a seed was run again with another result.
    """

    dataset: str
    backbone: str
    selection: str
    keeps: str
    estimator: str
    sigma: float
    gflops: float
    views: int
    settings: tuple[tuple[str, str], ...]
    runs: tuple[Run, ...]

    def values(self, key: str) -> list[float]:
        """A figure of each seed that has it: of a seed that was run again, the mean."""
        figures: dict[Any, list[float]] = defaultdict(list)
        for run in self.runs:
            if run.result.get(key) is not None:
                figures[run.result.get("seed")].append(float(run.result[key]))
        return [statistics.mean(of_seed) for of_seed in figures.values()]

    def mean(self, key: str = "top1") -> float | None:
        """Mean over seeds; None where no run has it."""
        values = self.values(key)
        return statistics.mean(values) if values else None

    def spread(self, key: str = "top1") -> float | None:
        """Standard deviation over seeds; None below two."""
        values = self.values(key)
        return statistics.stdev(values) if len(values) > 1 else None

    @property
    def seeds(self) -> int:
        """How many there are."""
        return len({run.result.get("seed") for run in self.runs})

    @property
    def top1(self) -> float:
        """Mean top-1."""
        mean = self.mean()
        assert mean is not None
        return mean

    @property
    def method(self) -> str:
        """How its slots choose, as in "learned" or "uniform + centre"; empty for the unpruned model."""
        if self.keeps == "all":
            return ""
        named = (re.search(r"\((\w+)\)", slot) for slot in self.keeps.split("; "))
        return " + ".join(dict.fromkeys(found[1] if found else "learned" for found in named))

    @property
    def ratios(self) -> dict[str, float]:
        """Ratio of each slot, from the selection's name."""
        return {slot: float(ratio) for slot, ratio in re.findall(r"([ts]\d+)_([0-9.]+)", self.selection)}


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
    lists = {key: value for key, value in trained.get("dataset", {}).items() if key == "train_hash"}
    known = {key: trained[key] for key in ("steps", "weights", "precision", "batch_size") if key in trained}
    # What a test says of these is of itself: its weights are those that the run made.
    facts = {key: value for key, value in result.items() if key not in ("weights", "precision", "batch_size")}
    whole = {**facts, **known, "dataset": {**result["dataset"], **lists}}
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
    hashes = {key: str(data[key]) for key in ("train_hash", "val_hash", "manifest_hash") if key in data}
    # A list is known by its hash, wherever it lies; numbers are the size of the demo's.
    places = [f"dataset.{split}" for split in ("train", "val") if f"{split}_hash" in hashes]
    places += ["dataset.root", "dataset.classes", "dataset.manifest"] if len(places) == 2 else []
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


def points(runs: Sequence[Run]) -> list[Point]:
    """Runs of one configuration together, by data set and falling cost."""
    groups: dict[Point, list[Run]] = defaultdict(list)
    for run in runs:
        groups[_point(run)].append(run)
    merged = [replace(point, runs=_distinct(group)) for point, group in groups.items()]
    return sorted(merged, key=lambda p: (p.dataset, -p.gflops, p.selection, p.sigma))


def _point(run: Run) -> Point:
    """What a run has in common with its other seeds."""
    r = run.result
    choices = "".join(f" {name}={value}" for name, value in (r.get("backbone_choices") or {}).items())
    keeps = "; ".join(f"{slot.upper()}: {text}" for slot, text in r["slots"].items()) or "all"
    # Runs of earlier versions knew the paper's way alone.
    operator = ", ".join(filter(None, (r["scorer"], r["estimator"], r.get("ways_to_learn", "")))) if r["slots"] else ""
    sigma = float(r["sigma"]) if r["slots"] else 0.0
    name, gflops, views = printable(str(r["dataset"]["name"])), r["gflops_per_view"], r["views"]
    return Point(name, r["backbone"] + choices, r["selection"], keeps, operator, sigma, gflops, views, run.settings, ())


def _distinct(group: Sequence[Run]) -> tuple[Run, ...]:
    """Runs of a point: without copies, and without tests that repeat what a run says of itself."""
    own = {(run.folder.resolve(), run.result.get("seed")) for run in group if not run.tests}
    kept: dict[str, Run] = {}
    for run in group:
        # A test in a copied folder names the checkpoint of the first.
        places = (run.tests, run.folder.parent) if run.tests else ()
        if any((place.resolve(), run.result.get("seed")) in own for place in places):
            continue
        content = json.dumps(run.result, sort_keys=True)
        first = kept.get(content)
        kept[content] = replace(first, copies=(*first.copies, run.folder)) if first else run
    return tuple(kept.values())


def notes(points: Sequence[Point]) -> list[str]:
    """A line for each seed of a configuration that more than one folder holds."""
    lines: list[str] = []
    for point in points:
        seeds: dict[Any, list[Run]] = defaultdict(list)
        for run in point.runs:
            seeds[run.result.get("seed")].append(run)
            if run.copies:
                copies = ", ".join(map(str, run.copies))
                lines.append(printable(f"{copies}: the same result as in {run.folder}; it counts once"))
        for seed, again in seeds.items():
            if len(again) > 1:
                results = ", ".join(f"{run.folder} ({100 * run.result['top1']:.2f} %)" for run in again)
                lines.append(
                    printable(f"{results}: one configuration, seed {seed} each time; they count as one seed, with their mean")
                )
    return lines


def differences(points: Sequence[Point]) -> list[dict[str, str]]:
    """Of each point the settings that are not the same for all; long values are shortened where that leaves them different.

    A point whose configuration is unknown differs in what is known alone.
    """
    known = [dict(point.settings) for point in points]
    shown: list[dict[str, str]] = [{} for _ in points]
    for key in dict.fromkeys(key for pairs in known for key in pairs):
        values = dict.fromkeys(pairs.get(key, "") for pairs in known if key in pairs or CONFIG not in pairs)
        if len(values) > 1:
            short = _shortened(values)
            for pairs, row in zip(known, shown, strict=True):
                row[key] = short[pairs[key]] if key in pairs else ""
    return shown


def _shortened(values: Iterable[str], longest: int = 36) -> dict[str, str]:
    short = {value: value if len(value) <= longest else f"{value[: longest - 12]}…{value[-11:]}" for value in values}
    return short if len(set(short.values())) == len(short) else {value: value for value in short}


def pareto(points: Sequence[Point], better: str = "gflops") -> set[int]:
    """Numbers of the points that no other beats: none is as good in both, and better in one.

    Compared are points with as many views of a test video: more of them raise the accuracy, and are no part of a view's cost.
    An oracle, which reads the truth, is left aside.

    Args:
        points: of one data set.
        better: "gflops" (less is better) or "clips_per_second" (more is), beside top-1.
    """

    def cost(point: Point) -> float | None:
        speed = point.mean("clips_per_second")
        return point.gflops if better == "gflops" else None if speed is None else -speed

    known = [
        (number, value, point.top1, point.views)
        for number, point in enumerate(points)
        if "oracle" not in point.method and (value := cost(point)) is not None
    ]
    return {
        number
        for number, value, top1, views in known
        if not any(v <= value and t >= top1 and (v, t) != (value, top1) and views == w for _, v, t, w in known)
    }


Curve = list[tuple[float, Point]]


def sigma_curves(points: Sequence[Point]) -> dict[str, Curve]:
    """Points that differ in sigma alone, by what they share; those with two values and more."""
    sigma = r"(selection|callbacks\.sigma)\.sigma"
    groups: dict[tuple[str, ...], Curve] = defaultdict(list)
    for point in points:
        if point.ratios:
            groups[(point.selection, point.keeps, *_shared(point, sigma))].append((point.sigma, point))
    return _long(groups, lambda point: f"{point.backbone} {point.selection}", sigma)


def ratio_curves(points: Sequence[Point]) -> dict[str, dict[str, Curve]]:
    """For each slot, points that differ in its ratio alone, by what they share; those with two values and more."""
    curves: dict[str, dict[str, Curve]] = {}
    for slot in sorted({slot for point in points for slot in point.ratios}):
        ratio, name = rf"selection\.slots\.{slot}\.ratio", partial(_without, slot)
        groups: dict[tuple[str, ...], Curve] = defaultdict(list)
        for point in points:
            if slot in point.ratios:
                groups[(name(point), *_shared(point, ratio))].append((point.ratios[slot], point))
        if long := _long(groups, name, ratio):
            curves[slot] = long
    return curves


def _without(slot: str, point: Point) -> str:
    """A point's selection in words, a slot left out."""
    rest = "_".join(f"{name}_{ratio:g}" for name, ratio in point.ratios.items() if name != slot)
    how = re.search(r"\((\w+)\)", point.keeps)
    return f"{point.backbone}{' with ' + rest if rest else ''}, sigma {point.sigma:g}{', ' + how[1] if how else ''}"


def _shared(point: Point, varied: str) -> tuple[str, ...]:
    """What all points of a curve have in common, beside their selection; `varied` matches the keys that differ along it."""
    settings = (f"{key}={value}" for key, value in sorted(point.settings) if not re.fullmatch(varied, key))
    return (point.backbone, point.estimator, str(point.views), *settings)


def _long(groups: Mapping[tuple[str, ...], Curve], name: Callable[[Point], str], varied: str) -> dict[str, Curve]:
    """Curves with two places and more, from left to right; those of one name with the settings that tell them apart."""
    named: dict[str, list[Curve]] = defaultdict(list)
    for curve in groups.values():
        if len({place for place, _ in curve}) > 1:
            named[name(curve[0][1])].append(sorted(curve, key=lambda at: at[0]))
    told: dict[str, Curve] = {}
    for text, curves in named.items():
        for number, (curve, own) in enumerate(zip(curves, differences([curve[0][1] for curve in curves]), strict=True)):
            words = [f"{key}={value}" for key, value in own.items() if value and not re.fullmatch(varied, key)]
            longer = ", ".join([text, *words])
            told[f"{longer} ({number})" if longer in told else longer] = curve
    return told
