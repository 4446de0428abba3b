"""Runs as points of a comparison: which are seeds of one row, how they differ, the Pareto front, sweeps over one number."""

import json
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from stts_lightning.analysis.results import printable, tested_hash
from stts_lightning.analysis.runs import Run
from stts_lightning.run_folders import CONFIG


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
        return {slot: float(ratio) for slot, ratio in re.findall(r"([ts]\d+|r[\d-]+)_([0-9.]+)", self.selection)}


def points(runs: Sequence[Run]) -> list[Point]:
    """Runs of one configuration together, by data set and falling cost."""
    groups: dict[Point, list[Run]] = defaultdict(list)
    names = _data_sets(runs)
    for run in runs:
        groups[_point(run, names)].append(run)
    merged = [replace(point, settings=group[0].settings, runs=_distinct(group)) for point, group in groups.items()]
    return sorted(merged, key=lambda p: (p.dataset, -p.gflops, p.selection, p.sigma))


def _tested(run: Run) -> tuple[str, str]:
    """Name of a run's data set, and what tells its test videos from others."""
    data = run.result["dataset"]
    return printable(str(data["name"])), tested_hash(data) or ""


def _data_sets(runs: Sequence[Run]) -> dict[tuple[str, str], str]:
    """What each data set is called: by its name, and by its test videos as well where others have that name."""
    found = list(dict.fromkeys(map(_tested, runs)))
    alike = Counter(name for name, _ in found)
    return {
        (name, videos): name if alike[name] == 1 else f"{name} (test list {videos[:8] or 'unknown'})" for name, videos in found
    }


def _point(run: Run, names: Mapping[tuple[str, str], str]) -> Point:
    """What a run has in common with its other seeds."""
    r = run.result
    choices = "".join(f" {name}={value}" for name, value in (r.get("backbone_choices") or {}).items())
    keeps = "; ".join(f"{slot.upper()}: {text}" for slot, text in r["slots"].items()) or "all"
    # Runs of earlier versions knew the paper's way alone.
    operator = ", ".join(filter(None, (r["scorer"], r["estimator"], r.get("ways_to_learn", "")))) if r["slots"] else ""
    sigma = float(r["sigma"]) if r["slots"] and r["scorer"] else 0.0
    name, gflops, views = names[_tested(run)], r["gflops_per_view"], r["views"]
    settings = _effective(run.settings, r["slots"])
    return Point(name, r["backbone"] + choices, r["selection"], keeps, operator, sigma, gflops, views, settings, ())


def _effective(settings: Iterable[tuple[str, str]], slots: Iterable[str]) -> tuple[tuple[str, str], ...]:
    """Settings without those of selectors or reducers that the model does not have: they change nothing."""
    axes = {slot[0] for slot in slots}
    idle = r"selection\.(reducer|proportional_\w+)|callbacks\.ratio\..*"
    if not axes:
        idle = r"(selection|callbacks\.(sigma|ratio)|optim\.parts\.selectors)\..*"
    return tuple((key, value) for key, value in settings if "r" in axes or not re.fullmatch(idle, key))


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
        ratio, name = rf"selection\.slots\.{slot}\.(ratio|drop)", partial(_without, slot)
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
