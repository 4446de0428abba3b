"""`python -m stts_lightning.evaluate`: test a run or a checkpoint on all its views; ask again without another pass."""

import logging
import math
import sys
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from stts_lightning import command_line
from stts_lightning.configuration import conf_dir
from stts_lightning.doctor import check_installation
from stts_lightning.overrides import for_run
from stts_lightning.run_folders import EXIT_REFUSED, RESULT, let_lightning_launch, lock

log = logging.getLogger(__name__)


def test(cfg: DictConfig, folder: Path) -> dict[str, Any]:
    """Run the test and leave its predictions and tables in a folder; returns what is known and what was measured."""
    import lightning.pytorch as pl

    from stts_lightning import assembly, console, run_config
    from stts_lightning.analysis.evaluation import check_question, score
    from stts_lightning.analysis.flops import cost_as_tested
    from stts_lightning.analysis.running import model_as_tested, running_costs
    from stts_lightning.files import fingerprint
    from stts_lightning.training.callbacks import FailureLog
    from stts_lightning.training.summary import facts, rows, show
    from stts_lightning.training.testing import run_test

    with console.as_user_errors():
        run_config.check_numbers(cfg)
        pl.seed_everything(cfg.seed, workers=True, verbose=False)
        model = assembly.build_body(cfg)
        data = assembly.build_data(cfg, model.backbone.clip_size)
        assembly.check_truth(model, data.source.truth)
        check_question(cfg.views, cfg.missing, data.test_views)
        trainer = assembly.build_trainer(cfg)
        data.prepare_data()
        data.setup("test")
        if Path(cfg.pretrained).parent.name == "checkpoints":
            trained = Path(cfg.pretrained).parent.parent
            run_config.check_classes(trained, data.classes)
            warn_of_another_list(trained, data.source.name, data.test_hash)
        assembly.fit_head(model, len(data.classes))
        module = assembly.build_module(cfg, model)
    info = facts(trainer, module, data)
    if trainer.is_global_zero:
        show(rows(info))
    predictions = run_test(trainer, module, data, folder, f"{fingerprint(Path(cfg.pretrained))} {model.recipe} {cfg.seed}")
    if predictions is None:  # Not the first process.
        raise SystemExit(0)
    failures = next((c.counts for c in trainer.callbacks if isinstance(c, FailureLog)), {})  # type: ignore[attr-defined]
    cost = cost_as_tested(model, data.test_views)
    measured = running_costs(model_as_tested(model), trainer.strategy.root_device)
    return {**score(predictions, cfg.views, cfg.missing), **info, **cost, **measured, "undecodable_files": failures}


def warn_of_another_list(run: Path, name: str, tested: str) -> None:
    """Say so where a run was tested on a list of the same name and other videos or labels."""
    from stts_lightning.analysis.results import read_result, tested_hash

    before = read_result(run).get("dataset", {}) if (run / RESULT).is_file() else {}
    was = tested_hash(before)
    if before.get("name") == name and was != tested:
        log.warning("the test list of %s is not the one that the run was tested on (hash %s, was %s)", name, tested, was)


def run(cfg: DictConfig, overrides: list[str]) -> float:
    """Answer one question about a test, and print and write the answer."""
    from stts_lightning import console, run_config
    from stts_lightning.analysis.evaluation import FILE, Predictions, score
    from stts_lightning.analysis.results import commit, versions, write_result

    console.quiet()
    folder = Path(cfg.run_dir)
    lock(folder)
    if cfg.predictions:
        if not (Path(cfg.predictions) / FILE).is_file():
            raise run_config.ConfigError(f"predictions={cfg.predictions}: there is no {FILE} in it; give the folder of a test")
        with console.as_user_errors():
            result = score(Predictions.load(cfg.predictions), cfg.views, cfg.missing)
    else:
        cfg, checkpoint = run_config.trained_config(cfg, overrides, "evaluate")
        result = {**test(cfg, folder), "checkpoint": str(checkpoint), "versions": versions(), "commit": commit()}
    write_result(folder / "evaluation.json", result)
    low, high = result["top1_interval"]
    accuracies = [f"{name} {result[name]:.2%}" for name in ("top1", "top5", "mean_class_accuracy") if name in result]
    log.info("%s (top1 between %.2f%% and %.2f%% with 95 %% confidence)", ", ".join(accuracies), 100 * low, 100 * high)
    log.info("videos: %d, missing: %d, views: %d; %s", result["videos"], result["missing"], result["views"], folder)
    return result["top1"]


refused: list[str] = []
"""Overrides of the jobs of a sweep that ended with an error."""


@hydra.main(version_base="1.3", config_path=conf_dir(), config_name="evaluate")
def main(cfg: DictConfig) -> float:
    """Test one model; returns its top-1, not a number where a job of a sweep is refused: the others go on."""
    let_lightning_launch()
    check_installation()
    from stts_lightning import console

    overrides = list(HydraConfig.get().overrides.task)
    try:
        with console.one_line_errors():
            return run(cfg, overrides)
    except SystemExit as end:
        if HydraConfig.get().mode != RunMode.MULTIRUN or end.code != EXIT_REFUSED:
            raise
        refused.append(" ".join(overrides))
        return math.nan


if __name__ == "__main__":
    sys.argv[1:] = for_run(sys.argv[1:], "evaluation", by_question=True)
    command_line.check("evaluate", sys.argv[1:])
    main()
    for job in refused:
        print(f"not tested: {job}", file=sys.stderr)
    if refused:
        raise SystemExit(1)
