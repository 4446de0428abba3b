"""`python -m stts_lightning.report`: compare run folders; or print a table of the paper beside our costs and accuracies."""

import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from omegaconf import DictConfig

from stts_lightning import command_line
from stts_lightning.configuration import conf_dir
from stts_lightning.doctor import check_installation
from stts_lightning.overrides import for_hydra

if TYPE_CHECKING:
    from stts_lightning.analysis.paper import PaperTable

Lines = list[dict[str, str]]


def change(value: float, published: float | None, tera: bool) -> str:
    """A cost, and by how much it differs from the published one where that is over 1 % and no matter of its rounding."""
    text = f"{value:.{3 if tera else 2}f}"
    if published is None or round(value, 2 if tera else 1) == published or abs(value / published - 1) <= 0.01:
        return text
    return f"{text} ({value / published - 1:+.1%})"


def benchmarked(file: Path) -> dict[str, Any] | None:
    """What `benchmark what=table7` wrote; None where there is no such file. Raises ConfigError for another file."""
    from stts_lightning import run_config

    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text())
        if content["what"] == "table7" and content["rows"]:
            return content
    except (ValueError, KeyError, TypeError):
        pass
    raise run_config.ConfigError(f"benchmark={file}: is not what benchmark what=table7 wrote")


def paper_table(number: int, roots: Sequence[Path], benchmark: Path | None = None) -> tuple[str, Lines]:
    """Title and lines of a table, a dictionary by column each; Table 7 with the speeds that a benchmark wrote."""
    from stts_lightning import run_config
    from stts_lightning.analysis.paper import TABLES

    if number not in TABLES:
        raise run_config.ConfigError(f"paper_table={number}: allowed are {min(TABLES)} to {max(TABLES)}")
    title, lines = beside_paper(TABLES[number], roots, benchmark)
    return f"Table {number}: {title}", lines


def paper_figure(number: int, roots: Sequence[Path], plot: str | None) -> tuple[str, Lines]:
    """Title and lines of what Figure 3 draws; the picture, ours beside the published points, where a file is named."""
    from stts_lightning import run_config
    from stts_lightning.analysis.paper import FIGURE_3, figure_curves

    if number != 3:
        raise run_config.ConfigError(f"paper_figure={number}: allowed is 3")
    if plot:
        from stts_lightning.analysis import charts

        with charts.style():
            charts.method_curves(figure_curves(results_below(roots)), f"Figure 3: {FIGURE_3.title}").savefig(plot, dpi=130)
    title, lines = beside_paper(FIGURE_3, roots)
    return f"Figure {number}: {title}", lines


def results_below(roots: Sequence[Path]) -> list[dict[str, Any]]:
    """Results of all runs below folders; a folder that does not exist has none."""
    from stts_lightning.analysis.runs import find_runs

    return [run.result for run in find_runs(root for root in roots if root.is_dir())]


def beside_paper(table: "PaperTable", roots: Sequence[Path], benchmark: Path | None = None) -> tuple[str, Lines]:
    """Title and lines of a table of the paper beside our figures; those of Table 7 with the speeds that a benchmark wrote."""
    from stts_lightning import assembly
    from stts_lightning.analysis.paper import TABLES, measured, speeds

    results, speedy = results_below(roots), table is TABLES[7]
    tera = table.unit == "TFLOPs"
    speed = benchmarked(benchmark) if speedy and benchmark else None
    lines: Lines = []
    for row in table.rows:
        line = {"configuration": row.label, **dict(row.notes)}
        line[f"{table.unit}, paper"] = "" if row.cost is None else f"{row.cost:.{2 if tera else 1}f}"
        official = ours = top1 = ""
        if row.experiment:
            cost = assembly.experiment_cost(row.experiment)
            scale = cost.views / 1000 if tera else 1.0
            official = change(row.official * scale, row.cost, tera) if row.official else ""
            ours = change(cost.gflops * scale, row.cost, tera)
            top1 = "; ".join(map(str, measured(results, row.experiment, cost.backbone)))
        line |= {f"{table.unit}, official code": official, f"{table.unit}, ours": ours}
        line["top-1 %, paper"] = "" if row.top1 is None else f"{row.top1:.1f}"
        if speedy:
            line |= speeds(row, speed["rows"] if speed else [])
        lines.append({**line, "top-1 %, ours": top1, "experiment": row.experiment or ""})
    # A column without any entry says nothing.
    named = [name for name in lines[-1] if any(line.get(name) for line in lines) or name == "top-1 %, ours"]
    title = f"{table.title} ({table.data})"
    if speed:
        title += f"; ours: {speed['device']}, torch {speed['torch']}, {speed['rows'][0]['views']} views a video"
    elif speedy:
        title += "; ours: python -m stts_lightning.benchmark what=table7"
    return title, [{name: line.get(name, "") for name in named} for line in lines]


def show(title: str, lines: Lines) -> None:
    """Print a table."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # Names may hold brackets, which a plain string would have taken for markup.
    table = Table(title=Text(title), title_justify="left")
    for number, name in enumerate(lines[0]):
        table.add_column(Text(name), overflow="fold", min_width=24 if number == 0 else None)
    for line in lines:
        table.add_row(*map(Text, line.values()))
    Console().print(table)


def markdown(title: str, lines: Lines) -> str:
    """The same in Markdown."""
    from stts_lightning.analysis import page

    return f"### {title}\n\n{page.markdown(lines)}\n"


def folders(runs: object) -> list[Path]:
    """`runs`, one or several, as paths."""
    return [Path(str(one)) for one in (runs if isinstance(runs, list) else [runs])]


def compare(roots: Sequence[Path], out: Path) -> None:
    """Write the comparison of all runs below folders, and print its tables."""
    from stts_lightning import console, run_config
    from stts_lightning.analysis.page import RUNNING, named, rows, write_report
    from stts_lightning.analysis.points import notes, pareto, points
    from stts_lightning.analysis.results import printable
    from stts_lightning.analysis.runs import find_runs, left_out

    with console.as_user_errors():
        try:
            runs, failures = find_runs(roots), left_out(roots)
        except FileNotFoundError as error:
            raise run_config.ConfigError(f"{error}; give a folder of runs, or several as runs=[A,B]") from error
        if not runs:
            why = f" ({'; '.join(failures)})" if failures else ""
            raise run_config.ConfigError(f"runs={','.join(map(str, roots))}: no run below has a result with a top-1 yet{why}")
    out.mkdir(parents=True, exist_ok=True)
    page = write_report(runs, out, failures)
    everything = points(runs)
    short = ("name", "GFLOPs a view", "tokens kept, %", "top-1, %", "deviation", "seeds", "clips/s", *RUNNING)
    for dataset in dict.fromkeys(point.dataset for point in everything):
        group = [point for point in everything if point.dataset == dataset]
        table = rows(group, named(group))
        front = pareto(group)
        lines = [{key: "" if row[key] is None else f"{row[key]}" for key in short if key in row} for row in table]
        for number, line in enumerate(lines):
            line["name"] = f"{'*' if number in front else ' '} {line['name']}"
            line["seeds"] = f"{table[number]['seeds']:g}"
        show(f"{dataset} (* no other is as good in both GFLOPs and top-1)", lines)
    for line in (*(f"not compared: {failure}" for failure in failures), *notes(everything)):
        print(line)
    count = sum(len(point.runs) for point in everything)
    print(printable(f"{count} runs; {page}; figures and tables: {out / 'report'}"))


def print_table(title: str, lines: Lines, into: str | None, csv_file: str | None) -> None:
    """Print a table; add it to a Markdown file or write it as CSV where that is asked."""
    show(title, lines)
    if into:
        with Path(into).open("a") as file:
            file.write(markdown(title, lines))
    if csv_file:
        with Path(csv_file).open("w", newline="") as file:
            writer = csv.DictWriter(file, list(lines[0]))
            writer.writeheader()
            writer.writerows(lines)


@hydra.main(version_base="1.3", config_path=conf_dir(), config_name="report")
def main(cfg: DictConfig) -> None:
    """Compare runs, or print a table of the paper."""
    check_installation()
    from stts_lightning import console, run_config

    with console.one_line_errors():
        console.quiet()
        with console.as_user_errors():
            values = run_config.to_container(cfg)
        roots = folders(values["runs"])
        if values["paper_figure"] is not None:
            print_table(*paper_figure(values["paper_figure"], roots, values["plot"]), values["markdown"], values["csv"])
        elif values["paper_table"] is not None:
            table = paper_table(values["paper_table"], roots, Path(str(values["benchmark"])))
            print_table(*table, values["markdown"], values["csv"])
        else:
            compare(roots, Path(values["out"]) if values["out"] else roots[0])


if __name__ == "__main__":
    sys.argv[1:] = for_hydra(sys.argv[1:])
    command_line.check("report", sys.argv[1:])
    main()
