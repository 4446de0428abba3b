"""Create the W&B dashboard of a project as code: accuracy against GFLOPs, what sigma and the selectors do, panels.

    pip install 'stts-lightning[dashboard]'
    WANDB_API_KEY=... python scripts/wandb_dashboard.py ENTITY [--project stts-lightning] [--print]

It needs a key, even to describe it (`--print` saves nothing). Without one, `python -m stts_lightning.report` draws the same
from the run folders. Runs must have been made with `logger=wandb`; offline ones are uploaded by `wandb sync RUN/wandb/offline-*`.
"""

import argparse
import importlib
import os
import sys
from typing import Any

from stts_lightning.training.loggers import SUMMARY


def sections(reports: Any, workspaces: Any) -> list[Any]:
    """Sections of the workspace; every name is one that a run's summary or history has (`loggers.SUMMARY`, callbacks)."""
    summary = {name: reports.SummaryMetric(name) for name in SUMMARY}

    def scatter(title: str, x: str, log_x: bool = False) -> Any:
        return reports.ScatterPlot(title=title, x=summary[x], y=summary["top1"], log_x=log_x, running_ymax=x.startswith("gflops"))

    def lines(title: str, *metrics: str, regex: str | None = None) -> Any:
        return reports.LinePlot(title=title, x="trainer/global_step", y=list(metrics), metric_regex=regex)

    cost = [
        scatter("top-1 against GFLOPs a view", "gflops_per_view"),
        scatter("top-1 against GFLOPs of the test", "gflops", log_x=True),
        scatter("top-1 against clips a second (of one machine)", "clips_per_second"),
        scatter("top-1 against tokens kept", "tokens_kept"),
        scatter("top-1 against the first sigma", "sigma"),
        reports.ParallelCoordinatesPlot(
            columns=[
                reports.ParallelCoordinatesPlotColumn(metric=summary[n])
                for n in ("sigma", "tokens_kept", "gflops_per_view", "top1")
            ]
        ),
    ]
    selectors = [
        lines("sigma", "sigma"),
        lines("entropy of the scores", regex="selection/.*/entropy"),
        lines("changed choices", regex="selection/.*/changed"),
        lines("different choices", regex="selection/.*/choices"),
        lines("train-test gap", "selection/gap"),
        reports.MediaBrowser(title="what is kept", media_keys=["selection"]),
    ]
    training = [lines("loss", "train/loss"), lines("validation top-1", "val/top1"), lines("learning rates", regex="lr-.*")]
    named = {"Accuracy and cost": cost, "Selection": selectors, "Training": training}
    return [workspaces.Section(name=name, panels=panels, is_open=True) for name, panels in named.items()]


def main() -> None:
    """Build and save the workspace."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("entity", help="user or team")
    parser.add_argument("--project", default="stts-lightning")
    parser.add_argument("--name", default="Accuracy against GFLOPs")
    parser.add_argument("--print", action="store_true", help="describe it, save nothing")
    options = parser.parse_args()
    if not os.environ.get("WANDB_API_KEY") and not os.path.exists(os.path.expanduser("~/.netrc")):
        sys.exit(
            "no W&B key: set WANDB_API_KEY or run `wandb login`; without one use `python -m stts_lightning.report runs=runs`"
        )
    try:
        reports = importlib.import_module("wandb_workspaces.reports.v2")
        workspaces = importlib.import_module("wandb_workspaces.workspaces")
    except ImportError:
        sys.exit("wandb-workspaces is not installed: pip install 'stts-lightning[dashboard]'")
    workspace = workspaces.Workspace(
        entity=options.entity, project=options.project, name=options.name, sections=sections(reports, workspaces)
    )
    if options.print:
        print(workspace)
    else:
        print(workspace.save().url)


if __name__ == "__main__":
    main()
