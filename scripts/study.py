"""Does learned selection pay? Every way of choosing on the same data, with equal budgets, several seeds and the truth beside it.

    python scripts/study.py runs/study                            # the demo's three settings
    python scripts/study.py runs/study --data NAME=FOLDER --start FILE
                                                                  # also a data set made by prepare_data task=embed, whose
                                                                  # unpruned models begin with the weights of a file; NAME_fold2
                                                                  # is the same with other videos to test with
    python scripts/study.py runs/study --small                    # one seed and what matters: an hour on two cores

Each seed trains one unpruned model a data set; every method starts from it and is tuned for the same number of steps. A run is a
`stts_lightning.train` in a process and a folder of its own; what is finished is not run again, and what fails, or was finished
with other settings, is named while the rest goes on. At the end docs/study_runs.jsonl has a line for each run (what it cost, and
which test videos it has right), and the summary and its picture in docs/study.md and the tables in docs/study_details.md are
made anew from these lines. Lines of a seed that was run elsewhere stay until it is run here.
"""

import argparse
import json
import multiprocessing
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch
from pages import fill
from rich.progress import Progress
from study_chart import CHART, chart
from study_plan import COMMON, DETAILS, LABELS, OWN_BUDGETS, PAGE, DataSet, Job, changed, data_sets, job, plain, rows
from study_results import RUNS, collect, settings, summary, tables

SUMMARY = ("<!-- summary: written by scripts/study.py -->", "<!-- end of summary -->")
MARKS = ("<!-- tables: written by scripts/study.py -->", "<!-- end of tables -->")


def train(log: Path, overrides: list[str], threads: int) -> None:
    """What a process of its own does: the training command, its output in a file."""
    from stts_lightning.train import main

    with log.open("w") as output:
        os.dup2(output.fileno(), sys.stdout.fileno())
        os.dup2(output.fileno(), sys.stderr.fileno())
    torch.set_num_threads(threads)
    # As on a command line. Workers of a loader would be made by a server of their own, and each import torch for 5 seconds.
    multiprocessing.set_start_method("fork", force=True)
    sys.argv = ["train", *COMMON, *overrides]
    main()


# A server that has the packages loaded makes the processes: half of a short run would go into importing them.
PROCESSES = multiprocessing.get_context("forkserver")


def run(one: Job, threads: int) -> bool:
    """Run a job unless it has a result; True if it has one afterwards."""
    result = one.folder / "result.json"
    if not result.is_file():
        one.folder.mkdir(parents=True, exist_ok=True)
        arguments = (one.folder / "output.log", [*one.overrides, f"hydra.run.dir={one.folder}"], threads)
        process = PROCESSES.Process(target=train, args=arguments)
        process.start()
        process.join()
        if not result.is_file():
            print(f"failed: {one.folder} (see output.log in it)", file=sys.stderr)
    return result.is_file()


def parsed() -> argparse.Namespace:
    """The command line; what it cannot mean ends with an error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="folder of the runs")
    parser.add_argument("--data", action="append", default=[], metavar="NAME=FOLDER", help="a folder with train.csv and val.csv")
    parser.add_argument("--start", type=Path, metavar="FILE", help="checkpoint that unpruned models of --data begin with")
    parser.add_argument("--backbone", help="on --data; mvit_tiny")
    parser.add_argument("--budgets", nargs="+", default=OWN_BUDGETS, metavar="KEPT", help="of --data, the smallest last")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these data sets alone")
    parser.add_argument("--rows", nargs="+", metavar="LABEL", help="these rows alone, by what the tables call them")
    parser.add_argument("--small", action="store_true", help="one seed, the smallest budgets and the methods that matter")
    parser.add_argument("--seeds", type=int, help="how many; 5, or 1 with --small")
    parser.add_argument("--first-seed", type=int, default=0, help="where they begin")
    parser.add_argument("--parallel", type=int, default=max((os.cpu_count() or 2) // 2, 1), help="runs at a time")
    parser.add_argument("--threads", type=int, default=2, help="threads a run")
    parser.add_argument("--tables", action="store_true", help="only write the tables of what is there")
    options = parser.parse_args()
    if options.seeds is None:
        options.seeds = 1 if options.small else 5
    for name in ("seeds", "parallel", "threads"):
        if (value := getattr(options, name)) < 1:
            parser.error(f"--{name} {value}: 1 or more")
    if unknown := set(options.rows or ()) - LABELS:
        parser.error(f"--rows: no row is called {', '.join(sorted(unknown))}; there are: {'; '.join(sorted(LABELS))}")
    for given in options.data:
        name, _, folder = given.partition("=")
        if not (name and folder):
            parser.error(f"--data {given}: give a name and a folder, as in ut=data/ut")
        if absent := [file for file in ("train.csv", "val.csv", "manifest.csv") if not (Path(folder) / file).is_file()]:
            parser.error(f"--data {given}: {folder} has no {', '.join(absent)}; prepare_data task=embed writes them")
    for budget in options.budgets:
        if not re.fullmatch(BUDGET, budget):
            parser.error(f"--budgets {budget}: give slots and ratios, as in t0_0.5_s0_0.25")
    names = data_sets(options.data)
    if unknown := set(options.only or ()) - names.keys():
        parser.error(f"--only: no data set is called {', '.join(sorted(unknown))}; there are: {', '.join(names)}")
    return options


BUDGET = r"[ts]\d+_[01]?\.\d+(_[ts]\d+_[01]?\.\d+)*"


def planned(options: argparse.Namespace, sets: dict[str, DataSet], seeds: range) -> list[list[Job]]:
    """What is to be run: unpruned models, then methods that start from them, of one seed after the other.

    A seed is finished on all data sets before the next begins: what is cut off has fewer seeds, not fewer rows.
    """
    jobs: list[list[Job]] = []
    for seed in seeds:
        jobs.append([plain(options.root, name, data, seed) for name, data in sets.items()])
        wanted = [row for name, data in sets.items() for row in rows(name, data, options.small)]
        if options.rows:
            wanted = [row for row in wanted if row.method.label in options.rows]
        jobs.append([job(options.root, row, sets[row.data], seed) for row in wanted])
    if not any(jobs[1::2]):
        raise SystemExit("--rows: none of these rows is compared on these data sets and budgets (with --small fewer are)")
    return jobs


def main() -> None:
    """Run what is missing, then write the tables. Ends with 1 if a run failed or was finished with other settings."""
    options = parsed()
    PROCESSES.set_forkserver_preload(["stts_lightning.train", "stts_lightning.assembly"])
    options.root = options.root.resolve()
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    found = data_sets(options.data, options.start, options.backbone, options.budgets)
    every = [
        job(options.root, row, data, seed) for name, data in found.items() for seed in seeds for row in rows(name, data, False)
    ]
    every += [plain(options.root, name, data, seed) for name, data in found.items() for seed in seeds]
    finished = [one for one in every if (one.folder / "result.json").is_file()]
    old = {one.folder: how for one in finished if (how := changed(one))}
    for folder, how in old.items():
        print(f"left out: {folder} was run otherwise ({how}); move it away, and it is run again", file=sys.stderr)
    failed = bool(old)
    if not options.tables:
        picked = {name: data for name, data in found.items() if not options.only or name in options.only}
        jobs = planned(options, picked, seeds)
        with Progress() as progress, ThreadPoolExecutor(options.parallel) as pool:
            task = progress.add_task("runs", total=sum(map(len, jobs)))
            for together in jobs:  # Methods start from the unpruned models.
                for well in pool.map(lambda one: run(one, options.threads), together):
                    failed |= not well
                    progress.advance(task)
    runs = collect(options.root, found, seeds, set(old))
    RUNS.write_text("".join(json.dumps(asdict(run), separators=(",", ":")) + "\n" for run in runs))
    fill(PAGE, SUMMARY, summary(runs))
    chart(settings(runs)).savefig(CHART, dpi=120)
    fill(DETAILS, MARKS, tables(runs))
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
