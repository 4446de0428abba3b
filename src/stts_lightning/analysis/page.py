"""The comparison on disk: tables, figures, and one page that opens without a network."""

import base64
import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, select_autoescape
from matplotlib.figure import Figure
from PIL import Image

from stts_lightning.analysis import charts
from stts_lightning.analysis.runs import Point, Run, pareto, points, ratio_curves, sigma_curves

PICTURES = 80
"""Pictures on a page at most; each takes some 100 kB."""

LEARNS = ("gumbel", "anchor_features", "tokens")

Row = dict[str, str | float | None]


def _traits(point: Point) -> dict[str, str]:
    """What may tell a point from others of its selection, in words; what it has none of is left out."""
    how = re.search(r"\((\w+)\)", point.keeps)
    scorer, estimator, samples = [*point.estimator.split(", "), "", ""][:3]
    # A selector without a learned score of its own has no operator worth a word.
    learns = not how or how[1] in LEARNS
    operator = {"scorer": f"{scorer} scorer", "estimator": estimator, "samples": samples} if learns else {}
    return {
        "backbone": point.backbone,
        "how": how[1] if how else "",
        **operator,
        "sigma": f"sigma {point.sigma:g}",
        "views": f"{point.views} views",
        "steps": f"{point.runs[0].result.get('steps')} steps",
        # Slots and sigma have words of their own.
        **{key: f"{key}={value}" for key, value in point.settings if not key.startswith(("selection.", "optim.epochs"))},
    }


def named(points: Sequence[Point]) -> list[str]:
    """A short name for each point: its selection, and as many of its traits as tell it from others of that selection."""
    names: list[str] = []
    for point in points:
        name, traits = "plain" if point.selection == "none" else point.selection, _traits(point)
        others = [_traits(other) for other in points if other.selection == point.selection and other is not point]
        for key, text in traits.items():
            if text and any(other.get(key, text) != text for other in others):
                name = f"{name} {text}"
                others = [other for other in others if other.get(key, text) == text]
        names.append(name)
    # Still alike (another list of the same name): numbered.
    return [name if names.index(name) == at else f"{name} ({at})" for at, name in enumerate(names)]


def rows(points: Sequence[Point], names: Sequence[str]) -> list[Row]:
    """The table of one data set."""
    front = pareto(points)
    table: list[Row] = []
    for number, (point, name) in enumerate(zip(points, names, strict=True)):
        top1, spread, top5, speed = point.top1, point.spread(), point.mean("top5"), point.mean("clips_per_second")
        kept = point.mean("tokens_kept")
        table.append(
            {
                "name": name,
                "GFLOPs a view": round(point.gflops, 3),
                "top-1, %": round(100 * top1, 2),
                "deviation": None if spread is None else round(100 * spread, 2),
                "seeds": float(len(point.runs)),
                "tokens kept, %": None if kept is None else round(100 * kept, 1),
                "clips/s": None if speed is None else round(speed, 2),
                "top-5, %": None if top5 is None else round(100 * top5, 2),
                "views": float(point.views),
                "sigma": point.sigma if point.ratios else None,
                "keeps": point.keeps,
                "operator": point.estimator,
                "backbone": point.backbone,
                "selection": point.selection,
                "measured on": ", ".join(sorted({str(r.result["measured_on"]) for r in point.runs if "measured_on" in r.result})),
                "Pareto": "*" if number in front else "",
            }
        )
    return table


def _cell(value: str | float | None) -> str:
    return "" if value is None else value if isinstance(value, str) else f"{value:g}"


def markdown(rows: Sequence[Row]) -> str:
    """A table in Markdown."""
    head = list(rows[0])
    lines = [head, ["---"] * len(head), *([_cell(v).replace("|", "\\|") for v in row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def latex(rows: Sequence[Row], caption: str) -> str:
    """A table in LaTeX, for the package booktabs."""
    columns = ["name", "GFLOPs a view", "tokens kept, %", "top-1, %", "deviation", "seeds", "top-5, %", "clips/s"]

    def escaped(text: str) -> str:
        return re.sub(r"([&%$#_{}])", r"\\\1", text)

    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{escaped(caption)}}}",
        rf"\begin{{tabular}}{{l{'r' * (len(columns) - 1)}}}",
    ]
    lines += [r"\toprule", " & ".join(map(escaped, columns)) + r" \\", r"\midrule"]
    for row in rows:
        cells = [escaped(_cell(row[name])) for name in columns]
        if row["Pareto"]:
            cells = [rf"\textbf{{{cell}}}" if cell else "" for cell in cells]
        lines.append(" & ".join(cells) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}", ""])


def _file_name(text: str) -> str:
    """A text as a file's name, and as an anchor."""
    return re.sub(r"[^\w.]+", "-", text)


def _data_uri(file: Path) -> str:
    with Image.open(file) as picture:
        small = picture.convert("RGB")
        small.thumbnail((1000, 1600))
        out = io.BytesIO()
        small.save(out, "JPEG", quality=82)
    return f"data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}"


def _pictures(run: Run) -> list[Path]:
    """The last selection panel and a few overlays of a run."""
    panels = sorted((run.folder / "panels").glob("epoch_*.png"))
    return [*panels[-1:], *sorted(run.folder.glob("predictions/overlays/*.png"))[:3]]


def _section(dataset: str, group: Sequence[Point], left: int) -> tuple[dict[str, Any], dict[str, Figure]]:
    """What the page shows of a data set, and its figures by file name."""
    names = named(group)
    anchors = [_file_name(f"{dataset}-{name}") for name in names]
    figures = {"gflops": charts.accuracy_against(group, "gflops", names, anchors, f"{dataset}: accuracy against cost")}
    machines = {str(run.result.get("measured_on")) for point in group for run in point.runs if "measured_on" in run.result}
    if len(machines) == 1:  # Speeds of different machines do not compare.
        title = f"{dataset}: accuracy against speed ({machines.pop()})"
        figures["throughput"] = charts.accuracy_against(group, "clips_per_second", names, anchors, title)
    if lines := sigma_curves(group):
        figures["sigma"] = charts.curves(lines, "sigma at the first step", f"{dataset}: over sigma")
    for slot, lines in ratio_curves(group).items():
        kept = "frames" if slot[0] == "t" else "tokens of each frame"
        figures[f"ratio_{slot}"] = charts.curves(
            lines, f"share of {kept} kept before block {slot[1:]}", f"{dataset}: over {slot}"
        )
    cards: list[dict[str, Any]] = []
    for point, name, anchor in zip(group, names, anchors, strict=True):
        config = next((run.folder / "config.yaml" for run in point.runs if (run.folder / "config.yaml").is_file()), None)
        pictures = [
            {"uri": _data_uri(file), "name": f"{file.parent.name}/{file.name}"} for file in _pictures(point.runs[0])[:left]
        ]
        left -= len(pictures)
        cards.append(
            {
                "name": name,
                "anchor": anchor,
                "folders": [str(run.folder) for run in point.runs],
                "seeds": [{"seed": run.result.get("seed"), "top1": f"{run.result['top1']:.2%}"} for run in point.runs],
                "commit": point.runs[0].result.get("commit"),
                "weights": point.runs[0].result.get("weights"),
                "config": config.read_text() if config else "",
                "pictures": pictures,
            }
        )
    shown = {"dataset": dataset, "rows": rows(group, names), "anchors": anchors, "cards": cards, "pictures_left": left}
    return shown, figures


def write_report(runs: Sequence[Run], folder: Path, failures: Sequence[str] = ()) -> Path:
    """Write `report.html`, and figures and tables of each data set in `report/`.

    Args:
        runs: with a top-1; at least one.
        folder: where to.
        failures: what the page says did not end well.

    Returns:
        The page's path.
    """
    attachments = folder / "report"
    attachments.mkdir(parents=True, exist_ok=True)
    everything = points(runs)
    sections: list[dict[str, Any]] = []
    left = PICTURES
    for dataset in dict.fromkeys(point.dataset for point in everything):
        base = attachments / _file_name(dataset)
        with charts.style():
            section, figures = _section(dataset, [point for point in everything if point.dataset == dataset], left)
            left = section["pictures_left"]
            for name, figure in figures.items():
                charts.save(figure, f"{base}_{name}")
            section["figures"] = [charts.svg(figure) for figure in figures.values()]
        table = section["rows"]
        Path(f"{base}.md").write_text(markdown(table))
        Path(f"{base}.tex").write_text(latex(table, f"Accuracy and cost on {dataset}. Bold: no other is as good in both."))
        with Path(f"{base}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(table[0]))
            writer.writeheader()
            writer.writerows(table)
        sections.append(section)
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=select_autoescape(default=True))
    html = environment.get_template("page.html.jinja").render(
        sections=sections, failures=failures, count=len(runs), full=left <= 0, cell=_cell
    )
    part = folder / "report.part"
    part.write_text(html, encoding="utf-8")
    return part.replace(folder / "report.html")
