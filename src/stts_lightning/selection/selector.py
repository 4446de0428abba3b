"""The one contract of every selector: a grid in, a smaller grid out, and a record of what was kept."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from stts_lightning.selection.noise import Noise
from stts_lightning.selection.scorer import SCORERS, Scorer
from stts_lightning.selection.spec import SelectionError, SelectionSpec, SlotSpec
from stts_lightning.selection.topk import ESTIMATORS, hard_topk, straight_through

T = TypeVar("T")

GridSize = tuple[int, int, int]
"""Frames, height and width of a grid, in tokens."""


class Selection(NamedTuple):
    """What one slot kept of one batch.

    Attributes:
        slot: name of the slot, as `t0`.
        indices: temporal: kept frames `(B, K)`, ascending; spatial: kept anchor `(B, T)`, or tokens `(B, T, K)`.
        windows: spatial: `(B, T, 4)` top, left, height, width of the kept window in tokens; temporal: None.
        scores: normalised scores, temporal `(B, T)`, of single frames also where segments are kept; spatial `(B, T, G)` for G
            anchors.
        indicator: in training the soft indicator of Eq. 7, `(B, K, T)` or `(B, T, G)`; in evaluation None.
    """

    slot: str
    indices: Tensor
    windows: Tensor | None
    scores: Tensor
    indicator: Tensor | None


@dataclass(frozen=True)
class SlotContext:
    """Where a selector stands: all it may know of the backbone.

    Attributes:
        slot: what it keeps.
        size: frames, height and width of the grid that reaches it.
        dim: channels of that grid.
        selection: the operator.
        no_attention: why the class token's attention of the block before cannot be had here; empty where it can.
    """

    slot: SlotSpec
    size: GridSize
    dim: int
    selection: SelectionSpec
    no_attention: str = "this backbone does not tell it"


class Selector(nn.Module, ABC):
    """Base of all selectors. A new one is a subclass in a file of its own, named by `selector` in a slot."""

    needs_attention = False
    """Whether `forward` is to be given the class token's attention of the block before."""

    def __init__(self, context: SlotContext) -> None:
        super().__init__()
        if self.needs_attention and context.no_attention:
            raise SelectionError(
                f"selection.slots.{context.slot.name}: selection by the class token's attention is impossible here: "
                f"{context.no_attention}"
            )
        self.slot = context.slot.name
        self.in_size = context.size
        self.dim = context.dim
        # Behind other blocks, tokens of all frames have met; behind a temporal slot, the first frame may be any of the clip's.
        of_frames = context.slot.axis == "t"
        whole = of_frames or not any(slot.axis == "t" and slot.block == 0 for slot in context.selection.slots)
        # Windows are told apart by changes, and two frames are needed to see one.
        enough = self.in_size[0] > (1 if of_frames else 2)
        self.first_as_next = context.selection.first_frame == "next" and context.slot.block == 0 and whole and enough

    def judged(self, grid: Tensor) -> Tensor:
        """The frames that are judged by their own tokens: `(B, T, ...)`, or without the first; see `selection.first_frame`."""
        return grid[:, 1:] if self.first_as_next else grid

    def with_first(self, found: Tensor) -> Tensor:
        """What was found of the judged frames, of all: where the first was left out, it has what the next has. `(B, T, ...)`."""
        return torch.cat((found[:, :1], found), 1) if self.first_as_next else found

    @property
    @abstractmethod
    def out_size(self) -> GridSize:
        """Size of the grid that comes out."""

    @abstractmethod
    def forward(self, grid: Tensor, sigma: Tensor, noise: Noise, attention: Tensor | None = None) -> tuple[Tensor, Selection]:
        """Select. Training and evaluation differ only in the Top-K operator.

        Args:
            grid: `(B, T, H, W, C)`.
            sigma: 0-d, standard deviation of the noise.
            noise: where random numbers come from.
            attention: `(B, T, H, W)`, what the class token paid to each token in the block before, where that is needed.

        Returns:
            The smaller grid `(B, T', H', W', C)` and what was kept.
        """


class SoftTopK(nn.Module):
    """What stands in training for the Top-K: the estimator, and what the selection says of sigma and of the forward pass."""

    def __init__(self, selection: SelectionSpec) -> None:
        super().__init__()
        self.estimate = _named(ESTIMATORS, "estimator", selection.estimator)(selection.samples)
        self.of_spread = selection.sigma_of == "spread"
        self.hard = selection.forward == "hard"

    def forward(self, scores: Tensor, k: int, sigma: Tensor, noise: Noise) -> Tensor:
        """Indicator of Eq. 7, `(B, K, N)`, from scores `(B, N)`."""
        spread = scores
        if self.of_spread and scores.shape[-1] > 1:  # One candidate has no spread, and is kept whatever the noise.
            # Noise on scores in units of their own deviation: the choice stays the same if all is divided by it.
            spread = scores / scores.detach().std(-1, keepdim=True).clamp_min(1e-5)
        indicator = self.estimate(spread, k, sigma, noise)
        return straight_through(indicator, hard_topk(scores.detach(), k)) if self.hard else indicator


def build_scorer(selection: SelectionSpec, dim: int, axis: str) -> Scorer:
    """A new scorer.

    Args:
        selection: its name, and how it starts.
        dim: channels of the grid.
        axis: "t" scores descriptors of frames, "s" tokens of a spatial slot, "r" those of a reducer.

    Raises:
        SelectionError: for an unknown name.
    """
    kind = _named(SCORERS, "scorer", selection.scorer)
    scorer = kind(kind.frame_width * dim if axis == "t" else dim)
    scorer.begins = selection.start
    if selection.start == "small_frames":
        scorer.begins = "random" if axis == "s" else "small"
    scorer.start()
    return scorer


def _named(table: dict[str, T], key: str, name: str) -> T:
    if name not in table:
        raise SelectionError(f"selection.{key}={name!r}: allowed are {', '.join(table)}")
    return table[name]
