"""Which way of selecting is worth its cost: every selector and estimator on small data, equal budgets, several seeds.

    python scripts/study.py runs/study --ut DIR

Each seed trains one unpruned model a data set; every variant starts from it and is tuned for the same number of steps. A run is a
`stts_lightning.train` in a process and a folder of its own; what is finished is not run again, what fails is named and the rest
goes on. At the end the tables in docs/study.md are written anew.
"""

import argparse
import multiprocessing
import os
import statistics
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import Progress

from stts_lightning.analysis.results import read_result

PAGE = Path(__file__).resolve().parents[1] / "docs" / "study.md"
MARKS = ("<!-- tables: written by scripts/study.py -->", "<!-- end of tables -->")

# What is kept -> how it is chosen -> overrides. The paper's Table 1 in small, with its N/A: no attention before block 0, no
# Gumbel-Softmax in space. Slots before block 1 are there for the attention.
LEARNED = {f"STTS, estimator {name}": [f"selection.estimator={name}"] for name in ("official", "monte_carlo", "exact")}
STTS = {"STTS, estimator monte_carlo": LEARNED["STTS, estimator monte_carlo"]}


def named(*names: str) -> dict[str, list[str]]:
    """Variants that are a selector's name."""
    return {name: [f"selection.selector={name}"] for name in names}


VARIANTS: dict[str, dict[str, list[str]]] = {
    "none": {"all tokens": []},
    "t0_0.5": {**named("random", "uniform", "gumbel"), **LEARNED},
    "s0_0.5": {**named("random", "centre"), **LEARNED, **named("tokens", "random_tokens", "anchor_features")},
    "t0_0.5_s1_0.5": {
        **named("random"),
        **LEARNED,
        "uniform, centre": ["selection.slots.t0.selector=uniform", "selection.slots.s1.selector=centre"],
    },
    "t1_0.5": {**named("random", "attention"), **STTS},
    "s1_0.5": {**named("random", "attention"), **STTS},
}

COMMON = ["backbone=mvit_tiny", "callbacks.progress=null", "callbacks.best=null"]


@dataclass(frozen=True)
class DataSet:
    """How a data set is used.

    Attributes:
        data: overrides of every run.
        plain: overrides of the unpruned models.
        tuned: overrides of what starts from them.
    """

    data: list[str]
    plain: list[str]
    tuned: list[str]


def data_sets(ut: Path | None) -> dict[str, DataSet]:
    """The data sets at hand."""
    tuned = ["recipe=finetune", "selection.sigma=0.5", "trainer.limit_val_batches=0"]
    demo = DataSet(["dataset=demo", "backbone.size=48"], ["recipe=scratch"], [*tuned, "trainer.max_epochs=2"])
    if ut is None:
        return {"demo": demo}
    lists = [f"dataset.train={ut.resolve()}/train.csv", f"dataset.val={ut.resolve()}/val.csv", "dataset.name=ut_interaction"]
    # Few and long videos, half as wide again as high: a clip has a frame of each sixteenth of a video, and all of the picture.
    clip = ["backbone.size=[32,48]", "clip.sampling=segments", "clip.test_views=1", "clip.short_side=crop"]
    light = ["clip.train_transform.scale=[0.7,1.0]", "clip.train_transform.ratio=[1.3,1.7]", "optim.lr=3e-4"]
    return {
        "demo": demo,
        "ut_interaction": DataSet(
            ["dataset=list", *lists, *clip, *light],
            ["recipe=scratch", "trainer.max_epochs=240", "trainer.check_val_every_n_epoch=80"],
            [*tuned, "trainer.max_epochs=20"],
        ),
    }


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
PROCESSES.set_forkserver_preload(["stts_lightning.train", "stts_lightning.assembly"])


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


def folder(root: Path, name: str, kept: str, how: str, seed: int) -> Path:
    """Where a variant's run lies."""
    return root / name / f"{kept}_{how.replace(', ', '_').replace(' ', '_')}_seed{seed}"


def plain_jobs(root: Path, name: str, data: DataSet, seeds: range) -> list[Job]:
    """The models that variants start from."""
    return [
        Job(
            root / name / f"plain_seed{seed}",
            [*data.data, "selection=none", *data.plain, f"seed={seed}"],
        )
        for seed in seeds
    ]


def tuned_jobs(root: Path, name: str, data: DataSet, seeds: range) -> Iterator[Job]:
    """All variants, each of all seeds."""
    for kept, variants in VARIANTS.items():
        slots = [f"+selection.slots.{slot}.ratio={ratio}" for slot, ratio in zip(*[iter(kept.split("_"))] * 2, strict=False)]
        for how, overrides in variants.items():
            chosen = ["selection=none", *slots, *(f"+{o}" if ".slots." in o else o for o in overrides)]
            for seed in seeds:
                start = f"pretrained={root}/{name}/plain_seed{seed}/checkpoints/last.ckpt"
                yield Job(folder(root, name, kept, how, seed), [*data.data, *chosen, *data.tuned, start, f"seed={seed}"])


def row(results: list[dict[str, object]], *labels: str) -> str:
    """A line of a table: mean and standard deviation over seeds."""
    top1 = [100 * float(str(result["top1"])) for result in results]
    spread = f" ± {statistics.stdev(top1):.1f}" if len(top1) > 1 else ""
    each = ", ".join(f"{value:.1f}" for value in top1)
    cost = float(str(results[0]["gflops_per_view"]))
    return "| " + " | ".join([*labels, f"{cost:.3f}", f"{statistics.mean(top1):.1f}{spread}", each]) + " |"


def tables(root: Path, names: list[str], seeds: range) -> str:
    """All tables in Markdown, of the runs that have a result."""
    lines: list[str] = []
    for name in names:
        lines += ["", f"### {name}", "", "| keeps | chosen by | GFLOPs a view | top-1, mean ± deviation | each seed |"]
        lines.append("|---|---|---|---|---|")
        groups = {("all tokens", "the unpruned model, before tuning"): [root / name / f"plain_seed{seed}" for seed in seeds]}
        for kept, variants in VARIANTS.items():
            for how in variants:
                label = ("all tokens", "the unpruned model, tuned as the others") if kept == "none" else (kept, how)
                groups[label] = [folder(root, name, kept, how, seed) for seed in seeds]
        for labels, folders in groups.items():
            results = [read_result(f) for f in folders if (f / "result.json").is_file()]
            lines.append(row(results, *labels) if results else f"| {labels[0]} | {labels[1]} | | no result | |")
    return "\n".join(lines).strip()


def main() -> None:
    """Run what is missing, then write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="folder of the runs")
    parser.add_argument("--ut", type=Path, help="folder of UT-Interaction, with train.csv, val.csv and classes.txt")
    parser.add_argument("--only", choices=["demo", "ut_interaction"], help="run one data set alone")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--parallel", type=int, default=max((os.cpu_count() or 2) // 2, 1), help="runs at a time")
    parser.add_argument("--threads", type=int, default=2, help="threads a run")
    parser.add_argument("--tables", action="store_true", help="only write the tables of what is there")
    options = parser.parse_args()
    root, seeds = options.root.resolve(), range(options.seeds)
    found = data_sets(options.ut)
    if not options.tables:
        chosen = {name: data for name, data in found.items() if options.only in (None, name)}
        plain = [job for name, data in chosen.items() for job in plain_jobs(root, name, data, seeds)]
        tuned = [job for name, data in chosen.items() for job in tuned_jobs(root, name, data, seeds)]
        with Progress() as progress, ThreadPoolExecutor(options.parallel) as pool:
            for title, jobs in (("unpruned models", plain), ("variants", tuned)):
                task = progress.add_task(title, total=len(jobs))
                for _ in pool.map(lambda job: job.run(options.threads), jobs):
                    progress.advance(task)
    page = PAGE.read_text()
    head, _, rest = page.partition(MARKS[0])
    tail = rest.partition(MARKS[1])[2]
    PAGE.write_text(f"{head}{MARKS[0]}\n\n{tables(root, list(found), seeds)}\n\n{MARKS[1]}{tail}")


if __name__ == "__main__":
    main()
