"""`python -m stts_lightning.flops`: what a configuration costs, by part of the model and for a whole test."""

import csv
import json
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig

from stts_lightning.conf_dir import conf_dir
from stts_lightning.doctor import check_installation


def costs(cfg: DictConfig) -> dict[str, Any]:
    """Figures of one configuration, as `json=` writes them."""
    from stts_lightning import assembly
    from stts_lightning.analysis.flops import count

    with assembly.refusals():
        model = assembly.build_untrained(cfg, cfg.num_classes)
    cost = count(model)
    views = cfg.clip.test_views * cfg.clip.test_crops
    return {
        "backbone": cfg.backbone.name,
        "backbone_choices": model.backbone.choices(),
        "selection": str(model.slots.selection),
        "slots": model.slots.describe(),
        "clip": list(model.backbone.clip_size),
        "parameters": sum(p.numel() for p in model.parameters()),
        "selector_parameters": sum(p.numel() for p in model.slots.parameters()),
        "gflops": cost.gflops,
        "views": views,
        "gflops_of_test": cost.gflops * views,
        "gflops_by_part": cost.parts,
        "tokens_of_blocks": model.backbone.block_sizes,
        "uncounted_operators": cost.uncounted,
    }


def lines(found: dict[str, Any]) -> dict[str, str]:
    """The same as a table's lines."""
    slots = "; ".join(f"{name.upper()}: {text}" for name, text in found["slots"].items())
    blocks: list[str] = []
    for number, size in enumerate(found["tokens_of_blocks"]):
        text = "x".join(map(str, size))
        if not blocks or not blocks[-1].endswith(text):
            blocks.append(f"from block {number} {text}")
    shares = (f"{part} {value:.2f} ({value / found['gflops']:.1%})" for part, value in found["gflops_by_part"].items())
    choices = "".join(f", {name}={value}" for name, value in found["backbone_choices"].items())
    return {
        "model": f"{found['backbone']} {found['selection']}, {'x'.join(map(str, found['clip']))}{choices}",
        "slots": slots or "none: the plain model",
        "parameters": f"{found['parameters']:,}, {found['selector_parameters']:,} of them in selectors",
        "GFLOPs a view": f"{found['gflops']:.2f}",
        "GFLOPs a test": f"{found['gflops_of_test']:.1f} ({found['views']} views)",
        "by part": "\n".join(shares),
        "tokens": "\n".join(blocks),
        "not counted": ", ".join(f"{n} {name.removeprefix('aten::')}" for name, n in found["uncounted_operators"].items()),
    }


def write(found: dict[str, Any], json_file: str | None, csv_file: str | None) -> None:
    """Write figures: the whole as JSON; a row to a CSV file, which a sweep fills."""
    if json_file:
        Path(json_file).write_text(json.dumps(found, indent=2) + "\n")
    if csv_file:
        found = {**found, "slots": "; ".join(f"{name}: {text}" for name, text in found["slots"].items())}
        names = ("backbone", "selection", "slots", "parameters", "gflops", "views", "gflops_of_test")
        path = Path(csv_file)
        new = not path.is_file()
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, names)
            if new:
                writer.writeheader()
            writer.writerow({name: found[name] for name in names})


@hydra.main(version_base="1.3", config_path=conf_dir(), config_name="flops")
def main(cfg: DictConfig) -> float:
    """Print the costs of one configuration; returns its GFLOPs for sweepers."""
    check_installation()
    from stts_lightning import assembly
    from stts_lightning.training.summary import show

    with assembly.one_line_errors():
        assembly.quiet_libraries()
        found = costs(cfg)
    show(lines(found))
    write(found, cfg.json, cfg.csv)
    return found["gflops"]


if __name__ == "__main__":
    main()
