"""What the study's runs say: a line for each in docs/study_runs.jsonl, and the tables that are made of these lines."""

import functools
import hashlib
import json
import math
import os
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pages import header, line
from study_plan import (
    ALL,
    ATTENTION,
    BASES,
    FIXED_CHOICES,
    METHODS,
    OPTIONS,
    ORACLES,
    PAGE,
    RANDOM_CHOICES,
    REDUCED,
    REDUCERS,
    DataSet,
    Method,
    Row,
    data_sets,
    plain_folder,
    rows,
)  # fmt: skip
from torch import Tensor

from stts_lightning.analysis.evaluation import Predictions, bootstrap, probabilities
from stts_lightning.analysis.results import read_result, tested_hash
from stts_lightning.data.annotations import read_list
from stts_lightning.data.truth import truth_file

RUNS = PAGE.with_name("study_runs.jsonl")
RESAMPLES = 10_000


def right(folder: Path, tested: Path | None = None) -> Tensor:
    """Which test videos a run has right, 0 or 1 in the order of the list, `(N,)` float64.

    Of videos that were made of one source, the share of them: they are no independent tests.
    """
    found = Predictions.load(folder / "test" / "predictions.npz")
    order = np.argsort(found.video)
    correct = (probabilities(found).argmax(1) == torch.from_numpy(found.label))[order].double()
    if tested is None:
        return correct
    of = torch.from_numpy(np.unique(sources(tested), return_inverse=True)[1])
    return torch.zeros(int(of.max()) + 1, dtype=torch.float64).scatter_reduce(0, of, correct, "mean", include_self=False)


@functools.cache
def sources(tested: Path) -> tuple[str, ...]:
    """The video that each of a list was made of, and the folder; a video that was not embedded is its own."""
    found: list[str] = []
    for video in read_list(tested).videos:
        source = json.loads(truth_file(video.path).read_text()).get("embedding", {}).get("source", video.path.name)
        found.append(f"{source} in {os.path.relpath(video.path.parent, tested.parent)}")
    return tuple(found)


def tested_videos(result: Mapping[str, Any], tested: Path | None) -> str:
    """Twelve digits that tell the videos that `right` is of from others."""
    if tested is None:
        return tested_hash(result["dataset"]) or ""
    return hashlib.sha256("\n".join(sorted(set(sources(tested)))).encode()).hexdigest()[:12]


def interval(values: Tensor) -> tuple[float, float]:
    """95 % interval of the mean over videos, by the bootstrap."""
    return bootstrap(values, RESAMPLES)


def percent(low: float, high: float, sign: bool = False) -> str:
    """An interval in points."""
    return f"{100 * low:+.1f} to {100 * high:+.1f}" if sign else f"{100 * low:.1f} to {100 * high:.1f}"


@dataclass(frozen=True)
class Run:
    """What is known of a finished run, a line of docs/study_runs.jsonl.

    Attributes:
        data: name of the data set.
        kept: budget, "none" for all tokens.
        method: label of the row.
        seed: of the run and of the unpruned model that it starts from.
        gflops: of a view.
        top1: 0 to 1.
        found: share of the action that each slot kept.
        right: share of the copies of each test video that it has right; 0 or 1 where each is its own.
        videos: tells these videos from others.
        calibration: expected calibration error, which also tells models apart that have the same videos right.
    """

    data: str
    kept: str
    method: str
    seed: int
    gflops: float
    top1: float
    found: dict[str, float]
    right: list[float]
    videos: str
    calibration: float | None = None

    @property
    def key(self) -> tuple[str, str, str, int]:
        """What tells runs apart."""
        return self.data, self.kept, self.method, self.seed

    def alike(self, other: "Run") -> bool:
        """Whether both may be of one model: nothing that is known of both differs."""
        known = None not in (self.calibration, other.calibration)
        return self.right == other.right and (not known or self.calibration == other.calibration)


FIGURES = (("gflops_per_view", 4), ("top1", 6), ("calibration_error", 6))
"""What is stored of a result, and its decimals."""
PLAIN = "the unpruned model, before tuning"
"""Row of the models that the methods start from."""


def read_run(folder: Path, row: Row, seed: int, tested: Path | None) -> Run | None:
    """What the folder of a run says; None if the run is not finished."""
    if not (folder / "result.json").is_file():
        return None
    result = read_result(folder)
    keys = {slot: f"last/selection/{slot}/found" for slot in result["slots"] or {}}
    found = {slot: round(float(result[key]), 4) for slot, key in keys.items() if key in result}
    share = [round(value, 4) for value in right(folder, tested).tolist()]
    cost, top1, error = (round(float(result[key]), digits) for key, digits in FIGURES)
    return Run(row.data, row.kept, row.method.label, seed, cost, top1, found, share, tested_videos(result, tested), error)


def collect(root: Path, found: dict[str, DataSet], seeds: range, without: Collection[Path] = ()) -> list[Run]:
    """Finished runs of a folder, and stored ones: of seeds that it has nothing of, or whose unpruned model is the folder's.

    Stored runs of a data set of the same name with other test videos are left out, and named; so are folders in `without`.
    """
    runs: list[Run] = []
    for name, data in found.items():
        for seed in seeds:
            every = {plain_folder(root, name, seed): Row(name, "none", Method(PLAIN))}
            every |= {row.folder(root, seed): row for row in rows(name, data, small=False)}
            read = (read_run(folder, row, seed, data.tested) for folder, row in every.items() if folder not in without)
            runs += filter(None, read)
    stored = [Run(**json.loads(line)) for line in RUNS.read_text().splitlines()] if RUNS.is_file() else []
    videos = {run.data: run.videos for run in runs}
    if other := sorted({run.data for run in stored if videos.get(run.data, run.videos) != run.videos}):
        print(f"{RUNS}: its runs of {', '.join(other)} are of other test videos, and left out", file=sys.stderr)
        stored = [run for run in stored if run.data not in other]
    done = {run.key for run in runs}
    here, before = ({(run.data, run.seed): run for run in of if run.method == PLAIN} for of in (runs, stored))
    same = {one for one, run in here.items() if one in before and run.alike(before[one])}
    others = {(run.data, run.seed) for run in runs} - same
    runs += [run for run in stored if run.key not in done and (run.data, run.seed) not in others]
    return sorted(runs, key=lambda run: run.key)


class Outcome:
    """What the runs of a row say, over the seeds that are finished."""

    def __init__(self, runs: Sequence[Run], data: str, kept: str, label: str) -> None:
        self.runs = {run.seed: run for run in runs if run.key[:3] == (data, kept, label)}
        self.right = {seed: torch.tensor(run.right, dtype=torch.float64) for seed, run in self.runs.items()}

    def pairs(self, other: "Outcome") -> list[Tensor]:
        """The difference to another row, video by video, of each seed that both have."""
        return [self.right[seed] - other.right[seed] for seed in self.runs if seed in other.runs]

    def minus(self, other: "Outcome") -> str:
        """Interval of the difference to another row, over the videos, as a mean over the seeds that both have."""
        pairs = self.pairs(other)
        return percent(*interval(torch.stack(pairs).mean(0)), sign=True) if pairs else ""

    def mean(self, seeds: Collection[int]) -> float:
        """Mean accuracy of those of these seeds that it has, in percent; NaN for none."""
        top1 = [100 * run.top1 for seed, run in self.runs.items() if seed in seeds]
        return float(np.mean(top1)) if top1 else math.nan

    def found(self) -> str:
        """How much of the action was kept, of each slot, in percent."""
        shares = [run.found for run in self.runs.values()]
        return ", ".join(f"{100 * np.mean([share[slot] for share in shares]):.0f}" for slot in shares[0])

    def cells(self, against: Sequence["Outcome | None"]) -> list[str]:
        """Cost, accuracy with its interval, each seed, what was found, and differences."""
        top1 = [100 * run.top1 for run in self.runs.values()]
        low, high = interval(torch.stack(list(self.right.values())).mean(0))
        each = ", ".join(f"{value:.1f}" for value in top1)
        differences = [self.minus(other) if other else "" for other in against]
        cost = f"{next(iter(self.runs.values())).gflops:.3f}"
        return [cost, f"{np.mean(top1):.1f} ({percent(low, high)})", each, self.found(), *differences]


def better(runs: Sequence[Run], data: str, kept: str, labels: Sequence[str], seeds: Collection[int]) -> Outcome:
    """Of some rows the one with the highest mean over the seeds that all have, of those asked for.

    A row with half as many of these seeds as another, or fewer, is left out: it would say little of the others.
    """
    outcomes = [Outcome(runs, data, kept, label) for label in labels]
    most = max(len(one.runs.keys() & seeds) for one in outcomes)
    known = [one for one in outcomes if 2 * len(one.runs.keys() & seeds) > most] or outcomes
    shared = set(seeds).intersection(*(one.runs for one in known)) or set(seeds)
    return max(known, key=lambda one: np.nan_to_num(one.mean(shared)))


def table(runs: Sequence[Run], data: str, kept: str, labels: Sequence[str]) -> list[str]:
    """A table in Markdown; empty if no row has a run.

    Differences are to the better random and the better fixed choice of the same budget.
    """
    head = ["chosen by", "GFLOPs a view", "top-1 (95 % interval)", "each seed", "action found, %", "minus random", "minus fixed"]
    outcomes = {label: Outcome(runs, data, kept, label) for label in labels}
    outcomes = {label: outcome for label, outcome in outcomes.items() if outcome.runs}
    lines = header(*head) if outcomes else []
    for label, outcome in outcomes.items():
        random, fixed = (better(runs, data, kept, choices, set(outcome.runs)) for choices in (RANDOM_CHOICES, FIXED_CHOICES))
        against = [random, fixed]
        if label in RANDOM_CHOICES:
            against = [None, None]
        elif label in FIXED_CHOICES:
            against = [random, None]
        lines.append(line(label, *outcome.cells(against)))
    return lines


def first_block(kept: str) -> bool:
    """Whether all tokens of a budget are left out before block 0."""
    return all(slot[1:] == "0" for slot in kept.split("_")[::2])


RECIPE = "recipe=learn_selection"
FOLD = re.compile(r"_fold\d+$")
"""Ends the name of a data set that has the videos of another, with other people or recordings to test with."""


class Compared(NamedTuple):
    """The recipe at a budget on a data set, and the best of what it must beat; `videos` tells the test videos from others."""

    plain: Outcome
    oracle: Outcome
    random: Outcome
    fixed: Outcome
    recipe: Outcome
    videos: str


def compare(runs: Sequence[Run], data: str, kept: str) -> Compared:
    """What the summary says of a data set and budget; of rows that the recipe's seeds have."""
    recipe = Outcome(runs, data, kept, RECIPE)

    def best(labels: Sequence[str]) -> Outcome:
        return better(runs, data, kept, labels, recipe.runs.keys())

    videos = next(iter(recipe.runs.values())).videos
    return Compared(Outcome(runs, data, "none", PLAIN), best(ORACLES), best(RANDOM_CHOICES), best(FIXED_CHOICES), recipe, videos)


class Setting(NamedTuple):
    """A line of the summary: what is kept of a data set; `name` is the same for all folds."""

    name: str
    data: str
    kept: str
    compared: Compared


def settings(runs: Sequence[Run]) -> list[Setting]:
    """All data sets and budgets before block 0 that have the recipe and a row beside it.

    The demo comes first, and a data set's folds stand together.
    """
    learned = {(run.data, run.kept) for run in runs if run.method == RECIPE and first_block(run.kept)}
    beside = {(run.data, run.kept) for run in runs if run.method in (*ORACLES, *RANDOM_CHOICES, *FIXED_CHOICES)}
    found = [Setting(FOLD.sub("", data), data, kept, compare(runs, data, kept)) for data, kept in learned & beside]
    return sorted(found, key=lambda one: (not one.data.startswith("demo_"), one.name, one.kept, one.data))


def summary(runs: Sequence[Run]) -> str:
    """The recipe beside what it must beat, in Markdown.

    A line for each data set and budget before block 0; below them one for all folds; one for all real videos.
    """
    head = ("data", "kept", "unpruned", "oracle", "random", "fixed", "recipe, each seed", "recipe - random", "recipe - fixed",
            "oracle - recipe")  # fmt: skip
    lines = header(*head)
    real: list[Compared] = []
    for (name, kept), group in groupby(settings(runs), lambda one: (one.name, one.kept)):
        folds = list(group)
        of = [one.compared for one in folds]
        lines += [compared_line(one.data, kept, one.compared) for one in folds]
        if len(folds) > 1:
            lines.append(line(f"{name}, {len(folds)} folds", kept, *means(of), *differences(of)))
        if not name.startswith("demo_"):
            real += of
    if len(real) > 1:
        lines.append(line("all real videos", "", "", "", "", "", "", *differences(real)))
    return "\n".join(lines)


def compared_line(name: str, kept: str, one: Compared) -> str:
    """A line of the summary."""
    each = ", ".join(f"{100 * run.top1:.1f}" for run in one.recipe.runs.values())
    return line(name, kept, *means([one])[:-1], each, *differences([one]))


def means(sets: Sequence[Compared]) -> list[str]:
    """Mean accuracy of each row over all test videos, with the seeds that the recipe has; empty where one has none of them."""
    count = [len(next(iter(one.recipe.right.values()))) for one in sets]
    each = [[row.mean(one.recipe.runs.keys()) for row in one[:5]] for one in sets]
    return ["" if math.isnan(mean) else f"{mean:.1f}" for mean in np.average(each, axis=0, weights=count)]


def differences(sets: Sequence[Compared]) -> list[str]:
    """Recipe less random, recipe less fixed, and oracle less recipe, over the test videos of one or several data sets.

    Data sets with the same test videos are averaged video by video.
    """
    cells: list[str] = []
    for better, worse in (("recipe", "random"), ("recipe", "fixed"), ("oracle", "recipe")):
        alike: dict[str, list[Tensor]] = {}
        for one in sets:
            alike.setdefault(one.videos, []).extend(getattr(one, better).pairs(getattr(one, worse)))
        pairs = [torch.stack(found).mean(0) for found in alike.values() if found]
        values = torch.cat(pairs) if pairs else None
        cells.append("" if values is None else f"{100 * float(values.mean()):+.1f} ({percent(*interval(values), sign=True)})")
    return cells


def tables(runs: Sequence[Run]) -> str:
    """All tables in Markdown."""
    lines: list[str] = []
    own = sorted({run.data for run in runs if not run.data.startswith("demo_")})
    for name, data in data_sets([f"{name}=." for name in own]).items():
        if all(run.data != name for run in runs):
            continue
        main, alone = [method.label for method in (*METHODS, ATTENTION, *REDUCERS)], [method.label for method in OPTIONS]
        lines += ["", f"### {name}", "", *table(runs, name, "none", [PLAIN, ALL.label])]
        given = sorted({run.kept for run in runs if run.data == name and run.kept != "none"})
        for kept in dict.fromkeys((*data.budgets, REDUCED, data.attended, *given)):
            written = table(runs, name, kept, main)
            lines += ["", f"**{kept}**", "", *written] if written else []
        if any(run.data == name and run.method in alone for run in runs):
            base = [method.label for method in METHODS if method.label in BASES]
            lines += ["", f"**{data.options}, each option alone**", "", *table(runs, name, data.options, [*base, *alone])]
    return "\n".join(lines).strip()
