"""The comparison on disk: tables, figures, and one page that opens without a network."""

import base64
import csv
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, select_autoescape
from matplotlib.figure import Figure
from PIL import Image

from stts_lightning.analysis import charts
from stts_lightning.analysis.points import Point, differences, notes, pareto, points, ratio_curves, sigma_curves
from stts_lightning.analysis.results import printable, read_history
from stts_lightning.analysis.runs import Run

PICTURES = 80
"""Pictures on a page at most; each takes some 100 kB."""

RUNNING = {
    "ms of a clip": "latency_ms",
    "clips/s, 8 at a time": "clips_per_second_of_8",
    "peak MB of 8": "peak_megabytes",
    "launches": "launches",
}
"""Columns of what `evaluate` measures beside the usual speed."""

FIXED = (
    "name", "GFLOPs a view", "top-1, %", "deviation", "seeds", "tokens kept, %", "clips/s", "top-5, %", "views", "sigma", "keeps",
    "operator", "backbone", "selection", "measured on", "Pareto", *RUNNING,
)  # fmt: skip
"""Columns of every table; those of settings come beside them where settings vary."""

SAID = {
    "backbone.name": "backbone", "selection.slots": "selection", "selection.selector": "keeps", "selection.sigma": "sigma",
    "selection.scorer": "operator", "selection.estimator": "operator", "selection.samples": "operator",
    "callbacks.sigma.sigma": "sigma", "weights": "pretrained", "selection.reducer": "keeps",
}  # fmt: skip
"""Settings that are no column where another column tells them."""

OPERATOR = ("scorer", "estimator", "samples", "ways", "sigma")
"""Traits of a learned choice."""
LEARNS = ("gumbel", "anchor_features", "tokens", "topk")

Row = dict[str, str | float | None]


def _traits(point: Point, settings: dict[str, str]) -> dict[str, str]:
    """What may tell a point from others of its selection, in words; what it has none of is left out."""
    how = re.search(r"\((\w+)\)", point.keeps)
    words = point.estimator.split(", ")
    ways = ", ".join(word for word in words if "=" in word)
    scorer, estimator, samples, *_ = [*(word for word in words if "=" not in word), "", "", ""]
    # A selector without a learned score of its own has no operator worth a word, but may keep segments.
    learns = not how or how[1] in LEARNS
    operator: dict[str, str] = {"ways": ways} if ways else {}
    if learns:
        operator = dict(zip(OPERATOR, (f"{scorer} scorer", estimator, samples, ways, f"sigma {point.sigma:g}"), strict=True))
    return {
        "backbone": point.backbone,
        "how": how[1] if how else "",
        **operator,
        "views": f"{point.views} view" + "s" * (point.views != 1),
        "steps": f"{point.runs[0].result.get('steps')} steps",
        **{f"setting {key}": f"{key}={value}" if value else "" for key, value in settings.items()},
    }


def named(points: Sequence[Point]) -> list[str]:
    """A short name for each point: its selection, and as many of its traits as tell it from others of that selection."""
    names: list[str] = []
    everything = [_traits(point, own) for point, own in zip(points, differences(points), strict=True)]
    for number, (point, traits) in enumerate(zip(points, everything, strict=True)):
        name = "plain" if point.selection == "none" else point.selection
        alike = [n for n, other in enumerate(points) if other.selection == point.selection and n != number]
        others = [everything[n] for n in alike]
        for key, text in traits.items():
            if text and any(other.get(key, text) != text for other in others):
                name = f"{name} {text}"
                others = [other for other in others if other.get(key, text) == text]
        names.append(name)
    return unique(names)


def lines_of(points: Sequence[Point]) -> list[str]:
    """The line of each point in a figure of accuracy against cost: backbone and method, and what tells methods apart.

    A line has one backbone, way of choosing, training length and set of slots. Other settings may differ along it. What is the
    same for all points goes unsaid.
    """
    everything = [_traits(point, {}) | {"slots": " ".join(point.ratios).upper()} for point in points]
    chosen = [traits for point, traits in zip(points, everything, strict=True) if point.method]
    varied = [key for key in ("slots", *OPERATOR, "steps") if len({traits[key] for traits in chosen if key in traits}) > 1]
    views = ["views"] if len({point.views for point in points}) > 1 else []
    names: list[str] = []
    for point, traits in zip(points, everything, strict=True):
        more = [*varied, *views] if point.method else views
        words = (point.backbone, point.method or "unpruned", *(traits.get(key, "") for key in more))
        names.append(", ".join(filter(None, words)))
    return names


def unique(names: Sequence[str], numbered: str = "{} ({})") -> list[str]:
    """Names, with a number where one is there already. Case does not count: for some file systems it does not."""
    taken: dict[str, str] = {}
    for name in names:
        free, number = name, 1
        while free.casefold() in taken:
            free, number = numbered.format(name, number), number + 1
        taken[free.casefold()] = free
    return list(taken.values())


def rows(points: Sequence[Point], names: Sequence[str]) -> list[Row]:
    """The table of one data set: figures, and a column for each setting that varies."""
    front, settings = pareto(points), differences(points)
    table: list[Row] = []
    for number, (point, name) in enumerate(zip(points, names, strict=True)):
        top1, spread, top5, speed = point.top1, point.spread(), point.mean("top5"), point.mean("clips_per_second")
        kept = point.mean("tokens_kept")
        figures: Row = {
            "name": name,
            "GFLOPs a view": round(point.gflops, 3),
            "top-1, %": round(100 * top1, 2),
            "deviation": None if spread is None else round(100 * spread, 2),
            "seeds": float(point.seeds),
            "tokens kept, %": None if kept is None else round(100 * kept, 1),
            "clips/s": None if speed is None else round(speed, 2),
            **{name: None if (mean := point.mean(key)) is None else round(mean, 2) for name, key in RUNNING.items()},
            "top-5, %": None if top5 is None else round(100 * top5, 2),
        }
        words: Row = {
            "views": float(point.views),
            "sigma": point.sigma if point.estimator else None,
            "keeps": point.keeps,
            "operator": point.estimator,
            "backbone": point.backbone,
            "selection": point.selection,
            "measured on": ", ".join(sorted({str(r.result["measured_on"]) for r in point.runs if "measured_on" in r.result})),
            "Pareto": "*" if number in front else "",
        }
        table.append({**figures, **settings[number], **words})
    told = _told(table, list(settings[0])) | {name for name in RUNNING if all(row[name] is None for row in table)}
    return [{key: value for key, value in row.items() if key not in told} for row in table]


def _told(table: Sequence[Row], settings: Sequence[str]) -> set[str]:
    """Settings whose values follow from another column."""
    told: set[str] = set()
    for key in settings:
        by = SAID.get("selection.slots" if re.fullmatch(r"selection\.slots\.[\w-]+\.(ratio|drop)", key) else key)
        pairs = {(row.get(by), row[key]) for row in table} if by else set()
        if by in table[0] and len(pairs) == len({value for value, _ in pairs}):
            told.add(key)
    return told


def _cell(value: str | float | None) -> str:
    return "" if value is None else value if isinstance(value, str) else f"{value:g}"


def _in_markdown(text: str) -> str:
    """A text without what Markdown takes for markup; an underscore within a word is none."""
    one_line = " ".join(text.split())
    return re.sub(r"([\\|\[\]*<`])|(?<![^\W_])(_)|(_)(?![^\W_])", r"\\\g<0>", one_line)


def markdown(rows: Sequence[Mapping[str, str | float | None]]) -> str:
    """A table in Markdown."""
    lines = [list(map(_in_markdown, cells)) for cells in (rows[0], *(map(_cell, row.values()) for row in rows))]
    lines.insert(1, ["---"] * len(rows[0]))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def _in_latex(text: str) -> str:
    """A text without what LaTeX takes for commands; a row that begins with a bracket would be an option of the line before."""
    words = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "[": "{[}", "…": r"\dots{}"}
    return re.sub(r"[&%$#_{}\\~^[…]", lambda found: words.get(found[0], f"\\{found[0]}"), " ".join(text.split()))


def latex(rows: Sequence[Row], caption: str) -> str:
    """A table in LaTeX, for the package booktabs."""
    settings = [key for key in rows[0] if key not in FIXED]
    columns = ["name", *settings, "GFLOPs a view", "tokens kept, %", "top-1, %", "deviation", "seeds", "top-5, %", "clips/s"]
    columns += RUNNING
    columns = [name for name in columns if name in rows[0]]
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{_in_latex(caption)}}}",
        rf"\begin{{tabular}}{{{'l' * (1 + len(settings))}{'r' * (len(columns) - 1 - len(settings))}}}",
    ]
    lines += [r"\toprule", " & ".join(map(_in_latex, columns)) + r" \\", r"\midrule"]
    for row in rows:
        cells = [_in_latex(_cell(row[name])) for name in columns]
        if row["Pareto"]:
            cells = [rf"\textbf{{{cell}}}" if cell else "" for cell in cells]
        lines.append(" & ".join(cells) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}", ""])


def _file_name(text: str) -> str:
    """A text as the name of a file."""
    return re.sub(r"[^\w.]+", "-", text)


def _data_uri(file: Path) -> str:
    with Image.open(file) as picture:
        small = picture.convert("RGB")
        small.thumbnail((1000, 1600))
        out = io.BytesIO()
        small.save(out, "JPEG", quality=82)
    return f"data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}"


def _pictures(run: Run) -> list[Path]:
    """The last selection panel, the confusion of the test and a few overlays of a run."""
    panels = sorted((run.folder / "panels").glob("epoch_*.png"))
    confusions = [file for file in (run.folder / "test" / "confusion.png", run.folder / "confusion.png") if file.is_file()]
    return [*panels[-1:], *confusions[:1], *sorted(run.folder.glob("predictions/overlays/*.png"))[:3]]


def _history(run: Run) -> str:
    """Curves of a run's training as SVG; empty where it logged none."""
    try:
        figure = charts.history(read_history(run.folder))
    except (OSError, ValueError):  # Written by another program, or cut off.
        return ""
    return "" if figure is None else charts.svg(figure)


def _section(dataset: str, group: Sequence[Point], base: str, left: int) -> tuple[dict[str, Any], dict[str, Figure]]:
    """What the page shows of a data set, its anchors beginning with a base, and its figures by file name."""
    names = named(group)
    anchors = [f"{base}-{number}" for number in range(len(names))]
    drawn, title = lines_of(group), f"{dataset}: accuracy against cost"
    figures = {"gflops": charts.accuracy_against(group, "gflops", names, drawn, anchors, title)}
    machines = {str(run.result.get("measured_on")) for point in group for run in point.runs if "measured_on" in run.result}
    if len(machines) == 1:  # Speeds of different machines do not compare.
        title = f"{dataset}: accuracy against speed ({machines.pop()})"
        figures["throughput"] = charts.accuracy_against(group, "clips_per_second", names, drawn, anchors, title)
    if lines := sigma_curves(group):
        figures["sigma"] = charts.curves(lines, "sigma at the first step", f"{dataset}: over sigma")
    for slot, lines in ratio_curves(group).items():
        kept = {"t": "frames kept before", "s": "tokens of each frame kept before", "r": "tokens kept in"}[slot[0]]
        amount = f"share of {kept} block {slot[1:]}"
        if any(place > 1 for line in lines.values() for place, _ in line):
            amount = f"tokens taken away in block {slot[1:]}"
        figures[f"ratio_{slot}"] = charts.curves(lines, amount, f"{dataset}: over {slot}")
    cards: list[dict[str, Any]] = []
    for point, name, anchor in zip(group, names, anchors, strict=True):
        config = next((run.folder / "config.yaml" for run in point.runs if (run.folder / "config.yaml").is_file()), None)
        pictures = [
            {"uri": _data_uri(file), "name": printable(f"{file.parent.name}/{file.name}")}
            for file in _pictures(point.runs[0])[:left]
        ]
        left -= len(pictures)
        cards.append(
            {
                "name": name,
                "anchor": anchor,
                "runs": [
                    {
                        "folder": printable(str(run.folder)),
                        "seed": run.result.get("seed"),
                        "top1": f"{run.result['top1']:.2%}",
                    }
                    for run in point.runs
                ],
                "commit": point.runs[0].result.get("commit"),
                "weights": printable(str(point.runs[0].result.get("weights") or "")),
                "history": _history(point.runs[0]),
                "config": config.read_text(encoding="utf-8", errors="replace") if config else "",
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
        failures: a line for each run that is not below, as of `runs.left_out`.

    Returns:
        The page's path.
    """
    attachments = folder / "report"
    attachments.mkdir(parents=True, exist_ok=True)
    everything = points(runs)
    sections: list[dict[str, Any]] = []
    left = PICTURES
    datasets = list(dict.fromkeys(point.dataset for point in everything))
    for dataset, name in zip(datasets, unique([_file_name(dataset) for dataset in datasets], "{}-{}"), strict=True):
        base = attachments / name
        with charts.style():
            section, figures = _section(dataset, [point for point in everything if point.dataset == dataset], name, left)
            left = section["pictures_left"]
            for of, figure in figures.items():
                charts.save(figure, f"{base}_{of}")
            section["figures"] = [charts.svg(figure) for figure in figures.values()]
        table = section["rows"]
        caption = f"Accuracy and cost on {dataset}. Bold: no other is as good in both."
        for suffix, text in (("md", markdown(table)), ("tex", latex(table, caption))):
            Path(f"{base}.{suffix}").write_text(text, encoding="utf-8")
        with Path(f"{base}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(table[0]))
            writer.writeheader()
            writer.writerows(table)
        sections.append(section)
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=select_autoescape(default=True))
    failures = [printable(line) for line in failures]
    html = environment.get_template("page.html.jinja").render(
        sections=sections,
        failures=failures,
        notes=notes(everything),
        count=sum(len(point.runs) for point in everything),
        full=left <= 0,
        cell=_cell,
    )
    part = folder / "report.part"
    part.write_text(html, encoding="utf-8")
    return part.replace(folder / "report.html")
