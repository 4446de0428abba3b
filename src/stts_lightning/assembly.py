"""From a composed configuration to built objects. Front doors call it; nothing below ever sees a DictConfig."""

import logging
import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
from hydra import compose
from hydra.utils import instantiate
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import ProgressBar
from numpy.typing import NDArray
from omegaconf import DictConfig

from stts_lightning.analysis.flops import count_gflops
from stts_lightning.backbones.checkpoints import CheckpointError, read_checkpoint
from stts_lightning.classifier import COMPILE, VideoClassifier, create_model, load_model
from stts_lightning.data.datamodule import VideoDataModule
from stts_lightning.data.dataset import ClipSpec
from stts_lightning.data.transforms import EvalTransform
from stts_lightning.data.windows import WindowRule
from stts_lightning.data.workers import LoaderOptions
from stts_lightning.run_config import ConfigError, to_container
from stts_lightning.training.augment import BatchAugment
from stts_lightning.training.distillation import Teacher
from stts_lightning.training.module import ClassificationModule
from stts_lightning.training.optim import OptimSpec, PartSpec
from stts_lightning.training.precision import CAST_WEIGHTS, CastWeights
from stts_lightning.training.preemption import WholeCheckpointIO

log = logging.getLogger(__name__)
START = "start"
"""As `distill.teacher`: the model that training starts from."""


def build_windows(cfg: DictConfig, clip_size: tuple[int, int, int]) -> WindowRule:
    """How `predict` cuts videos."""
    frames, *size = clip_size
    clip = to_container(cfg.clip)
    short = clip["test_short_side"] if clip["test_short_side"] is not None else clip["short_side"]
    pictures = None
    if cfg.overlay:
        zoom = max(-(-256 // max(size)), 1)
        shown = short * zoom if isinstance(short, int) else short
        pictures = EvalTransform([zoom * side for side in size], shown)
    spec = ClipSpec(frames, clip["stride"], 1, clip["sampling"])
    return WindowRule(
        spec,
        EvalTransform(size, short, clip["test_crops"]),
        cfg.every,
        pictures,
        clip["decoder"],
        clip.get("decode_timeout", 60.0),
    )


def build_untrained(cfg: DictConfig, num_classes: int, slots: dict[str, Any] | None = None) -> VideoClassifier:
    """The classifier without weights from a file, with other slots if some are given."""
    values: dict[str, Any] = to_container(cfg.backbone)
    return create_model(values.pop("name"), _selection(cfg, slots), num_classes, kernels=cfg.get("kernels", "auto"), **values)


def check_truth(model: VideoClassifier, known: bool) -> None:
    """Refuse a selector that reads where the action is, unless the data says so.

    Raises:
        ConfigError: names the slots, and data that says it.
    """
    if model.slots.wants_truth and not known:
        raise ConfigError(
            f"selection {', '.join(model.slots.selectors)}: the selector oracle must know where the action is; take dataset=demo,"
            " or a data set made by prepare_data task=embed, with dataset.truth=true"
        )


class ExperimentCost(NamedTuple):
    """What one view of an experiment's model costs, in GFLOPs, how many views its test has, and its backbone."""

    gflops: float
    views: int
    backbone: str


def experiment_cost(name: str) -> ExperimentCost:
    """Cost of a shipped experiment on its own data set."""
    cfg = compose("train", [f"experiment={name}"])
    classes = {"ssv2": 174}.get(cfg.dataset.name, 400)
    with torch.device("meta"):
        gflops = count_gflops(build_untrained(cfg, classes))
    return ExperimentCost(gflops, cfg.clip.test_views * cfg.clip.test_crops, cfg.backbone.name)


def build_model(cfg: DictConfig, num_classes: int | None = None, slots: dict[str, Any] | None = None) -> VideoClassifier:
    """The classifier with its weights, for `num_classes`, by default its checkpoint's; with other slots if some are given."""
    values: dict[str, Any] = to_container(cfg.backbone)
    name, kernels = values.pop("name"), cfg.get("kernels", "auto")
    return create_model(name, _selection(cfg, slots), num_classes, cfg.pretrained, cfg.head, cfg.trust, kernels=kernels, **values)


def _selection(cfg: DictConfig, slots: dict[str, Any] | None) -> dict[str, Any]:
    """The selection of a configuration, with other slots if some are given."""
    return to_container(cfg.selection) if slots is None else {**to_container(cfg.selection), "slots": slots}


def build_body(cfg: DictConfig) -> VideoClassifier:
    """The classifier before its data set is read: with its checkpoint's head if that is kept, else without one yet."""
    return build_model(cfg, None if cfg.pretrained and cfg.head != "reset" else 0)


def fit_head(model: VideoClassifier, num_classes: int) -> None:
    """Give a model from `build_body` the head for its data set.

    Raises:
        CheckpointError: if it has the head of its checkpoint, and that is for another number of classes.
    """
    if not model.num_classes:
        model.reset_classifier(num_classes)
    elif model.num_classes != num_classes:
        raise CheckpointError(
            f"checkpoint {model.weights}: its head has {model.num_classes} classes, the data set has {num_classes}; "
            "head=reset gives the model a new, untrained head"
        )


def build_data(cfg: DictConfig, clip_size: tuple[int, int, int]) -> VideoDataModule:
    """The datamodule for clips of a size.

    Raises:
        ConfigError: if RandAugment is to be done twice.
    """
    to_container(cfg.dataset)  # A missing value is named before anything is built.
    source, loader, clip = instantiate(cfg.dataset), build_loader(cfg), to_container(cfg.clip)
    if policy := _augmentation(cfg).get("randaugment"):
        transform = clip["train_transform"] = clip.get("train_transform") or {}
        if transform.get("randaugment"):
            raise ConfigError(
                f"augment.randaugment={policy}: clip.train_transform.randaugment={transform['randaugment']} does it already, in "
                "the workers; set one of them to null"
            )
        if trains_on_cpu(cfg):
            transform["randaugment"] = policy
    return VideoDataModule(source=source, clip_size=clip_size, loader=loader, seed=cfg.seed, **clip)


def _augmentation(cfg: DictConfig) -> dict[str, Any]:
    """Augmentation of batches; a test, and a run of an earlier version, may have none."""
    return to_container(cfg.augment) if cfg.get("augment") else {}


def trains_on_cpu(cfg: DictConfig) -> bool:
    """Whether there is no device beside the processor. RandAugment is then best done by the workers: PIL is faster there."""
    found = torch.cuda.is_available() or torch.backends.mps.is_available()
    return cfg.trainer.accelerator == "cpu" or (cfg.trainer.accelerator == "auto" and not found)


def build_loader(cfg: DictConfig) -> LoaderOptions:
    """Batches and workers."""
    return LoaderOptions(**to_container(cfg.loader))


def build_optim(cfg: DictConfig) -> OptimSpec:
    """Learning rates, decay and schedule; nothing learns where the configuration has none."""
    if "optim" not in cfg:
        return OptimSpec(lr=0.0, weight_decay=0.0, epochs=1)
    values = to_container(cfg.optim)
    parts = {name: _part(name, part) for name, part in (values.pop("parts", None) or {}).items()}
    first, second = values.pop("betas")
    return OptimSpec(**values, betas=(first, second), parts=parts)


def _part(name: str, values: dict[str, Any]) -> PartSpec:
    known = [field.name for field in fields(PartSpec)]
    for key in values:
        if key not in known:
            raise ConfigError(f"optim.parts.{name}.{key}: no such key; allowed are {', '.join(known)}")
        if isinstance(getattr(PartSpec(), key), bool) and not isinstance(values[key], bool):
            raise ConfigError(f"optim.parts.{name}.{key}={values[key]}: allowed are true, false")
    return PartSpec(**values)


def build_module(cfg: DictConfig, model: VideoClassifier, labels: NDArray[np.int64] | None = None) -> ClassificationModule:
    """The LightningModule around a model, which runs as configured. Runs of earlier versions say nothing of how.

    Args:
        cfg: the configuration.
        model: with its head.
        labels: of the training videos, for `class_weights=balanced`.
    """
    how = str(cfg.get("compile", False)).lower()
    if how not in COMPILE:
        raise ConfigError(f"compile={how}: allowed are {', '.join(COMPILE)}")
    model.backbone.checkpointing = bool(cfg.get("activation_checkpointing", False))
    classes = model.num_classes
    values = _augmentation(cfg)
    if values.get("randaugment") and trains_on_cpu(cfg):
        values["randaugment"] = None
    augment = BatchAugment(classes, **values) if any(values.values()) else None
    weights = class_weights(cfg.get("class_weights"), labels, classes)
    options = (build_optim(cfg), classes, cfg.label_smoothing, augment, how, weights, build_teacher(cfg, model))
    return ClassificationModule(model, *options)


def build_teacher(cfg: DictConfig, model: VideoClassifier) -> Teacher | None:
    """The model that `distill.teacher` names, for a model with its head; None without one.

    "start" is the model that training starts from, without new selectors; none where its weights or head are new, or where it was
    pruned already: there is nothing to learn from it.

    Raises:
        ConfigError: if there is no such model, it is pruned, or for other classes or clips.
    """
    values = to_container(cfg.distill) if cfg.get("distill") else {}  # A test, or a run of an earlier version.
    path = values.pop("teacher", None)
    if path is None:
        return None
    if path == START:
        if why := _teaches_nothing(cfg, model):
            log.warning("distill.teacher=start: not distilled, as %s", why)
            return None
        return Teacher(build_model(cfg, model.num_classes, slots={}), **values)
    if not Path(str(path)).exists():
        raise ConfigError(f"distill.teacher={path}: no such file; allowed are the checkpoint of a model, {START} and null")
    teacher = load_model(str(path), trust=cfg.trust, kernels=cfg.get("kernels", "auto"))
    if not teacher.slots.empty:
        raise ConfigError(f"distill.teacher={path}: is a pruned model ({', '.join(teacher.slots.sizes)}); give an unpruned one")
    for what, found, wanted in (
        ("classes", teacher.num_classes, model.num_classes),
        ("clips of (frames, height, width)", teacher.backbone.clip_size, model.backbone.clip_size),
    ):
        if found != wanted:
            raise ConfigError(f"distill.teacher={path}: is for {found} {what}, this model for {wanted}")
    if other := _other_class(teacher.classes, model.classes):
        raise ConfigError(f"distill.teacher={path}: was trained with other classes, or in another order: {other}")
    return Teacher(teacher, **values)


def _other_class(taught: Sequence[str], ours: Sequence[str]) -> str:
    """The first class whose name differs, in words; empty if none does, or one model knows numbers alone."""
    numbers = tuple(map(str, range(len(ours))))
    if numbers in (tuple(taught), tuple(ours)):
        return ""
    pairs = enumerate(zip(taught, ours, strict=True))
    plain = str.maketrans("_-", "  ")
    differ = (
        f"its class {number} is {one!r}, this model's {other!r}"
        for number, (one, other) in pairs
        if one.casefold().translate(plain) != other.casefold().translate(plain)
    )
    return next(differ, "")


def _teaches_nothing(cfg: DictConfig, model: VideoClassifier) -> str:
    """Why nothing is to be learned from the model that training starts from; empty if something is."""
    if why := model.tells_nothing:
        return why
    if read_checkpoint(cfg.pretrained, cfg.trust).pruned:
        return "pretrained is a pruned model; distill.teacher=FILE names an unpruned one"
    return ""


def class_weights(asked: Any, labels: NDArray[np.int64] | None, classes: int) -> list[float] | None:
    """Weights of the classes in the loss: those asked for; of "balanced" the inverse of how often a class occurs, mean 1.

    Raises:
        ConfigError: for another word, or where a class has no training video.
    """
    if asked is None or not isinstance(asked, str):
        return None if asked is None else [float(weight) for weight in asked]
    if asked != "balanced":
        raise ConfigError(f"class_weights={asked}: allowed are null, balanced, or a list with a weight for each class")
    if labels is None:
        return None
    counts = np.bincount(labels, minlength=classes)
    if not counts.all():
        raise ConfigError(f"class_weights=balanced: class {int(np.argmin(counts))} has no training video")
    return (len(labels) / (classes * counts)).tolist()


def check_trainable(cfg: DictConfig) -> None:
    """Refuse to train weights that are held in half precision: updates below a 256th of a weight would be rounded away.

    Raises:
        ConfigError: names the precisions that train.
    """
    if cfg.trainer.precision in CAST_WEIGHTS:
        raise ConfigError(
            f"trainer.precision={cfg.trainer.precision}: holds the weights themselves in half precision, which is for evaluate "
            "and predict; allowed for training are 32-true, bf16-mixed, 16-mixed"
        )


def build_trainer(cfg: DictConfig) -> pl.Trainer:
    """Lightning's Trainer with the configured callbacks and loggers; keys under `trainer` are its arguments.

    Raises:
        ConfigError: for devices that this machine does not have.
    """
    values = to_container(cfg.trainer)
    check_devices(values["accelerator"], values["devices"])
    # Runs of earlier versions say nothing of it.
    torch.set_float32_matmul_precision(values.pop("float32_matmul_precision", "highest"))
    strategy = values.get("strategy")
    if isinstance(strategy, dict) and values.get("accumulate_grad_batches", 1) > 1:
        # torch's static graph fails where the first backward pass reduces nothing.
        strategy.pop("static_graph", None)
    callbacks = [instantiate(node) for node in cfg.callbacks.values() if node]
    loggers = [instantiate(node) for node in cfg.logger.values() if node]
    plugins: list[Any] = [WholeCheckpointIO()]
    if values.get("precision") in CAST_WEIGHTS:
        plugins.append(CastWeights(values.pop("precision")))
    if SLURMEnvironment.detect():
        try:
            plugins.append(SLURMEnvironment(auto_requeue=False))  # callbacks.last sees to signals.
        except RuntimeError as error:
            raise ConfigError(str(error)) from error
    if "enable_progress_bar" in values:
        raise ConfigError("trainer.enable_progress_bar: follows from callbacks.progress; callbacks.progress=null shows nothing")
    # Lightning would put a bar of its own in the place of one that was left out.
    values["enable_progress_bar"] = any(isinstance(callback, ProgressBar) for callback in callbacks)
    trainer = instantiate(values, callbacks=callbacks, logger=loggers or False, plugins=plugins)
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if trainer.world_size > 1 and trainer.is_global_zero and environment and environment.creates_processes_externally:
        # A LOCAL_RANK that something left in the environment would otherwise be half an hour of silence.
        by = "LOCAL_RANK is set" if isinstance(environment, LightningEnvironment) else type(environment).__name__
        log.info("process 0 of %d waits for the others, which a launcher starts (%s)", trainer.world_size, by)
    return trainer


def check_devices(accelerator: str, devices: Any) -> None:
    """Refuse, in a line that says what to do, GPUs that this machine does not have.

    Raises:
        ConfigError: names the key, what was asked for and what there is.
    """
    cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if accelerator in ("gpu", "cuda") and not cuda and not (accelerator == "gpu" and torch.backends.mps.is_available()):
        raise ConfigError(
            f"trainer.accelerator={accelerator}: torch {torch.__version__} finds no GPU on this machine; trainer=cpu runs on "
            "its processor, in two processes with trainer=ddp trainer.accelerator=cpu trainer.devices=2 trainer.precision=32-true"
        )
    # Under a launcher of its own each process may see but its own GPU.
    alone = "LOCAL_RANK" not in os.environ and "SLURM_PROCID" not in os.environ
    if alone and accelerator in ("gpu", "cuda", "auto") and cuda and isinstance(devices, int) and devices > cuda:
        raise ConfigError(f"trainer.devices={devices}: torch sees {cuda} GPU(s) here; trainer.devices=auto takes all there are")
