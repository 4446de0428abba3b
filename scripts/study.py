"""Does learned selection pay? Every way of choosing on the same data, with equal budgets, several seeds and the truth beside it.

    python scripts/study.py runs/study                            # the demo's three settings
    python scripts/study.py runs/study --data NAME=FOLDER --start FILE
                                                                  # also a data set made by prepare_data task=embed, whose
                                                                  # unpruned models begin with the weights of a file
    python scripts/study.py runs/study --small                    # one seed and what matters: an hour on two cores

Each seed trains one unpruned model a data set; every method starts from it and is tuned for the same number of steps. A run is a
`stts_lightning.train` in a process and a folder of its own; what is finished is not run again, what fails is named and the rest
goes on. At the end docs/study_runs.jsonl has a line for each run (what it cost, and which test videos it has right), and the
summary in docs/study.md and the tables in docs/study_details.md are written anew from these lines. Lines of a seed that was run
elsewhere stay until it is run here.
"""

import argparse
import json
import multiprocessing
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch
from pages import fill
from rich.progress import Progress
from study_plan import COMMON, DETAILS, LABELS, OWN_BUDGETS, PAGE, Job, data_sets, job, plain, rows
from study_results import RUNS, collect, summary, tables

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


def main() -> None:
    """Run what is missing, then write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="folder of the runs")
    parser.add_argument("--data", action="append", default=[], metavar="NAME=FOLDER", help="a folder with train.csv and val.csv")
    parser.add_argument("--start", type=Path, metavar="FILE", help="checkpoint that unpruned models of --data begin with")
    parser.add_argument("--backbone", help="on --data; mvit_tiny")
    parser.add_argument("--budgets", nargs="+", default=OWN_BUDGETS, metavar="KEPT", help="of --data, the smallest last")
    parser.add_argument("--only", nargs="*", help="these data sets alone")
    parser.add_argument("--rows", nargs="*", metavar="LABEL", help="these rows alone, by what the tables call them")
    parser.add_argument("--small", action="store_true", help="one seed, the smallest budgets and the methods that matter")
    parser.add_argument("--seeds", type=int, help="how many; 5, or 1 with --small")
    parser.add_argument("--first-seed", type=int, default=0, help="where they begin")
    parser.add_argument("--parallel", type=int, default=max((os.cpu_count() or 2) // 2, 1), help="runs at a time")
    parser.add_argument("--threads", type=int, default=2, help="threads a run")
    parser.add_argument("--tables", action="store_true", help="only write the tables of what is there")
    options = parser.parse_args()
    if unknown := set(options.rows or ()) - LABELS:
        parser.error(f"--rows: no row is called {', '.join(sorted(unknown))}; there are: {'; '.join(sorted(LABELS))}")
    PROCESSES.set_forkserver_preload(["stts_lightning.train", "stts_lightning.assembly"])
    root, first = options.root.resolve(), options.first_seed
    seeds = range(first, first + (options.seeds or (1 if options.small else 5)))
    found = data_sets(options.data, options.start, options.backbone, options.budgets)
    if not options.tables:
        picked = {name: data for name, data in found.items() if not options.only or name in options.only}
        # A seed is finished on all data sets before the next begins: what is cut off has fewer seeds, not fewer rows.
        jobs: list[list[Job]] = []
        for seed in seeds:
            jobs.append([plain(root, name, data, seed) for name, data in picked.items()])
            wanted = [row for name, data in picked.items() for row in rows(name, data, options.small)]
            if options.rows:
                wanted = [row for row in wanted if row.method.label in options.rows]
            jobs.append([job(root, row, picked[row.data], seed) for row in wanted])
        with Progress() as progress, ThreadPoolExecutor(options.parallel) as pool:
            task = progress.add_task("runs", total=sum(map(len, jobs)))
            for together in jobs:  # Methods start from the unpruned models.
                for _ in pool.map(lambda one: run(one, options.threads), together):
                    progress.advance(task)
    runs = collect(root, found, seeds)
    RUNS.write_text("".join(json.dumps(asdict(run), separators=(",", ":")) + "\n" for run in runs))
    fill(PAGE, SUMMARY, summary(runs))
    fill(DETAILS, MARKS, tables(runs))


if __name__ == "__main__":
    main()
