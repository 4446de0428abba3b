"""Named parameter groups, AdamW, and learning rates by optimiser step."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from stts_lightning.backbones.registry import Backbone
from stts_lightning.classifier import VideoClassifier
from stts_lightning.errors import UserError

PARTS = ("selectors", "backbone", "head")


@dataclass(frozen=True)
class PartSpec:
    """How one part of the model learns.

    Attributes:
        lr_scale: peak learning rate as a multiple of `OptimSpec.lr`.
        lr_cap: upper limit of the scheduled rate, as a multiple of `OptimSpec.lr`.
        warmup_epochs: linear warm-up.
        warmup_share: the same as a share of the run; the longer of the two counts.
        warmup_from: where it begins, as a share of the rate it leads to.
        frozen_epochs: epochs at rate 0 before anything else.
        frozen_share: the same as a share of the run; the longer of the two counts.
        decay_all: weight decay on norms, biases and embeddings too.
        decay_embeddings: weight decay on embeddings too.
        decay_biases: weight decay on the biases of linear layers too.
        frozen: does not learn at all; costs neither gradients nor optimiser state.
        layer_decay: of the backbone alone: rate of a block as a share of that of the block after it; see `layers`.
    """

    lr_scale: float = 1.0
    lr_cap: float = math.inf
    warmup_epochs: float = 0.0
    warmup_share: float = 0.0
    warmup_from: float = 0.0
    frozen_epochs: float = 0.0
    frozen_share: float = 0.0
    decay_all: bool = False
    decay_embeddings: bool = False
    decay_biases: bool = False
    frozen: bool = False
    layer_decay: float = 1.0


@dataclass(frozen=True)
class OptimSpec:
    """AdamW with a cosine schedule.

    Attributes:
        lr: learning rate of the selectors; the other parts scale it.
        weight_decay: of weights; norms, biases and embeddings have none unless a part says so.
        betas: of AdamW.
        final_lr: rate at the last step as a share of the peak.
        epochs: length of the schedule in epochs, for `warmup_epochs` and `frozen_epochs`.
        steps_of: the cosine moves each "step", or each "epoch" (mmcv's way: of the whole run, its last epoch above 0).
        parts: see `PartSpec`; of selectors, backbone, head.
    """

    lr: float
    weight_decay: float
    epochs: float
    betas: tuple[float, float] = (0.9, 0.999)
    final_lr: float = 0.0
    steps_of: str = "step"
    parts: dict[str, PartSpec] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.parts) - set(PARTS)):
            raise ValueError(f"optim.parts.{unknown[0]}: unknown; the parts are {', '.join(PARTS)}")
        for name in ("selectors", "head"):
            if (value := self.part(name).layer_decay) != 1:
                raise ValueError(f"optim.parts.{name}.layer_decay={value}: only the backbone has layers")
        if self.steps_of not in ("step", "epoch"):
            raise ValueError(f"optim.steps_of={self.steps_of!r}: allowed are step, epoch")

    def part(self, name: str) -> PartSpec:
        """How a part learns."""
        return self.parts.get(name, PartSpec())


def lr_factor(part: PartSpec, spec: OptimSpec, progress: float) -> float:
    """Learning rate of a part as a multiple of `spec.lr`, when a share `progress` of all steps is done."""
    epoch = progress * spec.epochs
    frozen = max(part.frozen_epochs, part.frozen_share * spec.epochs)
    if epoch < frozen:
        return 0.0
    since = epoch - frozen
    warmup = max(part.warmup_epochs, part.warmup_share * spec.epochs)
    # After a frozen start, and by epochs, the cosine is the one of the whole run; after a warm-up one of what is left.
    if spec.steps_of == "epoch":
        done = math.floor(epoch) / spec.epochs
    elif frozen:
        done = progress
    else:
        done = max(since - warmup, 0.0) / max(spec.epochs - warmup, 1e-9)
    cosine = 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    factor = part.lr_scale * (spec.final_lr + (1 - spec.final_lr) * cosine)
    if since < warmup:
        factor *= part.warmup_from + (1 - part.warmup_from) * since / warmup
    return min(factor, part.lr_cap)


def peak_rates(model: VideoClassifier, spec: OptimSpec) -> str:
    """Highest learning rate of each part that a model has, for a table."""
    told: list[str] = []
    for name, parameters in part_parameters(model).items():
        part = spec.part(name)
        rate = spec.lr * min(part.lr_scale, part.lr_cap)
        if parameters:
            told.append(f"{name} {'frozen' if part.frozen else f'{rate:.2g}'}")
    return ", ".join(told)


def reach(spec: OptimSpec, name: str, steps: int) -> float:
    """How far a weight of a part can get: AdamW moves it by the learning rate in a step, or less."""
    part = spec.part(name)
    if part.frozen:
        return 0.0
    points = 200
    mean = sum(lr_factor(part, spec, (point + 0.5) / points) for point in range(points)) / points
    return spec.lr * mean * steps


def part_parameters(model: VideoClassifier) -> dict[str, list[nn.Parameter]]:
    """Parameters of each part: the slots, the rest of the backbone, the head."""
    slots = list(model.slots.parameters())
    selectors = {id(p) for p in slots}
    rest = [p for p in model.backbone.parameters() if id(p) not in selectors]
    return {"selectors": slots, "backbone": rest, "head": list(model.head.parameters())}


def layers(backbone: Backbone) -> dict[str, int]:
    """Which layer each parameter of a backbone belongs to: 0 is the stem, then the blocks; what follows the last is a layer more.

    What stands between two blocks belongs to the first of them.
    """
    blocks: list[str] = []
    found: dict[str, int] = {}
    for name, _ in backbone.named_parameters():
        block = re.match(r"(?!slots\.)(.*\.|)blocks\.\d+\.", name)
        if block and block[0] not in blocks:
            blocks.append(block[0])
        found[name] = len(blocks)
    for name in reversed(found):
        if blocks and name.startswith(blocks[-1]):
            break
        found[name] += 1
    return found


def freeze(model: VideoClassifier, spec: OptimSpec) -> None:
    """Take the parameters of frozen parts out of training. Raises ValueError if nothing is left that learns."""
    parts = part_parameters(model)
    for part, parameters in parts.items():
        for parameter in parameters:
            parameter.requires_grad_(not spec.part(part).frozen)
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("optim.parts: all that this model has is frozen; nothing would learn")


def parameter_groups(model: VideoClassifier, spec: OptimSpec) -> list[dict[str, object]]:
    """AdamW's groups, named `<part>/decay` and `<part>/no_decay`; each parameter that learns lies in exactly one.

    No decay for parameters of norms, for biases, and for the embeddings that the backbone names. With `layer_decay` the
    backbone's groups are those of its layers, `backbone/decay/3`.
    """
    parts = {id(p): part for part, parameters in part_parameters(model).items() for p in parameters}
    norms = {id(p) for m in model.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters()}
    biases = {id(p) for name, p in model.named_parameters() if name.endswith("bias")}
    named = dict(model.backbone.named_parameters())
    embeddings = {id(named[name]) for name in model.backbone.no_weight_decay()}

    def decays(parameter: nn.Parameter) -> bool:
        part = spec.part(parts[id(parameter)])
        if part.decay_all:
            return True
        if id(parameter) in biases and id(parameter) not in norms:
            return part.decay_biases
        return id(parameter) not in norms and (part.decay_embeddings or id(parameter) not in embeddings)

    layer_decay = spec.part("backbone").layer_decay
    layer_of = {id(named[name]): layer for name, layer in layers(model.backbone).items()} if layer_decay != 1 else {}
    deepest = max(layer_of.values(), default=0)
    groups: dict[tuple[int, bool, int], dict[str, Any]] = {}
    for parameter in (p for p in model.parameters() if p.requires_grad):
        part, decay = parts[id(parameter)], decays(parameter)
        layer = layer_of.get(id(parameter), deepest) if part == "backbone" else deepest
        name = f"{part}/{'decay' if decay else 'no_decay'}" + (f"/{layer}" if layer_of and part == "backbone" else "")
        settings = {"lr": spec.lr * layer_decay ** (deepest - layer), "weight_decay": spec.weight_decay if decay else 0.0}
        group = groups.setdefault((PARTS.index(part), not decay, layer), {"name": name, "params": [], **settings})
        group["params"].append(parameter)
    return [groups[place] for place in sorted(groups)]


class Schedule(torch.optim.lr_scheduler.LambdaLR):
    """Learning rates by optimiser step. A checkpoint holds the step alone: the rates are those of the configuration."""

    def state_dict(self) -> dict[str, Any]:
        """The step."""
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go to a step, and set its rates."""
        self.last_epoch = state_dict["last_epoch"]
        for group, base, factor in zip(self.optimizer.param_groups, self.base_lrs, self.lr_lambdas, strict=True):
            group["lr"] = base * factor(self.last_epoch)
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]


def _keep_settings(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """A state to load, with this optimiser's own rates, decay and betas: those of the configuration, not of the checkpoint.

    Raises:
        UserError: if its groups are not those of the checkpoint.
    """
    theirs = {str(group.get("name")): len(group["params"]) for group in state["param_groups"]}
    ours = {str(group.get("name")): len(group["params"]) for group in optimizer.param_groups}
    if theirs != ours:
        raise UserError(
            f"resume: the checkpoint's optimiser has the groups {theirs} (parameters in each), this configuration has {ours}; "
            "which parts are frozen or decay cannot change within a run"
        )
    saved = zip(state["param_groups"], optimizer.param_groups, strict=True)
    groups = [{**own, "params": group["params"]} for group, own in saved]
    return {**state, "param_groups": groups}


def build_optimizer(
    model: VideoClassifier, spec: OptimSpec, total_steps: int, fused: bool = True
) -> tuple[torch.optim.AdamW, Schedule]:
    """AdamW over the named groups, and its schedule.

    When a checkpoint is loaded into them, moments and step are the checkpoint's, all settings stay as given here.

    Args:
        model: what learns.
        spec: how.
        total_steps: optimiser steps of the whole schedule.
        fused: one kernel for all parameters, where the device has one.
    """
    groups = parameter_groups(model, spec)
    fused = fused and next(model.parameters()).device.type in ("cpu", "cuda")
    optimizer = torch.optim.AdamW(groups, lr=spec.lr, betas=spec.betas, fused=fused)

    def schedule(part: PartSpec) -> Callable[[int], float]:
        return lambda step: lr_factor(part, spec, step / max(total_steps, 1))

    lambdas = [schedule(spec.part(str(group["name"]).partition("/")[0])) for group in groups]
    optimizer.register_load_state_dict_pre_hook(_keep_settings)
    return optimizer, Schedule(optimizer, lambdas)
