"""What a backbone is, and backbones by name: one decorated factory each."""

# torch's own types have gaps.
# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from types import MappingProxyType
from typing import Any, Protocol

import torch
from timm.layers.weight_init import trunc_normal_
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stts_lightning.errors import UserError
from stts_lightning.selection.reducer import Record
from stts_lightning.selection.selector import GridSize
from stts_lightning.selection.slots import SlotBank


class BackboneError(UserError):
    """A backbone that cannot be built as asked: names the value found and what is allowed."""


class Kernels(Protocol):
    """Faster code for modules of a backbone."""

    def find(self, module: nn.Module, x: Tensor) -> Callable[..., Any]:
        """What to call in place of a module for an input like x: a kernel that gives the same result, or the module."""
        ...


class Backbone(nn.Module, ABC):
    """From a normalised clip to features, calling its slots before each block.

    Attributes:
        mean: of each channel, on the scale 0 to 1; clips are normalised by it.
        std: of each channel, likewise.
        clip_size: frames, height and width of a clip.
        block_sizes: size of the grid that reaches each block.
        out_dim: channels of the features.
        slots: the selectors.
        checkpointing: whether blocks keep only their input in training, and run again in the backward pass.
        kernels: faster code for some modules; None runs every module as it is written.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    clip_size: tuple[int, int, int]
    block_sizes: list[GridSize]
    out_dim: int
    slots: SlotBank
    checkpointing: bool = False
    kernels: Kernels | None = None

    def run(self, module: nn.Module, x: Tensor, *inputs: Any) -> Any:
        """Output of a block: the one place where a kernel or activation checkpointing comes in."""
        forward = self.kernels.find(module, x) if self.kernels else module
        if self.checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(forward, x, *inputs, use_reentrant=False)
        return forward(x, *inputs)

    def check_clip(self, clip: Tensor) -> None:
        """Raise ValueError if a clip `(B, 3, T, H, W)` has another size than the backbone was built for."""
        if tuple(clip.shape[1:]) != (3, *self.clip_size):
            frames, height, width = self.clip_size
            raise ValueError(f"clips of shape {tuple(clip.shape)}: this backbone takes (B, 3, {frames}, {height}, {width})")

    @abstractmethod
    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that are embeddings."""

    def variant(self) -> dict[str, str]:
        """Choices that change what the weights mean, for tables and results; most backbones have none."""
        return {}

    def adapt_weight(self, name: str, weight: Tensor, made_for: Mapping[str, Any]) -> Tensor:
        """A weight from a file of another geometry (another window, another clip, 2-D), as this backbone needs it.

        Args:
            name: of the parameter, as in `state_dict`.
            weight: the file's; its shape is not the parameter's.
            made_for: arguments of `create_model` that the file's model was built with, where they are known.

        Returns:
            The weight inflated or interpolated; or as it is, where that is not possible.
        """
        return weight

    reading: Mapping[str, Any] = MappingProxyType({})
    """How its published weights are tested, where that differs from `ClipRule`: the class's own, for 224 pixels."""

    @abstractmethod
    def forward(self, clip: Tensor, kept: list[Record] | None = None) -> Tensor:
        """Clip `(B, 3, T, H, W)` -> features `(B, out_dim)`; appends what each slot kept to `kept`."""


def start_linear(module: nn.Module, gain: float | None) -> None:
    """Start the weights of a linear layer with a deviation of gain / sqrt(its inputs), or 0.02 for None, and its biases at 0.

    Leaves other modules as they are.
    """
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=gain / math.sqrt(module.in_features) if gain else 0.02)
        if module.bias is not None:  # pyright: ignore[reportUnnecessaryComparison]
            nn.init.zeros_(module.bias)


def clip_size(frames: int, size: int | Sequence[int], frames_unit: int, size_unit: int) -> tuple[int, int, int]:
    """Frames, height and width of clips, for a backbone that takes multiples of these units alone. Raises BackboneError."""
    height, width = (size, size) if isinstance(size, int) else size
    if min(frames, height, width) < 1 or frames % frames_unit or height % size_unit or width % size_unit:
        needed = f"frames={frames} must be a multiple of {frames_unit}, size={size} of {size_unit}, both above 0"
        raise BackboneError(f"backbone: {needed}")
    return frames, height, width


Factory = Callable[..., Backbone]
_FACTORIES: dict[str, Factory] = {}


def register_backbone(factory: Factory) -> Factory:
    """Register a factory under its own name. Raises ValueError if the name is taken."""
    if factory.__name__ in _FACTORIES:
        raise ValueError(f"backbone {factory.__name__!r} is registered twice")
    _FACTORIES[factory.__name__] = factory
    return factory


def find_backbone(name: str) -> Factory:
    """The factory of a registered name, or that which a dotted path names (`package.module.factory`), imported now.

    Raises:
        BackboneError: for an unknown name (lists the known ones), or a path at which there is none.
    """
    if "." in name:
        module, _, attribute = name.rpartition(".")
        try:
            return getattr(import_module(module), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            raise BackboneError(f"backbone {name!r}: no such factory ({error})") from error
    if name not in _FACTORIES:
        raise BackboneError(f"backbone {name!r} is unknown; known are {', '.join(list_backbones())}")
    return _FACTORIES[name]


def list_backbones() -> list[str]:
    """Names of all registered backbones."""
    return sorted(_FACTORIES)


def create_backbone(name: str, **kwargs: Any) -> Backbone:
    """Build a backbone by name or dotted path.

    Raises:
        BackboneError: see `find_backbone`; or for an argument the backbone does not take.
    """
    factory = find_backbone(name)
    try:
        return factory(**kwargs)
    except TypeError as error:
        raise BackboneError(f"backbone {name}: {error}") from error
