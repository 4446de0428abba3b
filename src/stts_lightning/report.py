"""`python -m stts_lightning.report`: the paper's tables beside the official code's costs, ours, and our accuracies."""

import csv
from collections.abc import Sequence
from pathlib import Path

import hydra
from omegaconf import DictConfig

from stts_lightning.conf_dir import conf_dir
from stts_lightning.doctor import check_installation

Lines = list[dict[str, str]]


def change(value: float, published: float | None, tera: bool) -> str:
    """A cost, and by how much it differs from the published one where that is over 1 % and no matter of its rounding."""
    text = f"{value:.{3 if tera else 2}f}"
    if published is None or round(value, 2 if tera else 1) == published or abs(value / published - 1) <= 0.01:
        return text
    return f"{text} ({value / published - 1:+.1%})"


def paper_table(number: int, runs: Path) -> tuple[str, Lines]:
    """Title and lines of a table, a dictionary by column each."""
    from stts_lightning import assembly
    from stts_lightning.analysis.paper import TABLES, measured
    from stts_lightning.analysis.results import read_result

    if number not in TABLES:
        raise assembly.ConfigError(f"paper_table={number}: allowed are {min(TABLES)} to {max(TABLES)}")
    table = TABLES[number]
    results = [read_result(file) for file in sorted(runs.rglob("result.json"))]
    tera = table.unit == "TFLOPs"
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
        line |= {"official code": official, "ours": ours}
        line["top-1, paper"] = "" if row.top1 is None else f"{row.top1:.1f}"
        lines.append({**line, "top-1, ours": top1, "experiment": row.experiment or ""})
    # A column without any entry says nothing.
    named = [name for name in lines[-1] if any(line[name] for line in lines) or name == "top-1, ours"]
    return f"Table {number}: {table.title} ({table.data})", [{name: line.get(name, "") for name in named} for line in lines]


def show(title: str, lines: Lines) -> None:
    """Print a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for name in lines[0]:
        table.add_column(name, overflow="fold")
    for line in lines:
        table.add_row(*line.values())
    Console().print(table)


def markdown(title: str, lines: Lines) -> str:
    """The same in Markdown."""
    head: Sequence[str] = list(lines[0])
    body = [list(line.values()) for line in lines]
    return "\n".join([f"### {title}", "", *(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *body)), "", ""])


@hydra.main(version_base="1.3", config_path=conf_dir(), config_name="report")
def main(cfg: DictConfig) -> None:
    """Print a table; add it to a Markdown file or write it as CSV where that is asked."""
    check_installation()
    from stts_lightning import assembly

    with assembly.one_line_errors():
        assembly.quiet_libraries()
        with assembly.refusals():
            number = assembly.plain(cfg)["paper_table"]
        title, lines = paper_table(number, Path(cfg.runs))
    show(title, lines)
    if cfg.markdown:
        with Path(cfg.markdown).open("a") as file:
            file.write(markdown(title, lines))
    if cfg.csv:
        with Path(cfg.csv).open("w", newline="") as file:
            writer = csv.DictWriter(file, list(lines[0]))
            writer.writeheader()
            writer.writerows(lines)


if __name__ == "__main__":
    main()
