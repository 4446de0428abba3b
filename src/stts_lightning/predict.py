"""`python -m stts_lightning.predict`: label any videos over time, and show what the model looked at."""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from stts_lightning import command_line
from stts_lightning.configuration import conf_dir
from stts_lightning.doctor import check_installation
from stts_lightning.overrides import for_run
from stts_lightning.run_folders import let_lightning_launch, lock

log = logging.getLogger(__name__)


def predict(cfg: DictConfig, overrides: list[str]) -> list[dict[str, Any]]:
    """Label the videos; returns what `run_predict` found."""
    import lightning.pytorch as pl

    from stts_lightning import assembly, console, run_config
    from stts_lightning.data.windows import find_videos
    from stts_lightning.files import fingerprint
    from stts_lightning.training.partial import question
    from stts_lightning.training.predicting import Predictor, WindowData, run_predict

    console.quiet()
    folder = Path(cfg.run_dir)
    lock(folder)
    with console.as_user_errors():
        videos = find_videos(run_config.to_container(cfg)["videos"])
        cfg, checkpoint = run_config.trained_config(cfg, overrides, "predict")
        run_config.check_numbers(cfg)
        pl.seed_everything(cfg.seed, workers=True, verbose=False)
        trainer = assembly.build_trainer(cfg)
        model = assembly.build_model(cfg)
        assembly.check_truth(model, known=False)
        rule = assembly.build_windows(cfg, model.backbone.clip_size)
        classes = run_config.class_names(cfg.classes, checkpoint, model.classes)
        if cfg.overlay and model.slots.empty:
            raise run_config.ConfigError("overlay=true: this model has no selectors, it keeps all of every clip")
        module = assembly.build_module(cfg, model)
        data = WindowData(videos, rule, assembly.build_loader(cfg))
    quiet = not trainer.is_global_zero
    predictor = Predictor(folder, videos, classes, cfg.top, cfg.overlay_windows if cfg.overlay else 0, quiet)
    shown = (classes, cfg.top, cfg.overlay, cfg.overlay_windows)
    asked = question(fingerprint(checkpoint), rule.question(), *shown, *map(fingerprint, videos))
    records = run_predict(trainer, module, data, predictor, asked)
    if records is None:  # Not the first process.
        raise SystemExit(0)
    return records


def show(records: Sequence[dict[str, Any]]) -> None:
    """Print the likeliest classes of each video, and of its windows where there are several."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from stts_lightning.analysis.results import printable

    table = Table(title="predictions", title_justify="left")
    for name in ("video", "seconds", "classes, the likeliest first"):
        table.add_column(name, overflow="fold")

    # Names of files and classes are no markup, and may be no UTF-8.
    def classes(top: Sequence[dict[str, Any]]) -> Text:
        return Text(printable(", ".join(f"{one['class']} {one['probability']:.1%}" for one in top)))

    for video in records:
        windows = video.get("windows", [])
        name = Text(printable(video["video"]))
        table.add_row(name, "all" if len(windows) > 1 else "", classes(video["top"]) if windows else "")
        for window in windows if len(windows) > 1 else ():
            table.add_row("", f"{window['start']:.1f} - {window['end']:.1f}", classes(window["top"][:2]))
        if "error" in video:
            table.add_row("", "", Text(printable(video["error"]), style="red"))
    Console().print(table)


@hydra.main(version_base="1.3", config_path=conf_dir(), config_name="predict")
def main(cfg: DictConfig) -> None:
    """Label videos."""
    let_lightning_launch()
    check_installation()
    from stts_lightning import console

    with console.one_line_errors():
        records = predict(cfg, list(HydraConfig.get().overrides.task))
    show(records)
    undecoded = sum("error" in video for video in records)
    if not any("top" in video for video in records):
        print(f"error: none of {len(records)} videos could be decoded; nothing was written", file=sys.stderr)
        raise SystemExit(1)
    log.info("videos: %d, not decoded: %d; %s", len(records), undecoded, Path(cfg.run_dir) / "predictions.json")


if __name__ == "__main__":
    sys.argv[1:] = for_run(sys.argv[1:], "predictions")
    command_line.check("predict", sys.argv[1:])
    main()
