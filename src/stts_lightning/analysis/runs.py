"""Run folders as points of a comparison: seeds together, the Pareto front, sweeps over one number."""

import json
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

RESULTS = ("result.json", "evaluation.json")


@dataclass(frozen=True)
class Run:
    """A folder with a result."""

    folder: Path
    result: dict[str, Any]


@dataclass(frozen=True)
class Point:
    """Runs that differ in nothing but the seed.

    Attributes:
        dataset, backbone, selection, keeps, estimator: as in `result.json`; keeps puts the slots into one line.
        sigma: at the first step.
        gflops: of a view.
        settings: how it was trained and tested: keys and values of its configuration.
        runs: one a seed.
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
        """A figure of each run that has it."""
        return [float(run.result[key]) for run in self.runs if run.result.get(key) is not None]

    def mean(self, key: str = "top1") -> float | None:
        """Mean over seeds; None where no run has it."""
        values = self.values(key)
        return statistics.mean(values) if values else None

    def spread(self, key: str = "top1") -> float | None:
        """Standard deviation over seeds; None below two."""
        values = self.values(key)
        return statistics.stdev(values) if len(values) > 1 else None

    @property
    def top1(self) -> float:
        """Mean top-1."""
        mean = self.mean()
        assert mean is not None
        return mean

    @property
    def ratios(self) -> dict[str, float]:
        """Ratio of each slot, from the selection's name."""
        return {slot: float(ratio) for slot, ratio in re.findall(r"([ts]\d+)_([0-9.]+)", self.selection)}


def find_runs(folders: Iterable[str | Path]) -> list[Run]:
    """Runs with a top-1 at any depth below folders, in order of their paths: trained ones, and tests of checkpoints.

    Raises:
        FileNotFoundError: for a folder that does not exist.
    """
    runs: dict[Path, Run] = {}
    for root in map(Path, folders):
        if not root.is_dir():
            raise FileNotFoundError(f"runs={root}: no such folder")
        for name in RESULTS:
            for file in sorted(root.rglob(name)):
                # A test of a run that has a result of its own says the same again.
                if name == "evaluation.json" and {file.parent, file.parent.parent} & set(runs):
                    continue
                result = json.loads(file.read_text())
                if "top1" in result and "dataset" in result:
                    runs[file.parent] = Run(file.parent, result)
    return list(runs.values())


def settings(folder: Path) -> tuple[tuple[str, str], ...]:
    """What a run's `config.yaml` says of training and test, by full key, seed and places aside; nothing where there is none."""
    file = folder / "config.yaml"
    content = yaml.safe_load(file.read_text()) if file.is_file() else {}

    def flat(key: str, value: Any) -> Iterator[tuple[str, str]]:
        if isinstance(value, dict):
            for name, below in value.items():
                yield from flat(f"{key}.{name}", below)
        else:
            yield key, str(value)

    parts = ("optim", "augment", "label_smoothing", "clip", "backbone", "selection", "head")
    pairs = [pair for part in parts if part in content for pair in flat(part, content[part])]
    decay = (content.get("callbacks", {}).get("sigma") or {}).get("decay", True)
    return (*pairs, ("callbacks.sigma.decay", str(decay)))


def points(runs: Sequence[Run]) -> list[Point]:
    """Runs of one configuration together, by data set and falling cost."""
    groups: dict[tuple[Any, ...], list[Run]] = defaultdict(list)
    for run in runs:
        r = run.result
        data = r["dataset"]
        choices = "".join(f" {name}={value}" for name, value in (r.get("backbone_choices") or {}).items())
        keeps = "; ".join(f"{slot.upper()}: {text}" for slot, text in r["slots"].items()) or "all"
        operator = f"{r['scorer']}, {r['estimator']}" if r["slots"] else ""
        sigma = float(r["sigma"]) if r["slots"] else 0.0
        point = Point(
            data["name"], r["backbone"] + choices, r["selection"], keeps, operator, sigma, r["gflops_per_view"], r["views"],
            settings(run.folder), (),
        )  # fmt: skip
        # Another list, another length of training or another clip is another experiment.
        groups[(point, data.get("val_hash"), r.get("steps"), r.get("batch_size"), tuple(r["clip"]))].append(run)
    # A run repeated, or copied, is no other seed.
    each = {key: {run.result.get("seed"): run for run in group} for key, group in groups.items()}
    merged = [replace(point, runs=tuple(seeds.values())) for (point, *_), seeds in each.items()]
    return sorted(merged, key=lambda p: (p.dataset, -p.gflops, p.selection, p.sigma))


def pareto(points: Sequence[Point], better: str = "gflops") -> set[int]:
    """Numbers of the points that no other beats: none is as good in both, and better in one.

    Args:
        points: of one data set.
        better: "gflops" (less is better) or "clips_per_second" (more is), beside top-1.
    """

    def cost(point: Point) -> float | None:
        speed = point.mean("clips_per_second")
        return point.gflops if better == "gflops" else None if speed is None else -speed

    known = [(number, value, point.top1) for number, point in enumerate(points) if (value := cost(point)) is not None]
    return {
        number
        for number, value, top1 in known
        if not any(v <= value and t >= top1 and (v, t) != (value, top1) for _, v, t in known)
    }


Curve = list[tuple[float, Point]]


def sigma_curves(points: Sequence[Point]) -> dict[str, Curve]:
    """Points that differ in sigma alone, by what they share; those with two values and more."""
    groups: dict[tuple[Any, ...], Curve] = defaultdict(list)
    for point in points:
        if point.ratios:
            groups[(point.backbone, point.selection, point.keeps, point.estimator, point.views)].append((point.sigma, point))
    return _long({f"{key[0]} {key[1]}": curve for key, curve in groups.items()})


def ratio_curves(points: Sequence[Point]) -> dict[str, dict[str, Curve]]:
    """For each slot, points that differ in its ratio alone, by what they share; those with two values and more."""
    curves: dict[str, dict[str, Curve]] = {}
    for slot in sorted({slot for point in points for slot in point.ratios}):
        groups: dict[str, Curve] = defaultdict(list)
        for point in points:
            if slot in point.ratios:
                rest = "_".join(f"{name}_{ratio:g}" for name, ratio in point.ratios.items() if name != slot)
                how = re.search(r"\((\w+)\)", point.keeps)
                name = f"{point.backbone}{' with ' + rest if rest else ''}, sigma {point.sigma:g}{', ' + how[1] if how else ''}"
                groups[name].append((point.ratios[slot], point))
        if long := _long(groups):
            curves[slot] = long
    return curves


def _long(curves: dict[str, Curve]) -> dict[str, Curve]:
    """Curves with two places and more, from left to right."""
    return {name: sorted(curve, key=lambda at: at[0]) for name, curve in curves.items() if len({place for place, _ in curve}) > 1}
