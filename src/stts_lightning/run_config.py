"""A run's configuration: resolved, kept in the run's folder, and read again by later commands."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra import compose
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from stts_lightning.backbones.checkpoints import read_checkpoint
from stts_lightning.errors import UserError

CONFIG, CLASSES = "config.yaml", "classes.txt"


class ConfigError(UserError):
    """A configuration that cannot be used: names the key."""


def to_container(node: Any) -> Any:
    """A configuration node as plain containers, interpolations resolved. Raises ConfigError for a value not given."""
    try:
        return OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        key = str(error).split(": ")[-1].splitlines()[0]
        raise ConfigError(f"{key}: must be given, as in {key}=...") from error


def resumed_config(run: str | Path, overrides: list[str]) -> tuple[DictConfig, Path]:
    """Configuration and last checkpoint of a run to go on with; `a.b=c` overrides apply on top.

    Raises:
        ConfigError: if the folder has no configuration or no checkpoint.
    """
    run = Path(run)
    file, checkpoint = run / CONFIG, run / "checkpoints" / "last.ckpt"
    for needed in (file, checkpoint):
        if not needed.is_file():
            raise ConfigError(f"resume={run}: there is no {needed}; give the folder of a run that wrote a checkpoint")
    cfg = _load(file)
    OmegaConf.set_struct(cfg, True)
    values = OmegaConf.from_dotlist([o for o in overrides if not o.startswith("resume=")])
    try:
        merged = OmegaConf.merge(cfg, values, {"run_dir": str(run.resolve())})  # The folder may have moved.
    except OmegaConfBaseException as error:
        raise ConfigError(f"resume={run}: {str(error).splitlines()[0]}") from error
    assert isinstance(merged, DictConfig)
    # The CSV logger starts its file anew; what it wrote so far is kept under another name.
    if _first_process() and (metrics := run / "metrics.csv").is_file():
        metrics.rename(run / f"metrics_{len(list(run.glob('metrics*.csv')))}.csv")
    return merged, checkpoint


def trained_config(cfg: DictConfig, overrides: list[str], door: str) -> tuple[DictConfig, Path]:
    """What a command is to use, and its checkpoint: what a run folder or a file says of itself, under what was asked on top.

    Args:
        cfg: composed from the command's own file; `run` names a run folder, or `checkpoint` a file.
        overrides: of the command line.
        door: name of that file.

    Raises:
        ConfigError: unless exactly one of `run` and `checkpoint` is given, or if the folder is not one of a run.
        CheckpointError: if the file cannot be read.
    """
    if bool(cfg.run) == bool(cfg.checkpoint):
        raise ConfigError("give a model: run=FOLDER, or checkpoint=FILE (with backbone= and selection=, if it is not ours)")
    file = Path(cfg.run) / "checkpoints" / f"{cfg.which}.ckpt" if cfg.run else Path(cfg.checkpoint)
    if cfg.run and not file.is_file():
        raise ConfigError(f"run={cfg.run}: there is no {file}; give the folder of a run that wrote a checkpoint")
    stored = _stored(file, cfg.trust)
    chosen = {override.partition("=")[0].lstrip("+") for override in overrides}
    if stored is not None:
        # Whatever the model or its data set bring along (views, a stride) is composed for that backbone.
        cfg = compose(door, [f"backbone={stored.backbone.name}", *overrides])
        OmegaConf.set_struct(cfg, False)
        for key in ("backbone", "selection", "dataset", "clip", "loader", "seed"):
            if key in stored and key in cfg and key not in chosen and not (key == "clip" and "dataset" in chosen):
                # A recipe names only what it was given: the rest of a backbone is its option's.
                cfg[key] = OmegaConf.merge(cfg[key], stored[key]) if key == "backbone" else stored[key]
        # Unknown keys of a group were refused by Hydra; those inside one are by the constructor that they go to.
        cfg.merge_with(OmegaConf.from_dotlist([o.lstrip("+") for o in overrides if "." in o.partition("=")[0]]))
        OmegaConf.set_struct(cfg, True)
    OmegaConf.update(cfg, "pretrained", str(file), force_add=True)
    return cfg, file


def _stored(file: Path, trust: bool) -> DictConfig | None:
    """What a checkpoint's run folder, or else the checkpoint itself, says of its model; None where neither does."""
    sibling = file.parent.parent / CONFIG
    if file.parent.name == "checkpoints" and sibling.is_file():
        return _load(sibling)
    recipe = dict(read_checkpoint(file, trust).model or {})
    if not recipe:
        return None
    selection = recipe.pop("selection")
    recipe.pop("num_classes")
    return OmegaConf.create({"backbone": {"name": recipe.pop("backbone"), **recipe}, "selection": selection})


def _load(file: Path) -> DictConfig:
    """A stored configuration, with keys that have been renamed since under today's names."""
    cfg = OmegaConf.load(file)
    assert isinstance(cfg, DictConfig)
    if "patience" in cfg.get("clip", {}):
        cfg.clip.decode_timeout = cfg.clip.pop("patience")
    return cfg


def _first_process() -> bool:
    """Whether this process is the one of its machine that writes."""
    return int(os.environ.get("LOCAL_RANK", "0")) == 0


def save_config(cfg: DictConfig) -> None:
    """Write the resolved configuration into the run's folder, for all later commands."""
    folder = Path(cfg.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if _first_process():
        OmegaConf.save(OmegaConf.create(to_container(cfg)), folder / CONFIG)


def save_classes(cfg: DictConfig, classes: Sequence[str]) -> None:
    """Write the names of the classes into the run's folder, a line each, for commands that see no data set."""
    if _first_process():
        (Path(cfg.run_dir) / CLASSES).write_text("".join(f"{name}\n" for name in classes), encoding="utf-8")


def class_names(file: str | None, checkpoint: Path, count: int) -> tuple[str, ...]:
    """Names of a model's classes: of a file, a line each, or else of the checkpoint's run folder, or else their numbers.

    Raises:
        ConfigError: if the file is missing or has another number of lines.
    """
    sibling = checkpoint.parent.parent / CLASSES
    path = Path(file) if file else sibling if checkpoint.parent.name == "checkpoints" and sibling.is_file() else None
    if path is None:
        return tuple(map(str, range(count)))
    if not path.is_file():
        raise ConfigError(f"classes={path}: no such file; give a file with the name of a class on each line")
    names = tuple(path.read_text(encoding="utf-8").splitlines())
    if len(names) != count:
        raise ConfigError(f"classes={path}: {len(names)} lines, but the model has {count} classes")
    return names
