"""Figures of a comparison: accuracy against cost (paper Figure 3), and curves over sigma and ratios."""

import io
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from stts_lightning.analysis.points import Curve, Point, pareto
from stts_lightning.analysis.results import printable

COLOURS = ("#0b6bcb", "#d9480f", "#2b8a3e", "#862e9c", "#c2255c", "#5f3dc4", "#087f5b", "#495057")
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "stts",
    "font.family": "DejaVu Sans",
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def _plain(text: str) -> str:
    """A text that is drawn as it is: dollars are no formula."""
    return printable(text).replace("$", r"\$")


def _axes(title: str, x: str) -> tuple[Figure, Axes]:
    figure = Figure((7.2, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(_plain(title), loc="left", fontsize=11)
    axes.set_xlabel(x)
    axes.set_ylabel("top-1, %")
    axes.grid(alpha=0.25)
    return figure, axes


def accuracy_against(
    points: Sequence[Point], cost: str, names: Sequence[str], lines: Sequence[str], anchors: Sequence[str], title: str
) -> Figure:
    """Top-1 of points against GFLOPs or measured clips a second: a line for each method (paper Figure 3).

    Unpruned models are diamonds, with their accuracy as a dotted line. The Pareto front is drawn for each number of views.

    Args:
        points: of one data set.
        cost: "gflops" or "clips_per_second".
        names: of the points; one of the front carries it.
        lines: name of the line that each point lies on.
        anchors: where each point links to in an SVG, within its page.
        title: of the figure.
    """
    labels = {"gflops": "GFLOPs a view (multiply-adds)", "clips_per_second": "clips a second, measured"}
    figure, axes = _axes(title, labels[cost])
    front = pareto(points, cost)
    place = {n: x for n, p in enumerate(points) if (x := p.gflops if cost == "gflops" else p.mean(cost)) is not None}
    colours = {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(dict.fromkeys(lines))}
    for number, x in place.items():
        point, colour = points[number], colours[lines[number]]
        y, spread = 100 * point.top1, 100 * (point.spread() or 0)
        if spread:
            axes.errorbar(x, y, spread, color=colour, alpha=0.5, capsize=2, lw=1)
        size, shape = (80, "D") if not point.method else (140, "*") if number in front else (60, "o")
        mark = axes.scatter([x], [y], s=size, marker=shape, color=colour, zorder=3)
        mark.set_urls([f"#{anchors[number]}"])
        if not point.method:
            axes.axhline(y, color=colour, lw=0.8, ls=":", zorder=1)
    for line_number, (name, colour) in enumerate(colours.items()):
        members = [number for number in place if lines[number] == name]
        shape = "o" if any(points[number].method for number in members) else "D"
        line = sorted((place[number], 100 * points[number].top1) for number in members)
        if line:
            axes.plot(*zip(*line, strict=True), color=colour, marker=shape, ms=4, label=_plain(name), **_look(line_number))
    for views in dict.fromkeys(points[number].views for number in front):
        line = sorted((place[number], 100 * points[number].top1) for number in front if points[number].views == views)
        axes.plot(*zip(*line, strict=True), color="#868e96", lw=1, ls="--", zorder=1)
    axes.plot([], [], color="#868e96", lw=1, ls="--", label="Pareto front")
    axes.legend(fontsize=8, frameon=False, loc="best")
    axes.margins(x=0.18, y=0.12)
    axes.set_ylim(max(axes.get_ylim()[0], 0), min(axes.get_ylim()[1], 104))
    spots = {number: (x, 100 * points[number].top1) for number, x in place.items()}
    _label(axes, {number: _plain(names[number]) for number in sorted(front, key=lambda n: -points[n].top1)}, spots)
    return figure


def _look(number: int) -> dict[str, Any]:
    """How the lines of a figure differ beside their colour: where two lie on each other, both are seen."""
    return {"ls": ("-", (0, (5, 2)), (0, (2, 1.5)), "-.")[number % 4], "lw": max(3.2 - 0.7 * number, 1.2)}


LONGEST = 36
"""Letters of a name in a figure; the table has all."""


def _label(axes: Axes, texts: Mapping[int, str], spots: Mapping[int, tuple[float, float]]) -> None:
    """Write names beside points, each where it covers the fewest points; a name that would cover another is left to the table.

    Args:
        axes: with their limits.
        texts: names, by number of the point.
        spots: all points, by number.
    """
    height, width, away = 11.0, 4.9, 7.0  # Of a letter of 8 points, and from the point, in points.
    scale = 72 / axes.figure.dpi
    places = {number: axes.transData.transform(spot) * scale for number, spot in spots.items()}
    left, bottom, right, top = (value * scale for value in axes.bbox.extents)
    taken: list[tuple[float, float, float, float]] = []
    for number, whole in texts.items():
        text = whole if len(whole) <= LONGEST else f"{whole[: LONGEST - 1]}…"
        x, y = places[number]
        long = width * len(text)
        boxes = [
            (x + dx if dx > 0 else x + dx - long, y + dy, x + dx + long if dx > 0 else x + dx, y + dy + height)
            for dx, dy in ((away, 2), (away, -13), (-away, 2), (-away, -13), (away, 14), (away, -25), (-away, 14), (-away, -25))
        ]

        def covered(box: tuple[float, float, float, float], own: int = number) -> tuple[bool, bool, int]:
            points = sum(box[0] - 5 < a < box[2] + 5 and box[1] - 5 < b < box[3] + 5 for n, (a, b) in places.items() if n != own)
            names = any(box[0] < c and a < box[2] and box[1] < d and b < box[3] for a, b, c, d in taken)
            outside = box[0] < left or box[2] > right or box[1] < bottom or box[3] > top
            return names, outside, points

        best = min(boxes, key=covered)
        if covered(best)[0]:
            continue
        taken.append(best)
        offset = best[0] - x, best[1] - y + 2
        axes.annotate(text, spots[number], offset, textcoords="offset points", fontsize=8, zorder=4).set_in_layout(False)


def method_curves(lines: Mapping[str, Sequence[tuple[float, float]]], title: str) -> Figure:
    """Top-1 against GFLOPs, a line for each method, as the paper draws Figure 3; published ones are hollow and dashed.

    Args:
        lines: by name, points of GFLOPs and top-1 in per cent; a name that ends in "(paper)" is published.
        title: of the figure.
    """
    figure, axes = _axes(title, "GFLOPs a view (multiply-adds)")
    methods = list(dict.fromkeys(name.removesuffix(" (paper)") for name in lines))
    for name, points in lines.items():
        method = name.removesuffix(" (paper)")
        published, colour = name != method, COLOURS[methods.index(method) % len(COLOURS)]
        shape = "D" if method == "unpruned" else "o"
        look: Any = {"ls": "--", "mfc": "white"} if published else {"ls": "-"}
        axes.plot(*zip(*sorted(points), strict=True), color=colour, marker=shape, lw=1.6, label=_plain(name), **look)
    axes.legend(fontsize=8, frameon=False, loc="best")
    axes.margins(x=0.08, y=0.12)
    return figure


def curves(lines: Mapping[str, Curve], x: str, title: str) -> Figure:
    """Mean top-1 over one number, a line for each group, with the spread of the seeds."""
    figure, axes = _axes(title, x)
    for number, (name, curve) in enumerate(lines.items()):
        places, points = zip(*curve, strict=True)
        tops = [100 * point.top1 for point in points]
        spreads = [100 * (point.spread() or 0) for point in points]
        axes.errorbar(
            places,
            tops,
            spreads,
            color=COLOURS[number % len(COLOURS)],
            marker="o",
            capsize=3,
            label=_plain(name),
            **_look(number),
        )
    axes.legend(fontsize=8, frameon=False, loc="best")
    return figure


HISTORY = (
    ("loss", ("train/loss", "val/loss")),
    ("accuracy", ("train/top1", "val/top1")),
    ("sigma", ("sigma",)),
    ("selectors", ()),
)
"""Panels of a run's history: what each shows. That of the selectors shows what they tell of themselves."""


def history(metrics: Mapping[str, Mapping[int, float]]) -> Figure | None:
    """How a training went: loss, accuracy, sigma and the selectors' figures over its steps; None where nothing was logged.

    Args:
        metrics: by name, values by step.
    """
    own = tuple(name for name in metrics if name.startswith("selection/") and name.count("/") == 2)
    # Of all that selectors log: how sure they are, how often they change their mind, and what they find where that is known.
    own = tuple(name for name in own if name.rpartition("/")[2] in ("entropy", "changed", "found"))
    panels = [(title, [name for name in names or own if metrics.get(name)]) for title, names in HISTORY]
    panels = [(title, names) for title, names in panels if names]
    if not panels:
        return None
    lines, columns = -(-len(panels) // 2), min(len(panels), 2)
    figure = Figure((3.6 * columns, 2.3 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    places = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes in places[len(panels) :]:
        axes.set_visible(False)
    for axes, (title, names) in zip(places, panels, strict=False):
        for number, name in enumerate(names):
            steps, values = zip(*sorted(metrics[name].items()), strict=True)
            mark = "o" if len(steps) < 15 else ""
            text = name.removeprefix("selection/")
            axes.plot(steps, values, color=COLOURS[number % len(COLOURS)], lw=1.4, marker=mark, ms=3, label=text)
        axes.set_title(title, loc="left", fontsize=9)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.25)
        axes.legend(fontsize=7, frameon=False)
    return figure


def confusion(table: NDArray[np.int64], classes: Sequence[str], title: str) -> Figure:
    """How often a class (row) was taken for a class (column), as shares of the row; named where there is room."""
    side = min(max(0.32 * len(classes) + 2.2, 4.0), 12.0)
    figure = Figure((side, side), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    shares = table / np.maximum(table.sum(1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="taken for", ylabel="class")
    axes.set_title(_plain(title), loc="left", fontsize=11)
    if len(classes) <= 30:
        names = list(map(_plain, classes))
        axes.set_xticks(range(len(classes)), names, rotation=90, fontsize=8)
        axes.set_yticks(range(len(classes)), names, fontsize=8)
        for row, column in zip(*table.nonzero(), strict=True):
            dark = shares[row, column] > 0.5
            text = str(table[row, column])
            axes.text(column, row, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")
    return figure


def costs(values: Mapping[str, float], title: str) -> Figure:
    """GFLOPs as bars, a name each, in the order given from top to bottom."""
    figure = Figure((7.2, 0.28 * len(values) + 1.1), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    bars = axes.barh(range(len(values)), list(values.values()), color=COLOURS[0])
    axes.bar_label(bars, [f"{value:.2f}" for value in values.values()], padding=3, fontsize=8)
    axes.set_yticks(range(len(values)), list(values), fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("GFLOPs a view (multiply-adds)")
    axes.set_title(_plain(title), loc="left", fontsize=11)
    return figure


def speeds(rows: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """Clips a second against GFLOPs of a clip, a colour for each model's family and settings.

    The line through a family's unpruned model is where throughput would lie if tokens that are dropped were time that is saved.

    Args:
        rows: as `analysis.benchmarks` gives them for models.
        title: of the figure.
    """
    figure, axes = _axes(title, "GFLOPs of a clip (multiply-adds)")
    axes.set_ylabel("clips a second")
    groups: dict[str, list[Mapping[str, Any]]] = {}
    several = {key: len({row[key] for row in rows}) > 1 for key in ("batch", "precision", "compile")}
    for row in rows:
        words = {"batch": f"batch {row['batch']}", "precision": row["precision"], "compile": f"compiled: {row['compile']}"}
        group = row["model"].partition(":")[0] if not row["model"].startswith(("plain:", "torchvision:")) else row["model"]
        groups.setdefault(", ".join([group, *(words[key] for key, many in several.items() if many)]), []).append(row)
    for number, (name, members) in enumerate(groups.items()):
        colour = COLOURS[number % len(COLOURS)]
        x, y = [row["gflops"] for row in members], [row["clips_per_second"] for row in members]
        low, high = ([1e3 * row["batch"] / row[key] for row in members] for key in ("ms_high", "ms_low"))
        errors = [[b - a for a, b in zip(low, y, strict=True)], [b - a for a, b in zip(y, high, strict=True)]]
        axes.errorbar(x, y, errors, fmt="o", color=colour, capsize=2, lw=1, label=name)
        if len(members) > 1:
            unpruned = max(members, key=lambda row: row["gflops"])
            ideal = np.linspace(min(x), unpruned["gflops"], 50)
            axes.plot(ideal, unpruned["clips_per_second"] * unpruned["gflops"] / ideal, color=colour, ls="--", lw=1, alpha=0.7)
            for row in members:
                kept = row["model"].partition(":")[2] or "all tokens"
                place = row["gflops"], row["clips_per_second"]
                axes.annotate(kept, place, (6, 5), textcoords="offset points", fontsize=7)
    axes.plot([], [], color="#868e96", ls="--", lw=1, label="time in proportion to GFLOPs")
    axes.set_ylim(0)
    axes.margins(x=0.15)
    axes.legend(fontsize=8, frameon=False, loc="best")
    return figure


def style() -> AbstractContextManager[None]:
    """How figures look; to be entered around making and saving them."""
    return rc_context(STYLE)


def svg(figure: Figure) -> str:
    """The figure as an SVG element, text as text."""
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    return text[text.index("<svg") :]


def save(figure: Figure, path: str) -> None:
    """Write `path`.png and `path`.svg."""
    figure.savefig(f"{path}.png", dpi=130)
    Path(f"{path}.svg").write_text(f'<?xml version="1.0" encoding="utf-8"?>\n{svg(figure)}', encoding="utf-8")
