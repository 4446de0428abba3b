"""The summary of the study as a picture, docs/pictures/study.png: it is drawn when scripts/study.py writes its tables."""

from collections.abc import Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from study_plan import PAGE
from study_results import Setting

from stts_lightning.analysis.charts import COLOURS

CHART = PAGE.parent / "pictures" / "study.png"
MARKS = {
    "unpruned": ("|", "#212529", 13.0),
    "oracle": ("D", COLOURS[2], 7.0),
    "random": ("X", "#868e96", 7.0),
    "fixed": ("s", COLOURS[1], 6.0),
    "recipe": ("o", COLOURS[0], 8.0),
}
"""Marker, colour and size of each row of a `Compared`, in its order."""


def chart(lines: Sequence[Setting]) -> Figure:
    """A line for each setting: top-1 of the recipe, a small dot for each seed, beside what it must beat and what it can reach."""
    figure = Figure((8.4, 1.1 + 0.36 * len(lines)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for height, one in enumerate(lines):
        seeds = one.compared.recipe.runs
        axes.axhline(height, color="#e9ecef", lw=1, zorder=0)
        for (name, (marker, colour, size)), row in zip(MARKS.items(), one.compared[:5], strict=True):
            filled = "none" if name == "oracle" else colour
            axes.plot(
                [row.mean(seeds.keys())], [height], marker, ms=size, color=colour, mfc=filled, mew=1.8 if marker in "|D" else 1.0,
                ls="none", label=name if height == 0 else None, zorder=4 if name == "recipe" else 3,
            )  # fmt: skip
        each = [100 * run.top1 for run in seeds.values()]
        axes.plot(each, [height] * len(each), "o", ms=4, color=COLOURS[0], alpha=0.45, mew=0, zorder=2)
    axes.set_yticks(range(len(lines)), [label(one) for one in lines])
    axes.set_ylim(len(lines) - 0.5, -0.5)
    axes.set_xlabel("top-1, %")
    axes.set_xlim(right=102)
    axes.grid(axis="x", alpha=0.25)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.legend(loc="outside upper center", ncols=len(MARKS), frameon=False)
    return figure


def label(one: Setting) -> str:
    """What is written beside a line: data set, what is kept, and how many seeds."""
    count = len(one.compared.recipe.runs)
    return f"{one.data}, {one.kept} ({count} seed{'s' * (count > 1)})"
