"""Does learned selection pay? Every way of choosing on the same data, with equal budgets, several seeds and the truth beside it.

    python scripts/study.py runs/study                            # the demo's three settings
    python scripts/study.py runs/study --data NAME=FOLDER --start FILE
                                                                  # also a data set made by prepare_data task=embed, whose
                                                                  # unpruned models begin with the weights of a file
    python scripts/study.py runs/study --small                    # two seeds and what matters: an hour

Each seed trains one unpruned model a data set; every method starts from it and is tuned for the same number of steps. A run is a
`stts_lightning.train` in a process and a folder of its own; what is finished is not run again, what fails is named and the rest
goes on. At the end docs/study_runs.jsonl has a line for each run (what it cost, and which test videos it has right), and the
tables in docs/study.md are written anew from these lines. Lines of a seed that was run elsewhere stay until it is run here.
"""

import argparse
import functools
import json
import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor

from stts_lightning.analysis.evaluation import Predictions, bootstrap, probabilities
from stts_lightning.analysis.results import read_result
from stts_lightning.data.annotations import read_list
from stts_lightning.data.truth import truth_file

PAGE = Path(__file__).resolve().parents[1] / "docs" / "study.md"
RUNS = PAGE.with_name("study_runs.jsonl")
MARKS = ("<!-- tables: written by scripts/study.py -->", "<!-- end of tables -->")
RESAMPLES = 10_000

COMMON = ["backbone=mvit_tiny", "callbacks.progress=null", "callbacks.best=null", "callbacks.loading=null"]
FIXED = {"t": "uniform", "s": "centre"}


@dataclass(frozen=True)
class Method:
    """A way of choosing.

    Attributes:
        label: what tables call it.
        overrides: of the run; {plain} is the unpruned model's checkpoint, {half} half of the epochs.
        recipe: of the run.
        slots: selectors of the slots of an axis, where they differ: {"t": "gumbel"}.
        axes: budgets that it can choose for: "t", "s", "ts".
        main: whether the small study has it.
    """

    label: str
    overrides: tuple[str, ...] = ()
    recipe: str = "finetune"
    slots: dict[str, str] = field(default_factory=dict)
    axes: tuple[str, ...] = ("t", "s", "ts")
    main: bool = False

    @property
    def folder(self) -> str:
        """Its part of a folder's name."""
        return self.label.replace(", ", "_").replace(" ", "_").replace("=", "-").replace("(", "").replace(")", "")


def chosen(selector: str) -> tuple[str, ...]:
    """Overrides of a method that is a selector's name."""
    return (f"selection.selector={selector}",)


PAPER = ("selection.sigma=0.1",)
WIDE = ("selection.sigma=0.5",)
EVEN = ("selection.start=even", "selection.sigma=0.3", "optim.parts.selectors.lr_scale=1.0")
"""As the recipe was at first: no preference, more noise, a lower rate."""
FROZEN = ("+optim.parts.backbone.frozen_epochs={half}", "+optim.parts.head.frozen_epochs={half}")
"""Backbone and head learn in the second half alone."""
METHODS = (
    Method("oracle", chosen("oracle"), main=True),
    Method("oracle, one window a clip", (*chosen("oracle"), "selection.windows=clip"), axes=("s", "ts"), main=True),
    Method("random", chosen("random"), main=True),
    Method("fixed (uniform, centre)", slots=FIXED, main=True),
    Method("difference to the frame before", chosen("difference")),
    Method("Gumbel-Softmax", slots={"t": "gumbel"}, axes=("t",)),
    Method("STTS as in the paper, sigma 0.1", PAPER, main=True),
    Method("STTS as in the paper, sigma 0.5", WIDE, main=True),
    Method("STTS as released", ("selection.scorer=official", "selection.estimator=official", *PAPER)),
    Method("the recipe with a higher rate", ("optim.parts.selectors.lr_scale=3.0",), recipe="learn_selection"),
    Method("the recipe with an even start", EVEN, recipe="learn_selection"),
    Method("the recipe with an even start, paper scorer", (*EVEN, "selection.scorer=paper"), recipe="learn_selection"),
    Method("recipe=learn_selection", recipe="learn_selection", main=True),
)
"""Rows of the main tables."""

OPTIONS = (
    Method("start=even", (*WIDE, "selection.start=even")),
    Method("start=small", (*WIDE, "selection.start=small")),
    Method("backbone frozen at first", (*WIDE, *FROZEN)),
    Method("normalize=windows", (*WIDE, "selection.normalize=windows")),
    Method("scope=clip", (*WIDE, "selection.scope=clip")),
    Method("windows=clip", (*WIDE, "selection.windows=clip")),
    Method("windows=smooth", (*WIDE, "selection.windows=smooth")),
    Method("forward=hard", (*WIDE, "selection.forward=hard")),
    Method("sigma of spread", ("selection.sigma=1.0", "selection.sigma_of=spread")),
    Method("sigma until 0.6", (*WIDE, "callbacks.sigma.until=0.6")),
    Method("scorer=context", (*WIDE, "selection.scorer=context")),
    Method("distilled", (*WIDE, "distill.teacher={plain}")),
)
"""Each option alone, on top of the paper's method with sigma 0.5, where both time and place matter."""

ON_REAL_VIDEOS = ("difference to the frame before", "STTS as released")
"""What a small study compares there too: motion is seen in the differences, not in the mean of a frame."""

ATTENTION = Method("attention of the class token", chosen("attention"))
"""Chooses what the block before attended to; needs a block before it."""

RANDOM, FIXED_CHOICE = "random", "fixed (uniform, centre)"
BASES = (RANDOM, FIXED_CHOICE, "STTS as in the paper, sigma 0.5", "recipe=learn_selection")
"""Rows that each option alone is compared with."""
BESIDE_ATTENTION = ("oracle", RANDOM, FIXED_CHOICE, "STTS as in the paper, sigma 0.1", "recipe=learn_selection")
"""Rows that attention is compared with."""


@dataclass(frozen=True)
class DataSet:
    """How a data set is used.

    Attributes:
        data: overrides of every run.
        plain: overrides of the unpruned models.
        budgets: what is kept, from half of the tokens down.
        attended: the budget at which attention is compared; empty for none.
        options: the budget at which each option is tried alone; empty for none.
        epochs: of tuning.
        also: rows that its small study has beside the main ones.
        tested: list of the test videos, where several were made of one source; None where each is its own.
    """

    data: tuple[str, ...]
    plain: tuple[str, ...]
    budgets: tuple[str, ...]
    attended: str = ""
    options: str = ""
    epochs: int = 2
    also: tuple[str, ...] = ()
    tested: Path | None = None


DEMOS = {
    "when": (("t0_0.5", "t0_0.25"), "t1_0.25"),
    "where": (("s0_0.5", "s0_0.25"), "s1_0.25"),
    "both": (("t0_0.7_s0_0.7", "t0_0.5_s0_0.25"), "t1_0.5_s1_0.25"),
}
"""Budgets of each setting, and that of attention."""


def data_sets(own: Sequence[str], start: Path | None = None) -> dict[str, DataSet]:
    """The demo's settings, and folders given as NAME=FOLDER; `start` is what the unpruned models of these begin with."""
    plain = ("recipe=scratch", "trainer.max_epochs=4")
    found = {
        f"demo_{setting}": DataSet(
            ("dataset=demo", f"dataset.setting={setting}"), plain, budgets, attended, budgets[-1] if setting == "both" else ""
        )
        for setting, (budgets, attended) in DEMOS.items()
    }
    for given in own:
        name, _, place = given.partition("=")
        root = Path(place).resolve()
        # Few and long videos: a clip has a frame of each sixteenth of a video, and all of the picture.
        data = (
            "dataset=list", f"dataset.train={root}/train.csv", f"dataset.val={root}/val.csv", f"dataset.name={name}",
            f"dataset.manifest={root}/manifest.csv", "dataset.truth=true", "clip.sampling=segments", "clip.test_views=1",
            "clip.decoder=pyav", "clip.decode_timeout=null",  # Twice as fast for small files that are known to decode.
            "clip.short_side=crop", "clip.train_transform.scale=[0.6,1.0]", "clip.train_transform.ratio=[0.8,1.25]",
        )  # fmt: skip
        budgets = ("t0_0.5", "s0_0.5", "t0_0.5_s0_0.5")
        unpruned = ("recipe=scratch", "trainer.max_epochs=12")
        if start:
            unpruned = (
                f"pretrained={start.resolve()}",
                "recipe=scratch",
                "trainer.max_epochs=8",
                "optim.lr=3e-4",
                "backbone.drop_path=0.2",
            )
        found[name] = DataSet(data, unpruned, budgets, epochs=8, also=ON_REAL_VIDEOS, tested=root / "val.csv")
    return found


def axes(kept: str) -> str:
    """Axes of a budget: "t", "s" or "ts"."""
    return "".join(sorted({part[0] for part in kept.split("_")[::2]}, key="ts".index))


def train(log: Path, overrides: list[str], threads: int) -> None:
    """What a process of its own does: the training command, its output in a file."""
    from stts_lightning.train import main

    with log.open("w") as output:
        os.dup2(output.fileno(), sys.stdout.fileno())
        os.dup2(output.fileno(), sys.stderr.fileno())
    torch.set_num_threads(threads)
    sys.argv = ["train", *COMMON, *overrides]
    main()


# A server that has the packages loaded makes the processes: half of a short run would go into importing them.
PROCESSES = multiprocessing.get_context("forkserver")


@dataclass(frozen=True)
class Job:
    """One run: its folder and its overrides."""

    folder: Path
    overrides: list[str]

    def run(self, threads: int) -> bool:
        """Run it unless it has a result; True if it has one afterwards."""
        result = self.folder / "result.json"
        if not result.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            arguments = (self.folder / "output.log", [*self.overrides, f"hydra.run.dir={self.folder}"], threads)
            process = PROCESSES.Process(target=train, args=arguments)
            process.start()
            process.join()
            if not result.is_file():
                print(f"failed: {self.folder} (see output.log in it)", file=sys.stderr)
        return result.is_file()


@dataclass(frozen=True)
class Row:
    """A line of a table: a method at a budget on a data set, and where its runs lie."""

    data: str
    kept: str
    method: Method

    def folder(self, root: Path, seed: int) -> Path:
        """Of one run."""
        return root / self.data / f"{self.kept}_{self.method.folder}_seed{seed}"


ALL = Method("all tokens, tuned as the others", main=True)


def plain_folder(root: Path, data: str, seed: int) -> Path:
    """Of the unpruned model that the methods start from."""
    return root / data / f"plain_seed{seed}"


def rows(name: str, data: DataSet, small: bool) -> Iterator[Row]:
    """What is compared on a data set, what matters most first."""
    yield Row(name, "none", ALL)
    *larger, smallest = data.budgets

    def wanted(method: Method) -> bool:
        return not small or method.main or method.label in data.also

    yield from (Row(name, smallest, method) for method in METHODS if axes(smallest) in method.axes and wanted(method))
    if small:
        return
    if data.options:
        yield from (Row(name, data.options, method) for method in OPTIONS)
    if data.attended:
        beside = [method for method in METHODS if method.label in BESIDE_ATTENTION]
        yield from (Row(name, data.attended, method) for method in (*beside, ATTENTION))
    for kept in larger:
        yield from (Row(name, kept, method) for method in METHODS if axes(kept) in method.axes)


def plain(root: Path, name: str, data: DataSet, seed: int) -> Job:
    """The run of the unpruned model that the methods start from."""
    return Job(plain_folder(root, name, seed), [*data.data, "selection=none", *data.plain, f"seed={seed}"])


def job(root: Path, row: Row, data: DataSet, seed: int) -> Job:
    """A row's run with one seed."""
    parts = [] if row.kept == "none" else list(zip(*[iter(row.kept.split("_"))] * 2, strict=True))
    slots = [f"+selection.slots.{slot}.ratio={ratio}" for slot, ratio in parts]
    slots += [f"+selection.slots.{slot}.selector={row.method.slots[slot[0]]}" for slot, _ in parts if slot[0] in row.method.slots]
    start = f"{plain_folder(root, row.data, seed)}/checkpoints/last.ckpt"
    own = [override.replace("{plain}", start).replace("{half}", str(data.epochs // 2)) for override in row.method.overrides]
    return Job(
        row.folder(root, seed),
        [
            *data.data,
            "selection=none",
            *slots,
            f"recipe={row.method.recipe}",
            f"trainer.max_epochs={data.epochs}",
            *own,
            f"pretrained={start}",
            f"seed={seed}",
        ],
    )


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
    """The video that each of a list of embedded videos was made of."""
    paths = [video.path for video in read_list(tested).videos]
    return tuple(json.loads(truth_file(path).read_text())["embedding"]["source"] for path in paths)


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
    """

    data: str
    kept: str
    method: str
    seed: int
    gflops: float
    top1: float
    found: dict[str, float]
    right: list[float]

    @property
    def key(self) -> tuple[str, str, str, int]:
        """What tells runs apart."""
        return self.data, self.kept, self.method, self.seed


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
    cost, top1 = round(float(result["gflops_per_view"]), 4), round(float(result["top1"]), 6)
    return Run(row.data, row.kept, row.method.label, seed, cost, top1, found, share)


def collect(root: Path, found: dict[str, DataSet], seeds: range) -> list[Run]:
    """Finished runs of a folder, and the stored ones of seeds that the folder has nothing of."""
    runs: list[Run] = []
    for name, data in found.items():
        for seed in seeds:
            runs += filter(None, [read_run(plain_folder(root, name, seed), Row(name, "none", Method(PLAIN)), seed, data.tested)])
            every = {row.folder(root, seed): row for row in rows(name, data, small=False)}
            runs += filter(None, [read_run(folder, row, seed, data.tested) for folder, row in every.items()])
    stored = [Run(**json.loads(line)) for line in RUNS.read_text().splitlines()] if RUNS.is_file() else []
    here = {(run.data, run.seed) for run in runs}
    runs += [run for run in stored if (run.data, run.seed) not in here]
    return sorted(runs, key=lambda run: run.key)


class Outcome:
    """What the runs of a row say, over the seeds that are finished."""

    def __init__(self, runs: Sequence[Run], data: str, kept: str, label: str) -> None:
        self.runs = {run.seed: run for run in runs if run.key[:3] == (data, kept, label)}
        self.right = {seed: torch.tensor(run.right, dtype=torch.float64) for seed, run in self.runs.items()}

    def minus(self, other: "Outcome") -> str:
        """Interval of the difference to another row, over the videos, paired, as a mean over the seeds that both have."""
        both = [seed for seed in self.runs if seed in other.runs]
        if not both:
            return ""
        pairs = [self.right[seed] - other.right[seed] for seed in both]
        return percent(*interval(torch.stack(pairs).mean(0)), sign=True)

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


def table(runs: Sequence[Run], data: str, kept: str, labels: Sequence[str]) -> list[str]:
    """A table in Markdown; differences are to the random and the fixed choice of the same budget. Empty if no row has a run."""
    head = ["chosen by", "GFLOPs a view", "top-1 (95 % interval)", "each seed", "action found, %", "minus random", "minus fixed"]
    outcomes = {label: Outcome(runs, data, kept, label) for label in labels}
    outcomes = {label: outcome for label, outcome in outcomes.items() if outcome.runs}
    random, fixed = outcomes.get(RANDOM), outcomes.get(FIXED_CHOICE)
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)] if outcomes else []
    for label, outcome in outcomes.items():
        against = {RANDOM: [None, None], FIXED_CHOICE: [random, None]}.get(label, [random, fixed])
        lines.append("| " + " | ".join([label, *outcome.cells(against)]) + " |")
    return lines


def tables(runs: Sequence[Run]) -> str:
    """All tables in Markdown."""
    lines: list[str] = []
    own = sorted({run.data for run in runs if not run.data.startswith("demo_")})
    for name, data in data_sets([f"{name}=." for name in own]).items():
        if all(run.data != name for run in runs):
            continue
        main, alone = [method.label for method in (*METHODS, ATTENTION)], [method.label for method in OPTIONS]
        lines += ["", f"### {name}", "", *table(runs, name, "none", [PLAIN, ALL.label])]
        for kept in filter(None, (*data.budgets, data.attended)):
            written = table(runs, name, kept, main)
            lines += ["", f"**{kept}**", "", *written] if written else []
        if any(run.data == name and run.method in alone for run in runs):
            base = [method.label for method in METHODS if method.label in BASES]
            lines += ["", f"**{data.options}, each option alone**", "", *table(runs, name, data.options, [*base, *alone])]
    return "\n".join(lines).strip()


def main() -> None:
    """Run what is missing, then write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="folder of the runs")
    parser.add_argument("--data", action="append", default=[], metavar="NAME=FOLDER", help="a folder with train.csv and val.csv")
    parser.add_argument("--start", type=Path, metavar="FILE", help="checkpoint that unpruned models of --data begin with")
    parser.add_argument("--only", nargs="*", help="these data sets alone")
    parser.add_argument("--small", action="store_true", help="two seeds, the smallest budgets and the methods that matter")
    parser.add_argument("--seeds", type=int, help="how many; 5, or 2 with --small")
    parser.add_argument("--first-seed", type=int, default=0, help="where they begin")
    parser.add_argument("--parallel", type=int, default=max((os.cpu_count() or 2) // 2, 1), help="runs at a time")
    parser.add_argument("--threads", type=int, default=2, help="threads a run")
    parser.add_argument("--tables", action="store_true", help="only write the tables of what is there")
    options = parser.parse_args()
    PROCESSES.set_forkserver_preload(["stts_lightning.train", "stts_lightning.assembly"])
    root, first = options.root.resolve(), options.first_seed
    seeds = range(first, first + (options.seeds or (2 if options.small else 5)))
    found = data_sets(options.data, options.start)
    if not options.tables:
        picked = {name: data for name, data in found.items() if not options.only or name in options.only}
        # A seed is finished on all data sets before the next begins: what is cut off has fewer seeds, not fewer rows.
        jobs: list[list[Job]] = []
        for seed in seeds:
            jobs.append([plain(root, name, data, seed) for name, data in picked.items()])
            jobs.append([job(root, row, data, seed) for name, data in picked.items() for row in rows(name, data, options.small)])
        with Progress() as progress, ThreadPoolExecutor(options.parallel) as pool:
            task = progress.add_task("runs", total=sum(map(len, jobs)))
            for together in jobs:  # Methods start from the unpruned models.
                for _ in pool.map(lambda one: one.run(options.threads), together):
                    progress.advance(task)
    runs = collect(root, found, seeds)
    RUNS.write_text("".join(json.dumps(asdict(run), separators=(",", ":")) + "\n" for run in runs))
    page = PAGE.read_text()
    head, _, rest = page.partition(MARKS[0])
    tail = rest.partition(MARKS[1])[2]
    PAGE.write_text(f"{head}{MARKS[0]}\n\n{tables(runs)}\n\n{MARKS[1]}{tail}")


if __name__ == "__main__":
    main()
