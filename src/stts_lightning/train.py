"""`python -m stts_lightning.train`: compose, build, train, test, leave `result.json`."""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from stts_lightning import command_line, sweeps
from stts_lightning.configuration import conf_dir
from stts_lightning.doctor import check_installation
from stts_lightning.overrides import for_sweep, in_run_folder
from stts_lightning.run_folders import LAST, SPLIT, TEST, can_resume, claim, let_lightning_launch, lock

log = logging.getLogger(__name__)


def run(cfg: DictConfig, resume: Path | None, changes: Sequence[str] = ()) -> float | None:
    """Train, test and write the result of one configuration.

    Args:
        cfg: the configuration.
        resume: a checkpoint of it to resume from.
        changes: the overrides with which a run is resumed.
    """
    import lightning.pytorch as pl

    from stts_lightning import assembly, console, run_config
    from stts_lightning.analysis.evaluation import score
    from stts_lightning.analysis.flops import cost_as_tested
    from stts_lightning.analysis.results import commit, versions, write_result
    from stts_lightning.analysis.running import model_as_tested
    from stts_lightning.analysis.speed import clips_per_second
    from stts_lightning.files import fingerprint
    from stts_lightning.training.callbacks import EarlyStop, FailureLog, check_monitors
    from stts_lightning.training.loggers import log_config, log_summary
    from stts_lightning.training.optim import peak_rates
    from stts_lightning.training.preemption import LastCheckpoint, WholeCheckpointIO
    from stts_lightning.training.summary import StartTable, facts, rows
    from stts_lightning.training.testing import run_test

    with console.as_user_errors():
        run_config.check_numbers(cfg)
        assembly.check_trainable(cfg)
        pl.seed_everything(cfg.seed, workers=True, verbose=False)
        # Before any data is read or made: an impossible selection or a wrong checkpoint is refused at once.
        model = assembly.build_body(cfg)
        data = assembly.build_data(cfg, model.backbone.clip_size)
        assembly.check_truth(model, data.source.truth)
        assembly.build_optim(cfg)
        trainer = assembly.build_trainer(cfg)
        data.prepare_data()
        data.setup()
        if resume:
            run_config.check_classes(Path(cfg.run_dir), data.classes)
            data.check_lists(WholeCheckpointIO().load_checkpoint(resume, "cpu", True).get(type(data).__qualname__, {}))
            run_config.begin_resumed(Path(cfg.run_dir), changes)
        # Only now is it known to be a run: what was refused leaves an earlier one as it is.
        if not resume:
            claim(Path(cfg.run_dir), list(HydraConfig.get().overrides.task))
        run_config.save_config(cfg)
        run_config.save_classes(cfg, data.classes)
        data.write_split(Path(cfg.run_dir) / SPLIT)
        assembly.fit_head(model, len(data.classes))
        model.classes = data.classes
        module = assembly.build_module(cfg, model, data.splits["train"].labels)
        if module.augment:
            module.augment.check_batch(cfg.loader.batch_size // trainer.world_size)
        check_monitors(trainer, module.measured)
    info = facts(trainer, module, data)
    decays = bool(cfg.callbacks.sigma and cfg.callbacks.sigma.decay)
    sigma = f"{info['sigma']}{' -> 0, linear over the steps' if decays else ', constant'}"
    lines = {
        **rows(info),
        "rates": f"{peak_rates(model, module.optim)}; epochs: {cfg.trainer.max_epochs}",
        "sigma": sigma if info["sigma"] is not None else "-",
        "run folder": cfg.run_dir,
    }
    log_config(trainer, run_config.to_container(cfg))
    new = "backbone" if not cfg.pretrained else "head" if cfg.head == "reset" else ""
    trainer.callbacks.append(StartTable(lines, new))  # type: ignore[attr-defined]
    trainer.fit(module, data, ckpt_path=resume, weights_only=True)
    kept = next((c.metrics for c in trainer.callbacks if isinstance(c, LastCheckpoint)), {})  # type: ignore[attr-defined]
    last_metrics = {f"last/{name}": value for name, value in kept.items()}
    last = Path(cfg.run_dir) / LAST
    weights = f"{fingerprint(last)} {trainer.global_step}" if last.is_file() else ""
    predictions = run_test(trainer, module, data, Path(cfg.run_dir) / TEST, weights) if cfg.test else None
    tested = score(predictions) if predictions else {}
    failures = next((c.counts for c in trainer.callbacks if isinstance(c, FailureLog)), {})  # type: ignore[attr-defined]
    result = {
        **tested,
        **last_metrics,
        **info,
        **cost_as_tested(model, data.test_views),
        **(clips_per_second(model_as_tested(model), trainer.strategy.root_device) if trainer.is_global_zero else {}),
        "experiment": cfg.get("experiment_name"),  # A run of an earlier version has none.
        "sigma_last": float(model.slots.sigma) if info["sigma"] is not None else None,
        "steps": trainer.global_step,
        "stopped_early": next((c.reason for c in trainer.callbacks if isinstance(c, EarlyStop)), ""),  # type: ignore[attr-defined]
        "undecodable_files": failures,
        "versions": versions(),
        "commit": commit(),
    }
    if trainer.is_global_zero:
        write_result(Path(cfg.run_dir) / "result.json", result)
        log_summary(trainer, result)
        shown = ", ".join(f"{name} {result[name]:.1%}" for name in ("top1", "top5") if name in result)
        log.info("%s at %.2f GFLOPs a view; %s", shown or "trained", result["gflops_per_view"], Path(cfg.run_dir) / "result.json")
    return result.get("top1")


@hydra.main(version_base="1.3", config_path=conf_dir(), config_name="train")
def main(cfg: DictConfig) -> Any:
    """Train one model; returns its test top-1, or what `objectives` names, for sweepers."""
    if sweeps.is_job_of_sweep():
        return sweeps.run_job(list(cfg.objectives) if cfg.objectives else None)
    sweeps.follow_parent()
    let_lightning_launch()
    check_installation()
    # Imported late: --help and a misspelt key are answered without waiting for torch.
    from stts_lightning import console, run_config

    console.quiet()
    checkpoint, changes = None, []
    with console.one_line_errors():
        overrides, folder = list(HydraConfig.get().overrides.task), Path(cfg.run_dir)
        if cfg.resume:
            place = Path(cfg.resume)
            cfg, checkpoint = run_config.resumed_config(place, overrides, cfg)
            lock(place)
            changes = overrides
        elif can_resume(folder, overrides):
            lock(folder)
            log.info("%s holds this run, unfinished: it resumes", folder)
            cfg, checkpoint = run_config.resumed_config(folder, [], cfg)
        else:
            lock(folder)
        return run(cfg, checkpoint, changes)


if __name__ == "__main__":
    sys.argv[1:] = for_sweep(in_run_folder(sys.argv[1:]))
    command_line.check("train", sys.argv[1:])
    main()
