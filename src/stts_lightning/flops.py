"""`python -m stts_lightning.flops`: what a configuration costs, or all of the paper, or which ones a budget allows."""

import csv
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from stts_lightning import command_line
from stts_lightning.configuration import conf_dir
from stts_lightning.doctor import check_installation
from stts_lightning.overrides import for_run

if TYPE_CHECKING:
    from stts_lightning.classifier import VideoClassifier

COLUMNS = ("backbone", "selection", "slots", "parameters", "gflops", "views", "gflops_of_test")


def facts(cfg: DictConfig, model: "VideoClassifier", gflops: float) -> dict[str, Any]:
    """Figures of a model, as `json=` writes them."""
    views = cfg.clip.test_views * cfg.clip.test_crops
    return {
        "backbone": cfg.backbone.name,
        "backbone_choices": model.backbone.variant(),
        "selection": str(model.slots.selection),
        "slots": model.slots.describe(),
        "clip": list(model.backbone.clip_size),
        "parameters": sum(p.numel() for p in model.parameters()),
        "selector_parameters": sum(p.numel() for p in model.slots.parameters()),
        "gflops": gflops,
        "views": views,
        "gflops_of_test": gflops * views,
    }


def one(cfg: DictConfig) -> list[dict[str, Any]]:
    """Figures of the configuration, counted operator by operator."""
    from stts_lightning import assembly, console
    from stts_lightning.analysis.flops import count

    with console.as_user_errors():
        model = assembly.build_untrained(cfg, cfg.num_classes)
    cost = count(model)
    details = {
        "gflops_by_part": cost.parts,
        "tokens_of_blocks": model.backbone.block_sizes,
        "tokens_after_reducers": model.slots.tokens_after_reducers(),
        "uncounted_operators": cost.uncounted,
    }
    return [{**facts(cfg, model, cost.gflops), **details}]


def of_the_paper(cfg: DictConfig) -> list[dict[str, Any]]:
    """Figures of every selection of the paper that the backbone can honour."""
    import torch

    from stts_lightning import assembly, console
    from stts_lightning.analysis.flops import count_gflops
    from stts_lightning.selection.spec import PAPER_SELECTIONS, SelectionError, SelectionSpec

    rows = []
    for name in PAPER_SELECTIONS:
        slots = SelectionSpec.of(name).to_dict()["slots"]
        with console.as_user_errors(), torch.device("meta"):
            try:
                model = assembly.build_untrained(cfg, cfg.num_classes, slots)
            except SelectionError as error:
                print(f"left out {name}: {error}")
                continue
        rows.append(facts(cfg, model, count_gflops(model)))
    return sorted(rows, key=lambda row: -row["gflops"])


def affordable(cfg: DictConfig) -> list[dict[str, Any]]:
    """Figures of the selections that use up a budget."""
    import torch

    from stts_lightning import assembly, console, run_config
    from stts_lightning.analysis.budget import within_budget

    blocks = list(cfg.budget_blocks)
    with console.as_user_errors(), torch.device("meta"):
        choices = within_budget(assembly.build_untrained(cfg, cfg.num_classes, {}), cfg.budget, blocks)
        if not choices:
            raise run_config.ConfigError(f"budget={cfg.budget}: no selection before blocks {blocks} costs so little")
        rows = []
        for choice in choices:
            slots = choice.selection.to_dict()["slots"]
            model = assembly.build_untrained(cfg, cfg.num_classes, slots)
            keys = (f"++selection.slots.{slot}.{key}={value}" for slot, kept in slots.items() for key, value in kept.items())
            rows.append({**facts(cfg, model, choice.gflops), "overrides": ["selection=none", *keys]})
    return rows


def lines(row: Mapping[str, Any]) -> dict[str, str]:
    """One configuration as a table's lines."""
    slots = "; ".join(f"{name.upper()}: {text}" for name, text in row["slots"].items())
    blocks: list[str] = []
    for number, size in enumerate(row["tokens_of_blocks"]):
        text = "x".join(map(str, size))
        if not blocks or not blocks[-1].endswith(text):
            blocks.append(f"from block {number} {text}")
    blocks += [f"after {name.upper()} {tokens}" for name, tokens in row["tokens_after_reducers"].items()]
    shares = (f"{part} {value:.2f} ({value / row['gflops']:.1%})" for part, value in row["gflops_by_part"].items())
    choices = "".join(f", {name}={value}" for name, value in row["backbone_choices"].items())
    return {
        "model": f"{row['backbone']} {row['selection']}, {'x'.join(map(str, row['clip']))}{choices}",
        "slots": slots or "none: all tokens are kept",
        "parameters": f"{row['parameters']:,}, {row['selector_parameters']:,} of them in selectors",
        "GFLOPs a view": f"{row['gflops']:.2f}",
        "GFLOPs a test": f"{row['gflops_of_test']:.1f} ({row['views']} views)",
        "by part": "\n".join(shares),
        "tokens": "\n".join(blocks),
        "not counted": ", ".join(f"{n} {name.removeprefix('aten::')}" for name, n in row["uncounted_operators"].items()),
    }


def print_many(rows: Sequence[Mapping[str, Any]], title: str) -> None:
    """A table with a line for each configuration."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for name in ("selection", "keeps"):
        table.add_column(name, overflow="fold")
    for name in ("GFLOPs a view", "a test", "parameters"):
        table.add_column(name, justify="right")
    for row in rows:
        kept = "; ".join(f"{name.upper()}: {text}" for name, text in row["slots"].items())
        figures = (f"{row['gflops']:.2f}", f"{row['gflops_of_test']:.1f}", f"{row['parameters']:,}")
        table.add_row(row["selection"], kept or "all tokens", *figures)
    Console().print(table)


def write(rows: Sequence[Mapping[str, Any]], json_file: str | None, csv_file: str | None) -> None:
    """Write figures: the whole as JSON, a list where there are many; a row each to a CSV file, which a sweep fills."""
    if json_file:
        Path(json_file).write_text(json.dumps(rows[0] if len(rows) == 1 else rows, indent=2) + "\n")
    if csv_file:
        path = Path(csv_file)
        new = not path.is_file()
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if new:
                writer.writeheader()
            for row in rows:
                slots = "; ".join(f"{name}: {text}" for name, text in row["slots"].items())
                writer.writerow({name: {**row, "slots": slots}[name] for name in COLUMNS})


def plot(rows: Sequence[Mapping[str, Any]], file: str) -> None:
    """Draw the parts of one configuration, or all configurations; the suffix says how (png, svg, pdf)."""
    from stts_lightning.analysis import charts

    if len(rows) == 1:
        row = rows[0]
        values, title = row["gflops_by_part"], f"{row['backbone']} {row['selection']}: {row['gflops']:.2f} GFLOPs by part"
    else:
        values, title = {row["selection"]: row["gflops"] for row in rows}, str(rows[0]["backbone"])
    with charts.style():
        charts.costs(values, title).savefig(file, dpi=130)


@hydra.main(version_base="1.3", config_path=conf_dir(), config_name="flops")
def main(cfg: DictConfig) -> float:
    """Print costs; returns the GFLOPs of the configuration, or of the dearest one, for sweepers."""
    check_installation()
    from stts_lightning import console, run_config
    from stts_lightning.backbones.checkpoints import read_checkpoint
    from stts_lightning.training.summary import show

    with console.one_line_errors():
        console.quiet()
        if cfg.run or cfg.checkpoint:
            cfg, checkpoint = run_config.trained_config(cfg, list(HydraConfig.get().overrides.task), "flops")
            cfg.num_classes = read_checkpoint(checkpoint, cfg.trust).num_classes or cfg.num_classes
        run_config.check_numbers(cfg)
        if cfg.budget is not None:
            rows = affordable(cfg)
            print_many(rows, f"{cfg.backbone.name} within {cfg.budget} GFLOPs a view")
            print("The first is", *rows[0]["overrides"])
        elif cfg.all:
            rows = of_the_paper(cfg)
            print_many(rows, f"the paper's selections, {cfg.backbone.name}")
        else:
            rows = one(cfg)
            show(lines(rows[0]))
        write(rows, cfg.json, cfg.csv)
        if cfg.plot:
            plot(rows, cfg.plot)
    return rows[0]["gflops"]


if __name__ == "__main__":
    sys.argv[1:] = for_run(sys.argv[1:])
    command_line.check("flops", sys.argv[1:])
    main()
