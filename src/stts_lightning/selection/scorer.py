"""Scorers: how important each candidate is, in [0, 1] (paper Sec. 3.2, Eq. 2-3).

Letters: B rows, N candidates, E channels of a candidate's descriptor, C channels of the grid.
"""

import itertools
import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stts_lightning.layers.linear import Linear


class Scorer(nn.Module, ABC):
    """A small network from candidates to raw scores, with the way its family describes frames and normalises scores.

    A subclass gives the three parts that the paper and the official code do differently.
    """

    frame_width: int
    """Channels of a frame's descriptor, as a multiple of the grid's channels."""
    normalizes_tokens: bool
    """Spatial selection: normalise the scores of tokens before averaging them in an anchor, or the anchors' after."""

    @staticmethod
    @abstractmethod
    def describe_frames(grid: Tensor) -> Tensor:
        """Grid `(B, T, H, W, C)` -> one descriptor a frame, `(B, T, frame_width * C)`."""

    @classmethod
    def add_frames_gradient(cls, into: Tensor, grid: Tensor, above: Tensor) -> None:
        """Add what comes back by way of the descriptors to a gradient of the grid, a frame at a time.

        Args:
            into: `(B, T, H, W, C)`, added to.
            grid: `(B, T, H, W, C)`.
            above: gradient of the descriptors, `(B, T, frame_width * C)`.
        """
        for clip, t in itertools.product(*map(range, grid.shape[:2])):
            place = slice(clip, clip + 1), slice(t, t + 1)
            with torch.enable_grad():
                frame = grid[place].detach().requires_grad_()
                described = cls.describe_frames(frame)
            into[place] += torch.autograd.grad(described, frame, above[place])[0]

    @staticmethod
    @abstractmethod
    def normalize(scores: Tensor) -> Tensor:
        """Raw scores `(B, N)` -> `(B, N)` between 0 and 1; finite where all scores are equal."""

    @abstractmethod
    def forward(self, candidates: Tensor) -> Tensor:
        """Candidates `(B, N, E)` -> raw scores `(B, N)`."""


class PaperScorer(Scorer):
    """Two fully connected layers over [local, global] features (Eq. 2-3), E' = E / 2.

    The global feature is the mean of the local ones. A GELU stands between the layers, as in any two-layer perceptron
    (Sec. 1 calls the scorer one; Eq. 2-3 write the affine maps only). As Eq. 3 has a single output layer, the global
    half moves all scores of a row alike, and its min-max normalisation takes that out again.
    """

    frame_width = 1
    normalizes_tokens = True

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.local = Linear(dim, dim // 2)
        self.activation = nn.GELU()
        self.score = nn.Linear(2 * (dim // 2), 1)

    @staticmethod
    def describe_frames(grid: Tensor) -> Tensor:
        """Mean over space (Sec. 3.3): `(B, T, H, W, C)` -> `(B, T, C)`."""
        return grid.mean(dim=(2, 3))

    @classmethod
    def add_frames_gradient(cls, into: Tensor, grid: Tensor, above: Tensor) -> None:
        """See `Scorer.add_frames_gradient`."""
        into.add_((above / math.prod(grid.shape[2:4]))[:, :, None, None])

    @staticmethod
    def normalize(scores: Tensor) -> Tensor:
        """Min-max over the row (Eq. 3): `(B, N)` -> `(B, N)`; equal scores give 0, with finite gradients."""
        low = scores.amin(-1, keepdim=True)
        return (scores - low) / (scores.amax(-1, keepdim=True) - low).clamp_min(1e-5)

    def forward(self, candidates: Tensor) -> Tensor:
        """Candidates `(B, N, E)` -> raw scores `(B, N)`."""
        local = self.activation(self.local(candidates))
        context = local.mean(dim=1, keepdim=True)
        # Eq. 3 as it stands where it is counted, or where somebody has put another layer there or looks at it.
        counted = torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
        hooks: list[Any] = [self.score._forward_hooks, self.score._forward_pre_hooks]  # pyright: ignore[reportUnknownMemberType]
        if counted or type(self.score) is not nn.Linear or any(map(bool, hooks)):
            return self.score(torch.cat((local, context.expand_as(local)), dim=-1)).squeeze(-1)
        of_local, of_context = self.score.weight.chunk(2, dim=1)  # As often as there are candidates, and once.
        return (F.linear(local, of_local) + F.linear(context, of_context, self.score.bias)).squeeze(-1)


class OfficialScorer(Scorer):
    """The released code's scorer, which published checkpoints hold (reference: wangjk666/STTS, `score_network`).

    Differs from the paper: LayerNorm first, five layers with GELU, the global feature is the mean of the second half of
    the channels, frames are described by mean and maximum, scores are normalised after averaging in anchors.
    """

    frame_width = 2
    normalizes_tokens = False

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.LayerNorm(dim, eps=1e-5), Linear(dim, dim), nn.GELU())
        self.score = nn.Sequential(
            Linear(dim, dim // 2), nn.GELU(), Linear(dim // 2, dim // 4), nn.GELU(), nn.Linear(dim // 4, 1)
        )

    @staticmethod
    def describe_frames(grid: Tensor) -> Tensor:
        """Mean and maximum over space: `(B, T, H, W, C)` -> `(B, T, 2 C)`."""
        return torch.cat((grid.mean(dim=(2, 3)), grid.amax(dim=(2, 3))), dim=-1)

    @classmethod
    def add_frames_gradient(cls, into: Tensor, grid: Tensor, above: Tensor) -> None:
        """See `Scorer.add_frames_gradient`; equal maxima share theirs."""
        of_mean, of_max = above[:, :, None, None].chunk(2, dim=-1)
        into.add_(of_mean / math.prod(grid.shape[2:4]))
        for total, clip, down in zip(into, grid, of_max, strict=True):
            highest = (clip == clip.amax((1, 2), keepdim=True)).to(clip.dtype)
            total.addcmul_(highest, down / highest.sum((1, 2), keepdim=True))

    @staticmethod
    def normalize(scores: Tensor) -> Tensor:
        """Min-max with 1e-5 in the denominator: `(B, N)` -> `(B, N)`."""
        low = scores.amin(-1, keepdim=True)
        return (scores - low) / (scores.amax(-1, keepdim=True) - low + 1e-5)

    def forward(self, candidates: Tensor) -> Tensor:
        """Candidates `(B, N, E)` -> raw scores `(B, N)`."""
        local, context = self.features(candidates).chunk(2, dim=-1)
        context = context.mean(dim=1, keepdim=True).expand_as(local)
        return self.score(torch.cat((local, context), dim=-1)).squeeze(-1)


SCORERS: dict[str, type[Scorer]] = {"paper": PaperScorer, "official": OfficialScorer}
