"""A run's configuration: resolved, kept in the run's folder, and read again by later commands."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from yaml import YAMLError

from stts_lightning.backbones.checkpoints import read_checkpoint
from stts_lightning.containers import leaves
from stts_lightning.errors import UserError
from stts_lightning.files import write_text
from stts_lightning.ranges import check_ranges
from stts_lightning.run_folders import (
    CLASSES,
    CONFIG,
    LAST,
    changes_of,
    is_first_process,
    note_owner,
    overrides_of,
    read_names,
    run_checkpoint,
    run_classes,
)
from stts_lightning.selection.spec import SelectionSpec
from stts_lightning.trusted import REFERENCE, check_stored

NEEDED = ("backbone", "selection", "dataset", "clip", "loader")
"""Groups that the configuration of every run has."""


class ConfigError(UserError):
    """A configuration that cannot be used: names the key."""


def to_container(node: Any) -> Any:
    """A configuration node as plain containers, interpolations resolved. Raises ConfigError for a value not given."""
    try:
        return OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        key = str(error).split(": ")[-1].splitlines()[0]
        raise ConfigError(f"{key}: must be given, as in {key}=...") from error


def check_numbers(cfg: DictConfig) -> None:
    """Raise RangeError for a number out of its range; see `ranges`."""
    content = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=False)
    assert isinstance(content, dict)
    check_ranges({str(key): value for key, value in content.items()})


def resumed_config(run: str | Path, overrides: Sequence[str], typed: DictConfig | None = None) -> tuple[DictConfig, Path]:
    """Configuration and last checkpoint of a run to resume; overrides apply on top, with all that follows from them.

    Args:
        run: its folder.
        overrides: as on a command line.
        typed: the configuration composed from the command line; classes that it names may be built.

    Raises:
        ConfigError: if the folder has no configuration or no checkpoint, or for an override that a run cannot change.
        TrustError: for a class that a stored configuration may not build.
    """
    run = Path(run)
    file, checkpoint = run / CONFIG, run / LAST
    for needed in (file, checkpoint):
        if not needed.is_file():
            raise ConfigError(f"resume={run}: there is no {needed}; give the folder of a run that wrote a checkpoint")
    overrides = _lasting(overrides)
    if removed := next((override for override in overrides if override.startswith("~")), None):
        raise ConfigError(f"resume={run}: {removed}: a resumed run keeps its keys; set one to null instead")
    trust = bool(typed.trust) if typed is not None else False
    cfg = _load(file, trust, typed)
    OmegaConf.set_struct(cfg, True)
    for key, value in _changes(run, overrides).items():
        # A key that the run's version did not know yet has the value that a selection takes for it.
        was = OmegaConf.select(cfg, key, default=getattr(SelectionSpec, key.removeprefix("selection."), None))
        if key.startswith(FIXED) and was != value:
            raise ConfigError(
                f"resume={run}: {key} was {was} and would be {value}; a run keeps its model. "
                f"A new run can start from this one's weights: pretrained={checkpoint}"
            )
        OmegaConf.update(cfg, key, value, merge=False, force_add=True)
    if not trust:  # Of the overrides that the folder notes as well.
        check_stored(_whole(cfg), str(run), None if typed is None else _whole(typed))
    return cfg, checkpoint


def begin_resumed(run: Path, overrides: Sequence[str]) -> None:
    """Note, in a run's folder, with what it is resumed. Call it when nothing can be refused any more."""
    if not is_first_process():
        return
    if changes := _lasting(overrides):
        note_owner(run, overrides_of(run) or [], [*changes_of(run), *changes])
    # The CSV logger starts its file anew; what it wrote so far is kept under another name.
    if (metrics := run / "metrics.csv").is_file():
        metrics.rename(run / f"metrics_{len(list(run.glob('metrics*.csv')))}.csv")


def _lasting(overrides: Sequence[str]) -> list[str]:
    """Overrides that are about the run, not about how it is resumed."""
    return [override for override in overrides if not override.startswith(("resume=", "trust="))]


FIXED = (
    "backbone.", "selection.slots", "selection.scorer", "selection.selector", "selection.reducer",
    "selection.normalize", "selection.scope", "selection.frames", "selection.first_frame",
    "selection.windows",
)  # fmt: skip
"""Keys that a run cannot change when it is resumed: its checkpoint holds that model."""


def _changes(run: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Values that overrides name or change in the configuration of a run, by full key; those that follow from others as well."""
    if not overrides:
        return {}
    name = HydraConfig.get().job.config_name or "train"
    before = [*(overrides_of(run) or []), *changes_of(run)]
    try:
        old, new = (dict(leaves(to_container(compose(name, given)), lists=False)) for given in (before, [*before, *overrides]))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"resume={run}: {str(error).splitlines()[0]}") from error
    # What is named may be what the run's recipe says today, and yet not what the run has.
    named = {override.partition("=")[0].lstrip("+") for override in overrides}
    return {key: value for key, value in new.items() if key in named or key not in old or old[key] != value}


def trained_config(cfg: DictConfig, overrides: list[str], door: str) -> tuple[DictConfig, Path]:
    """What a command is to use, and its checkpoint: what a run folder or a file says of itself, under what was asked on top.

    Args:
        cfg: composed from the command's own file; `run` names a run folder, or `checkpoint` a file.
        overrides: of the command line.
        door: name of that file.

    Raises:
        ConfigError: unless exactly one of `run` and `checkpoint` is given.
        RunError: if the folder has no such checkpoint.
        CheckpointError: if the file cannot be read.
    """
    if cfg.run and cfg.checkpoint:
        raise ConfigError(f"run={cfg.run} and checkpoint={cfg.checkpoint}: both name a model; give one of them")
    if not cfg.run and not cfg.checkpoint:
        raise ConfigError("give a model: run=FOLDER, or checkpoint=FILE (with backbone= and selection=, if it is not ours)")
    file = run_checkpoint(cfg.run, cfg.which) if cfg.run else Path(cfg.checkpoint)
    stored = _stored(file, cfg.trust, cfg)
    chosen = {override.partition("=")[0].lstrip("+") for override in overrides}
    if stored is not None:
        # Whatever the model or its data set bring along (views, a stride) is composed for that backbone.
        cfg = compose(door, [f"backbone={stored.backbone.name}", *overrides])
        OmegaConf.set_struct(cfg, False)
        values = to_container(stored)  # Paths in the run's folder are of that folder, not of this command's.
        for key in ("backbone", "selection", "dataset", "clip", "loader", "seed"):
            if key in values and key in cfg and key not in chosen and not (key == "clip" and "dataset" in chosen):
                # A recipe names only what it was given: the rest of a backbone is its option's.
                cfg[key] = OmegaConf.merge(cfg[key], values[key]) if key == "backbone" else values[key]
        # Unknown keys of a group were refused by Hydra; those inside one are by the constructor that they go to.
        cfg.merge_with(OmegaConf.from_dotlist([o.lstrip("+") for o in overrides if "." in o.partition("=")[0]]))
        OmegaConf.set_struct(cfg, True)
    OmegaConf.update(cfg, "pretrained", str(file), force_add=True)
    return cfg, file


def _stored(file: Path, trust: bool, typed: DictConfig) -> DictConfig | None:
    """What a checkpoint's run folder, or else the checkpoint itself, says of its model; None where neither does."""
    sibling = file.parent.parent / CONFIG
    if file.parent.name == "checkpoints" and sibling.is_file():
        return _load(sibling, trust, typed)
    recipe = dict(read_checkpoint(file, trust).model or {})
    if not recipe:
        return None
    if not trust:
        check_stored(recipe, f"checkpoint {file}", _whole(typed))
    selection = recipe.pop("selection")
    for key in ("num_classes", "classes"):
        recipe.pop(key, None)
    return OmegaConf.create({"backbone": {"name": recipe.pop("backbone"), **recipe}, "selection": selection})


def _load(file: Path, trust: bool, typed: DictConfig | None) -> DictConfig:
    """A stored configuration: paths follow its folder, renamed keys have today's names, and it builds only what it may."""
    try:
        content: Any = OmegaConf.to_container(OmegaConf.load(file))
    except (OSError, ValueError, YAMLError) as error:
        raise ConfigError(f"{file}: cannot be read ({str(error).splitlines()[0]})") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: is no configuration of a run")
    stored = {str(key): value for key, value in content.items()}
    if missing := [key for key in NEEDED if not isinstance(stored.get(key), dict)]:
        raise ConfigError(f"{file}: lacks {', '.join(missing)}; it is not the configuration that a run wrote")
    if not trust:
        check_stored(stored, str(file), None if typed is None else _whole(typed))
    folder = str(file.parent.resolve())
    if (before := stored.get("run_dir")) and before != folder:  # Of an earlier version, which stored absolute paths.
        stored = _with_folder(stored, str(before), REFERENCE)
    stored = _with_folder(stored, REFERENCE, folder)
    stored |= {"run_dir": folder, "trust": trust}
    if "patience" in stored.get("clip", {}):
        stored["clip"]["decode_timeout"] = stored["clip"].pop("patience")
    cfg = OmegaConf.create(stored)
    assert isinstance(cfg, DictConfig)
    return cfg


def _whole(cfg: DictConfig) -> dict[str, Any]:
    """A configuration as plain containers, whether all of its values are given or not."""
    content = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=False)
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


def _with_folder(content: Any, before: str, after: str) -> Any:
    """Containers in which a folder, and paths below it, are written otherwise."""
    if isinstance(content, dict):
        return {key: _with_folder(value, before, after) for key, value in content.items()}
    if isinstance(content, list):
        return [_with_folder(value, before, after) for value in content]
    if isinstance(content, str) and (content == before or content.startswith(f"{before}/")):
        return after + content.removeprefix(before)
    return content


def save_config(cfg: DictConfig) -> None:
    """Write the resolved configuration into the run's folder, for all later commands.

    Paths in that folder are relative to it, so that it can be moved and copied; `trust` is not written.
    """
    content = to_container(cfg)
    for key in ("trust", "resume"):
        content.pop(key, None)
    folder = str(content.pop("run_dir"))
    if is_first_process():
        content = _with_folder(content, folder, REFERENCE)
        write_text(Path(folder) / CONFIG, OmegaConf.to_yaml(OmegaConf.create(content)))


def save_classes(cfg: DictConfig, classes: Sequence[str]) -> None:
    """Write the names of the classes into the run's folder, a line each, for commands that see no data set."""
    if is_first_process():
        write_text(Path(cfg.run_dir) / CLASSES, "".join(f"{name}\n" for name in classes))


def check_classes(folder: Path, classes: Sequence[str]) -> None:
    """Compare the classes of a data set with those that a run was trained on, if its folder names them.

    Names of classes that are their numbers say nothing.

    Raises:
        ConfigError: names the first class that differs: its label would mean another class.
    """
    file = folder / CLASSES
    if not file.is_file():
        return
    before = list(read_names(file))
    numbers = [str(number) for number in range(len(before))]
    if before == numbers or list(classes) == [str(number) for number in range(len(classes))]:
        return
    for number, (old, new) in enumerate(zip(before, classes, strict=False)):
        if old != new:
            raise ConfigError(
                f"class {number} is {new!r} in the data set, and was {old!r} when {folder} was trained: labels would mean other "
                "classes; give the classes in the run's order, as in dataset.classes=" + str(file)
            )
    if len(before) != len(classes):
        raise ConfigError(f"the data set has {len(classes)} classes, and had {len(before)} when {folder} was trained")


def class_names(file: str | None, checkpoint: Path, known: Sequence[str]) -> tuple[str, ...]:
    """Names of a model's classes: of a file, a line each, or else of the checkpoint's run folder, or else what the model knows.

    Raises:
        ConfigError: if the file is missing or has another number of lines.
    """
    if file and not Path(file).is_file():
        raise ConfigError(f"classes={file}: no such file; give a file with the name of a class on each line")
    names = read_names(Path(file)) if file else run_classes(checkpoint) or tuple(known)
    if len(names) != len(known):
        raise ConfigError(
            f"classes={file or checkpoint.parent.parent / CLASSES}: {len(names)} lines; the model has {len(known)} classes"
        )
    return names
