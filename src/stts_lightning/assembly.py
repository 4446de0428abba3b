"""From a composed configuration to built objects. Front doors call it; nothing below ever sees a DictConfig."""

import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from hydra import compose
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ProgressBar
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from stts_lightning.analysis.closed_form import UnwrittenCost, closed_form
from stts_lightning.analysis.exporting import ExportError
from stts_lightning.analysis.flops import count_gflops
from stts_lightning.backbones import BackboneError, CheckpointError
from stts_lightning.backbones.checkpoints import read_checkpoint
from stts_lightning.classifier import COMPILE, VideoClassifier, create_model
from stts_lightning.data.annotations import AnnotationError
from stts_lightning.data.datamodule import LoaderError, LoaderOptions, VideoDataModule
from stts_lightning.data.dataset import ClipSpec
from stts_lightning.data.decode import DecodeError
from stts_lightning.data.transforms import EvalTransform
from stts_lightning.data.windows import WindowRule
from stts_lightning.selection.spec import SelectionError
from stts_lightning.training.augment import BatchAugment
from stts_lightning.training.keeping import KeepingError, WholeCheckpointIO
from stts_lightning.training.module import ClassificationModule, TrainingError
from stts_lightning.training.optim import OptimSpec, PartSpec

CONFIG, CLASSES = "config.yaml", "classes.txt"


class ConfigError(ValueError):
    """A configuration that cannot be used: names the key."""


USER_ERRORS = (
    ConfigError,
    SelectionError,
    BackboneError,
    CheckpointError,
    AnnotationError,
    DecodeError,
    LoaderError,
    ExportError,
    KeepingError,
    TrainingError,
    MisconfigurationException,
)


@contextmanager
def refusals() -> Iterator[None]:
    """While objects are built from a configuration, every value that one of them refuses is the user's to mend."""
    try:
        yield
    except USER_ERRORS:
        raise
    except InstantiationException as error:
        raise ConfigError(f"configuration: {error.__cause__ or error}") from error
    except (ValueError, TypeError) as error:
        raise ConfigError(str(error)) from error


def plain(node: Any) -> Any:
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
    cfg = OmegaConf.load(file)
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
    beside = file.parent.parent / CONFIG
    if file.parent.name == "checkpoints" and beside.is_file():
        cfg = OmegaConf.load(beside)
        assert isinstance(cfg, DictConfig)
        return cfg
    recipe = dict(read_checkpoint(file, trust).model or {})
    if not recipe:
        return None
    selection = recipe.pop("selection")
    recipe.pop("num_classes")
    return OmegaConf.create({"backbone": {"name": recipe.pop("backbone"), **recipe}, "selection": selection})


def _first_process() -> bool:
    """Whether this process is the one of its machine that writes."""
    return int(os.environ.get("LOCAL_RANK", "0")) == 0


def save_config(cfg: DictConfig) -> None:
    """Write the resolved configuration into the run's folder, for all later commands."""
    folder = Path(cfg.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if _first_process():
        OmegaConf.save(OmegaConf.create(plain(cfg)), folder / CONFIG)


def save_classes(cfg: DictConfig, classes: Sequence[str]) -> None:
    """Write the names of the classes into the run's folder, a line each, for commands that see no data set."""
    if _first_process():
        (Path(cfg.run_dir) / CLASSES).write_text("".join(f"{name}\n" for name in classes), encoding="utf-8")


def class_names(file: str | None, checkpoint: Path, count: int) -> tuple[str, ...]:
    """Names of a model's classes: of a file, a line each, or else of the checkpoint's run folder, or else their numbers.

    Raises:
        ConfigError: if the file is missing or has another number of lines.
    """
    beside = checkpoint.parent.parent / CLASSES
    path = Path(file) if file else beside if checkpoint.parent.name == "checkpoints" and beside.is_file() else None
    if path is None:
        return tuple(map(str, range(count)))
    if not path.is_file():
        raise ConfigError(f"classes={path}: no such file; give a file with the name of a class on each line")
    names = tuple(path.read_text(encoding="utf-8").splitlines())
    if len(names) != count:
        raise ConfigError(f"classes={path}: {len(names)} lines, but the model has {count} classes")
    return names


def build_windows(cfg: DictConfig, clip_size: tuple[int, int, int]) -> WindowRule:
    """How `predict` cuts videos."""
    frames, *size = clip_size
    clip = plain(cfg.clip)
    short = clip["test_short_side"] if clip["test_short_side"] is not None else clip["short_side"]
    pictures = None
    if cfg.overlay:
        zoom = max(-(-256 // max(size)), 1)
        shown = short * zoom if isinstance(short, int) else short
        pictures = EvalTransform([zoom * side for side in size], shown)
    spec = ClipSpec(frames, clip["stride"], 1, clip["sampling"])
    return WindowRule(
        spec, EvalTransform(size, short, clip["test_crops"]), cfg.every, pictures, clip["decoder"], clip.get("patience", 60.0)
    )


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn errors that are the user's to mend into one line and exit status 2; set HYDRA_FULL_ERROR=1 to see more."""
    try:
        yield
    except USER_ERRORS as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        # A worker's error comes with the worker's stack trace; its last line is the error.
        line = str(error).strip().splitlines()[-1].removeprefix(f"{type(error).__module__}.{type(error).__name__}: ")
        print(f"error: {line}", file=sys.stderr)
        raise SystemExit(2) from error


def quiet_libraries() -> None:
    """Keep what is not the user's to mend off the screen: tips, device inventories, libraries' own deprecations."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*torch.jit.*",
        ".*treespec.*",
        ".*does not have many workers.*",
        ".*Experiment logs directory.*",
        ".*broadcast_buffers.*",
    ):
        warnings.filterwarnings("ignore", message=message)
    warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")
    warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty.*")


def build_model_shape(cfg: DictConfig) -> tuple[int, int, int]:
    """Clip size of the configured model, from a weightless copy. Raises SelectionError for an impossible selection."""
    with torch.device("meta"):
        return build_untrained(cfg, 1).backbone.clip_size


def build_untrained(cfg: DictConfig, num_classes: int, slots: dict[str, Any] | None = None) -> VideoClassifier:
    """The classifier without weights from a file, with other slots if some are given."""
    values: dict[str, Any] = plain(cfg.backbone)
    selection = plain(cfg.selection) if slots is None else {**plain(cfg.selection), "slots": slots}
    return create_model(values.pop("name"), selection, num_classes, **values)


class ExperimentCost(NamedTuple):
    """What one view of an experiment's model costs, in GFLOPs, how many views its test has, and its backbone."""

    gflops: float
    views: int
    backbone: str


def experiment_cost(name: str) -> ExperimentCost:
    """Cost of a shipped experiment on its own data set, from sizes alone where its closed form is known."""
    cfg = compose("train", [f"experiment={name}"])
    classes = {"ssv2": 174}.get(cfg.dataset.name, 400)
    with torch.device("meta"):
        model = build_untrained(cfg, classes)
    try:
        gflops = closed_form(model)
    except UnwrittenCost:
        gflops = count_gflops(build_untrained(cfg, classes))
    return ExperimentCost(gflops, cfg.clip.test_views * cfg.clip.test_crops, cfg.backbone.name)


def build_model(cfg: DictConfig, num_classes: int) -> VideoClassifier:
    """The classifier with its weights."""
    values: dict[str, Any] = plain(cfg.backbone)
    name, selection = values.pop("name"), plain(cfg.selection)
    return create_model(name, selection, num_classes, cfg.pretrained, cfg.head, cfg.trust, **values)


def build_trained(cfg: DictConfig, checkpoint: Path) -> VideoClassifier:
    """The classifier that a checkpoint holds, with as many classes as it has; those of `num_classes` where it has no head."""
    return build_model(cfg, read_checkpoint(checkpoint, cfg.trust).num_classes or cfg.num_classes)


def build_data(cfg: DictConfig, clip_size: tuple[int, int, int]) -> VideoDataModule:
    """The datamodule for clips of a size."""
    plain(cfg.dataset)  # A missing value is named before anything is built.
    source, loader = instantiate(cfg.dataset), build_loader(cfg)
    return VideoDataModule(source=source, clip_size=clip_size, loader=loader, seed=cfg.seed, **plain(cfg.clip))


def build_loader(cfg: DictConfig) -> LoaderOptions:
    """Batches and workers."""
    return LoaderOptions(**plain(cfg.loader))


def build_optim(cfg: DictConfig) -> OptimSpec:
    """Learning rates, decay and schedule; nothing learns where the configuration has none."""
    if "optim" not in cfg:
        return OptimSpec(lr=0.0, weight_decay=0.0, epochs=1)
    values = plain(cfg.optim)
    parts = {name: PartSpec(**part) for name, part in (values.pop("parts", None) or {}).items()}
    first, second = values.pop("betas")
    return OptimSpec(**values, betas=(first, second), parts=parts)


def build_module(cfg: DictConfig, model: VideoClassifier) -> ClassificationModule:
    """The LightningModule around a model, which runs as configured. Runs of earlier versions say nothing of how."""
    how = str(cfg.get("compile", False)).lower()
    if how not in COMPILE:
        raise ConfigError(f"compile={how}: allowed are {', '.join(COMPILE)}")
    model.backbone.checkpointing = bool(cfg.get("activation_checkpointing", False))
    classes = model.head.out_features
    values = plain(cfg.augment) if "augment" in cfg else {}
    augment = BatchAugment(classes, **values) if any(values.values()) else None
    return ClassificationModule(model, build_optim(cfg), classes, cfg.label_smoothing, augment, how)


def build_trainer(cfg: DictConfig) -> pl.Trainer:
    """Lightning's Trainer with the configured callbacks and loggers; keys under `trainer` are its arguments.

    Raises:
        ConfigError: for devices that this machine does not have.
    """
    values = plain(cfg.trainer)
    check_devices(values["accelerator"], values["devices"])
    # Runs of earlier versions say nothing of it.
    torch.set_float32_matmul_precision(values.pop("float32_matmul_precision", "highest"))
    callbacks = [instantiate(node) for node in cfg.callbacks.values() if node]
    loggers = [instantiate(node) for node in cfg.logger.values() if node]
    plugins: list[Any] = [WholeCheckpointIO()]
    if SLURMEnvironment.detect():
        try:
            plugins.append(SLURMEnvironment(auto_requeue=False))  # callbacks.last sees to signals.
        except RuntimeError as error:
            raise ConfigError(str(error)) from error
    if "enable_progress_bar" in values:
        raise ConfigError("trainer.enable_progress_bar: follows from callbacks.progress; callbacks.progress=null shows nothing")
    # Lightning would put a bar of its own in the place of one that was left out.
    values["enable_progress_bar"] = any(isinstance(callback, ProgressBar) for callback in callbacks)
    return instantiate(values, callbacks=callbacks, logger=loggers or False, plugins=plugins)


def check_devices(accelerator: str, devices: Any) -> None:
    """Refuse, in a line that says what to do, GPUs that this machine does not have.

    Raises:
        ConfigError: names the key, what was asked for and what there is.
    """
    cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if accelerator in ("gpu", "cuda") and not cuda and not (accelerator == "gpu" and torch.backends.mps.is_available()):
        raise ConfigError(
            f"trainer.accelerator={accelerator}: torch {torch.__version__} finds no GPU on this machine; trainer=cpu trains on "
            "its processor, and so do several processes of trainer=ddp trainer.accelerator=cpu trainer.devices=2 "
            "trainer.precision=32-true"
        )
    # Under a launcher of its own each process may see but its own GPU.
    alone = "LOCAL_RANK" not in os.environ and "SLURM_PROCID" not in os.environ
    if alone and accelerator in ("gpu", "cuda", "auto") and cuda and isinstance(devices, int) and devices > cuda:
        raise ConfigError(f"trainer.devices={devices}: torch sees {cuda} GPU(s) here; trainer.devices=auto takes all there are")
