"""Scorers: how important each candidate is, in [0, 1] (paper Sec. 3.2, Eq. 2-3).

Letters: B rows, N candidates, E channels of a candidate's descriptor, C channels of the grid.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn


def deviation(grid: Tensor, dims: int | tuple[int, ...]) -> Tensor:
    """Standard deviation over dimensions, which keep the length 1; where nothing deviates the gradient is 0, not infinite."""
    # From the first value, which changes no deviation: squares of large values would hide small ones.
    first = grid
    for dim in (dims,) if isinstance(dims, int) else dims:
        first = first.narrow(dim, 0, 1)
    wide = grid.float() - first.float()
    # Several times as fast as torch.std over these dimensions.
    variance = wide.square().mean(dims, keepdim=True) - wide.mean(dims, keepdim=True).square()
    return variance.clamp_min(1e-10).sqrt().to(grid.dtype)


class Scorer(nn.Module, ABC):
    """A small network from candidates to raw scores, with the way its family describes frames and normalises scores.

    A subclass gives the three parts that the paper and the official code do differently.
    """

    frame_width: int
    """Channels of a frame's descriptor, as a multiple of the grid's channels."""
    normalizes_tokens: bool
    """Spatial selection: normalise the scores of tokens before averaging them in an anchor, or the anchors' after."""
    least_range: float = 1e-5
    """Scores of a row are divided by their range, or by this where the range is smaller."""
    begins: str = "random"
    """How a new one starts: "random", "small" or "even"; see `start`."""

    @staticmethod
    @abstractmethod
    def describe_frames(grid: Tensor) -> Tensor:
        """Grid `(B, T, H, W, C)` -> one descriptor a frame, `(B, T, frame_width * C)`."""

    def normalize(self, scores: Tensor) -> Tensor:
        """Min-max over the row (Eq. 3): raw scores `(B, N)` -> `(B, N)`; equal scores give 0, with finite gradients."""
        low = scores.amin(-1, keepdim=True)
        return (scores - low) / (scores.amax(-1, keepdim=True) - low).clamp_min(self.least_range)

    @abstractmethod
    def forward(self, candidates: Tensor) -> Tensor:
        """Candidates `(B, N, E)` -> raw scores `(B, N)`."""

    @torch.no_grad()
    def redraw(self, generator: torch.Generator) -> None:
        """Draw the weights of all layers anew, with the spread that they have; the generator is the CPU's."""
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                spread = layer.weight.square().mean().sqrt().cpu()
                layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) * spread)

    def start(self) -> None:
        """Begin as `begins` says: with a random, a small or no preference; it grows as it is learned.

        "random" changes nothing; with "small" and "even" small ranges stay small; with "even" all scores are equal (the last
        layer is 0), so that the layers before it learn nothing at first.

        Ranges below 1 are not stretched to 1: otherwise random weights would decide as firmly as learned ones, and from equal
        scores the first step, however small, would decide all, with a gradient 1e5 times too large, which float16 cannot hold.
        """
        if self.begins == "random":
            return
        self.least_range = 1.0
        if self.begins == "even":
            *_, last = (module for module in self.modules() if isinstance(module, nn.Linear))
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)


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
        self.local = nn.Linear(dim, dim // 2)
        self.activation = nn.GELU()
        self.score = nn.Linear(2 * (dim // 2), 1)

    @staticmethod
    def describe_frames(grid: Tensor) -> Tensor:
        """Mean over space (Sec. 3.3): `(B, T, H, W, C)` -> `(B, T, C)`."""
        return grid.mean(dim=(2, 3))

    def forward(self, candidates: Tensor) -> Tensor:
        """Candidates `(B, N, E)` -> raw scores `(B, N)`."""
        local = self.activation(self.local(candidates))
        context = local.mean(dim=1, keepdim=True)
        return self.score(torch.cat((local, context.expand_as(local)), dim=-1)).squeeze(-1)


class ContextScorer(PaperScorer):
    """The paper's scorer with a hidden layer after [local, global]: here a score may depend on what else is in the row.

    Differs from the paper: Eq. 3 has a single layer there, in which the global half cancels (see `PaperScorer`).
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        half = dim // 2
        self.score = nn.Sequential(nn.Linear(2 * half, half), nn.GELU(), nn.Linear(half, 1))  # type: ignore[assignment]


class OfficialScorer(Scorer):
    """The released code's scorer, which published checkpoints hold (reference: wangjk666/STTS, `score_network`).

    Differs from the paper: LayerNorm first, five layers with GELU, the global feature is the mean of the second half of
    the channels, frames are described by mean and maximum, scores are normalised after averaging in anchors.
    """

    frame_width = 2
    normalizes_tokens = False

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.LayerNorm(dim, eps=1e-5), nn.Linear(dim, dim), nn.GELU())
        self.score = nn.Sequential(
            nn.Linear(dim, dim // 2), nn.GELU(), nn.Linear(dim // 2, dim // 4), nn.GELU(), nn.Linear(dim // 4, 1)
        )

    @staticmethod
    def describe_frames(grid: Tensor) -> Tensor:
        """Mean and maximum over space: `(B, T, H, W, C)` -> `(B, T, 2 C)`."""
        return torch.cat((grid.mean(dim=(2, 3)), grid.amax(dim=(2, 3))), dim=-1)

    def normalize(self, scores: Tensor) -> Tensor:
        """Min-max with 1e-5 added to the range: `(B, N)` -> `(B, N)`."""
        low = scores.amin(-1, keepdim=True)
        return (scores - low) / (scores.amax(-1, keepdim=True) - low + 1e-5).clamp_min(self.least_range)

    def forward(self, candidates: Tensor) -> Tensor:
        """Candidates `(B, N, E)` -> raw scores `(B, N)`."""
        local, context = self.features(candidates).chunk(2, dim=-1)
        context = context.mean(dim=1, keepdim=True).expand_as(local)
        return self.score(torch.cat((local, context), dim=-1)).squeeze(-1)


class DeviationScorer(OfficialScorer):
    """The released code's scorer, but frames are described by their standard deviation over space.

    Differs from both: something that moves stands out from the rest of its frame, which the mean hides, and of which the
    maximum sees a single token. What a position embedding adds to all tokens of a frame cancels, so that no place in time is
    preferred. Tokens are scored as in the released code.
    """

    frame_width = 1

    @staticmethod
    def describe_frames(grid: Tensor) -> Tensor:
        """Standard deviation over space: `(B, T, H, W, C)` -> `(B, T, C)`."""
        return deviation(grid, (2, 3)).flatten(2)


SCORERS: dict[str, type[Scorer]] = {
    "paper": PaperScorer,
    "context": ContextScorer,
    "official": OfficialScorer,
    "deviation": DeviationScorer,
}
