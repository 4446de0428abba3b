"""What is known of a run before it starts: for its table, and for its result."""

import logging
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from rich.console import Console
from rich.table import Table

from stts_lightning.analysis.flops import count_gflops
from stts_lightning.classifier import HEAD_SPREAD
from stts_lightning.data.datamodule import VideoDataModule
from stts_lightning.kernels import in_use
from stts_lightning.training.module import ClassificationModule
from stts_lightning.training.optim import OptimSpec, reach

log = logging.getLogger(__name__)

SLOW = 1e-5
"""Below this a rate is one for weights that are learned already."""


def facts(trainer: pl.Trainer, module: ClassificationModule, data: VideoDataModule) -> dict[str, Any]:
    """Model, cost, data and machine of a run, under the names of `result.json`."""
    model = module.model
    spec = model.slots.selection
    gflops = count_gflops(model)
    return {
        "backbone": model.recipe["backbone"],
        "backbone_choices": model.backbone.variant(),
        "weights": model.weights,
        "selection": str(spec),
        "slots": model.slots.describe(),
        "tokens_kept": round(model.slots.share, 6),
        # Null where nothing is learned.
        "scorer": spec.scorer if model.slots.learns else None,
        "estimator": f"{spec.estimator}, {spec.samples} samples" if model.slots.learns else None,
        # Choices that learn nothing may keep segments, or one window for the clip, too.
        "ways_to_learn": spec.ways() if model.slots.learns else spec.ways(("frames", "first_frame", "windows")),
        "sigma": spec.sigma if model.slots.learns else None,
        "parameters": sum(p.numel() for p in model.parameters()),
        "gflops_per_view": round(gflops, 4),
        "gflops": round(gflops * data.test_views, 4),
        "views": data.test_views,
        "clip": list(model.backbone.clip_size),
        "dataset": data.summary(),
        "batch_size": data.loader.batch_size,
        "clips_of_a_training_video": data.copies,
        "workers": data.loader.workers(trainer),
        "kernels": in_use(model.backbone, trainer.strategy.root_device, str(trainer.precision), module.compiled),
        "devices": f"{trainer.world_size} x {trainer.strategy.root_device.type}",
        "precision": trainer.precision,
        "seed": data.seed,
    }


def rows(info: Mapping[str, Any]) -> dict[str, str]:
    """Facts as lines of a table."""
    dataset = info["dataset"]
    slots = "; ".join(f"{name.upper()}: {text}" for name, text in info["slots"].items())
    learned = [f"{info['scorer']} scorer", info["estimator"]] if info["scorer"] else []
    told = ", ".join(filter(None, [*learned, info["ways_to_learn"]]))
    how = f" ({told})" if told else ""
    size = "x".join(map(str, info["clip"]))
    videos = [str(dataset[key]) for key in ("train_videos", "val_videos", "test_videos") if key in dataset]
    # Said of a training alone: a test has the one list.
    same = "train_videos" in dataset and dataset["tested"] == "val"
    tested = "; tested on those of the validation, by which `best` is chosen (no dataset.test)" if same else ""
    choices = "".join(f", {name}={value}" for name, value in info["backbone_choices"].items())
    copies = f" x {info['clips_of_a_training_video']} clips" if info["clips_of_a_training_video"] > 1 else ""
    return {
        "model": f"{info['backbone']} {info['selection']}, {size}{choices}",
        "weights": info["weights"],
        "slots": f"{slots}{how}" if slots else "none: all tokens are kept",
        "parameters": f"{info['parameters']:,}",
        "GFLOPs": f"{info['gflops_per_view']:.2f} a view, {info['views']} views a test video",
        "data": f"{dataset['name']}: {' + '.join(videos)} videos, {dataset['classes']} classes{tested}",
        "batch": f"{info['batch_size']} videos{copies} over {info['devices']}, {info['precision']}",
        "loading": f"{info['workers']} workers a device",
    }


def show(lines: Mapping[str, object]) -> None:
    """Print a table, a line each."""
    table = Table(show_header=False, title="stts-lightning", title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in lines.items():
        table.add_row(name, str(value))
    Console().print(table)


class StartTable(pl.Callback):
    """Prints facts of a run, a line each, once the number of its steps is known.

    Args:
        rows: name and value of each line.
        new: the part with random weights: "backbone" (and with it the head), "head" alone, or empty for none.
    """

    def __init__(self, rows: Mapping[str, object], new: str = "") -> None:
        self.rows, self.new = dict(rows), new

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print on one process."""
        if trainer.is_global_zero:
            done = f" (resumed after {trainer.global_step})" if trainer.global_step else ""
            steps = int(trainer.estimated_stepping_batches)
            show({**self.rows, "steps": f"{steps}{done}"})
            assert isinstance(pl_module, ClassificationModule)
            self._warn_of_slow(pl_module.optim, steps)

    def _warn_of_slow(self, optim: OptimSpec, steps: int) -> None:
        """Say so where random weights have the rates of learned ones."""
        way = reach(optim, self.new, steps) if self.new else 0.0
        slow = optim.lr * optim.part(self.new).lr_scale < SLOW
        if not self.new or not steps or not slow or way >= HEAD_SPREAD / 10:
            return
        if self.new == "head":
            what, advice = "head=reset: the new head", "recipe=own_videos is made for it, or set optim.parts.head.lr_scale"
        else:
            what, advice = "weights: random; the model", "give learned ones with pretrained=FILE, or take recipe=scratch"
        log.warning(
            "%s hardly learns: weights are drawn with a deviation of %g, and can move by %.2g in %d steps of this recipe; %s",
            what, HEAD_SPREAD, way, steps, advice,
        )  # fmt: skip
