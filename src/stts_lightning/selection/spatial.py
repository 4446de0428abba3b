"""Spatial selection (paper Sec. 3.3): of each frame keep the one window ("anchor") with the highest mean score."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from stts_lightning.selection.noise import Noise
from stts_lightning.selection.scorer import deviation
from stts_lightning.selection.selector import GridSize, Selection, Selector, SlotContext, SoftTopK, build_scorer
from stts_lightning.selection.spec import SelectionError

ONE_WINDOW = ("clip", "motion")
"""Values of `selection.windows` with which all frames of a clip have the same window."""


def anchor_starts(length: int, window: int) -> list[int]:
    """First token of each anchor along one side: stride max((length - window) // 2, 1), as in the official code.

    For margins of 5 and more that are odd the last token lies in no anchor.
    """
    return list(range(0, length - window + 1, anchor_stride(length, window)))


def anchor_stride(length: int, window: int) -> int:
    """Tokens from one anchor to the next along one side."""
    return max((length - window) // 2, 1)


class _WeightedWindows(torch.autograd.Function):
    """Sum over anchors of weight times window, without unfolding the grid: neither pass holds more than one window."""

    @staticmethod
    def forward(ctx: Any, grid: Tensor, weights: Tensor, corners: tuple[tuple[int, int], ...], size: tuple[int, int]) -> Tensor:
        h, w = size
        ctx.save_for_backward(grid, weights)
        ctx.corners, ctx.size = corners, size
        out = grid.new_zeros(*grid.shape[:2], h, w, grid.shape[-1])
        for g, (top, left) in enumerate(corners):
            out.addcmul_(grid[:, :, top : top + h, left : left + w], weights[:, :, g, None, None, None])
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grid, weights = ctx.saved_tensors
        grad = grads[0].contiguous()
        h, w = ctx.size
        grad_grid = torch.zeros_like(grid) if ctx.needs_input_grad[0] else None
        grad_weights = torch.empty_like(weights)
        for g, (top, left) in enumerate(ctx.corners):
            window = grid[:, :, top : top + h, left : left + w]
            grad_weights[:, :, g] = (grad * window).sum((2, 3, 4))
            if grad_grid is not None:
                view = grad_grid[:, :, top : top + h, left : left + w]
                view.addcmul_(grad, weights[:, :, g, None, None, None])
        return grad_grid, grad_weights, None, None


class WindowSelector(Selector):
    """What all anchor-based selectors share: the anchors of a frame, and keeping one."""

    def __init__(self, context: SlotContext) -> None:
        super().__init__(context)
        frames, height, width = context.size
        self.window = context.slot.window(height, width)
        self._out_size = (frames, *self.window)
        self.strides = (anchor_stride(height, self.window[0]), anchor_stride(width, self.window[1]))
        self.corners = tuple(
            (top, left) for top in anchor_starts(height, self.window[0]) for left in anchor_starts(width, self.window[1])
        )
        self.moving = context.selection.windows

    @property
    def out_size(self) -> GridSize:
        """See `Selector.out_size`."""
        return self._out_size

    def anchor_means(self, maps: Tensor) -> Tensor:
        """Mean over each anchor: `(B T, C, H, W)` -> `(B T, C, G)`."""
        return F.avg_pool2d(maps, self.window, self.strides).flatten(2)

    def over_time(self, scores: Tensor) -> Tensor:
        """Scores of windows `(B, T, G)`, averaged over time as `selection.windows` says: `(B, T, G)`, or `(B, 1, G)`."""
        if self.moving in ONE_WINDOW:
            return scores.mean(1, keepdim=True)
        if self.moving == "smooth":
            return F.avg_pool2d(scores, (3, 1), (1, 1), (1, 0), count_include_pad=False)
        return scores

    def windows_of(self, best: Tensor) -> Tensor:
        """Top, left, height and width of anchors `(B, T)`, in tokens: `(B, T, 4)`."""
        h, w = self.window
        # Corner of an anchor from its number, not from a table: a table on another device would cost a copy a step.
        columns = (self.in_size[2] - w) // self.strides[1] + 1
        top = best.div(columns, rounding_mode="floor") * self.strides[0]
        left = best.remainder(columns) * self.strides[1]
        return torch.stack((top, left, torch.full_like(top, h), torch.full_like(top, w)), dim=-1)

    def take(self, grid: Tensor, scores: Tensor, windows: Tensor, best: Tensor) -> tuple[Tensor, Selection]:
        """Keep a window of each frame: grid `(B, T, H, W, C)`, windows `(B, T, 4)` -> `(B, T, h, w, C)`."""
        batch, frames = grid.shape[:2]
        h, w = self.window
        top, left = windows[..., 0], windows[..., 1]
        rows = (top.unsqueeze(-1) + torch.arange(h, device=grid.device)).unsqueeze(-1)  # (B, T, h, 1)
        cols = (left.unsqueeze(-1) + torch.arange(w, device=grid.device)).unsqueeze(-2)  # (B, T, 1, w)
        b = torch.arange(batch, device=grid.device).view(-1, 1, 1, 1)
        t = torch.arange(frames, device=grid.device).view(1, -1, 1, 1)
        return grid[b, t, rows, cols], Selection(self.slot, best, windows, scores, None)

    def extra_repr(self) -> str:
        """What is kept, in integers."""
        return f"{self.window[0]}x{self.window[1]} of {self.in_size[1]}x{self.in_size[2]}, {len(self.corners)} anchors"


class SpatialSelector(WindowSelector):
    """Scores each token, averages the scores in every anchor and keeps the best anchor of each frame (Top-1).

    Because a window of a grid is a grid, everything downstream simply works on the smaller one.
    """

    def __init__(self, context: SlotContext) -> None:
        super().__init__(context)
        selection = context.selection
        if self.moving == "motion" and self.in_size[0] < 2:
            raise SelectionError(
                f"selection.windows=motion: needs two frames or more, and one reaches slot {self.slot}; "
                "with one frame it can be frame or clip"
            )
        self.scorer = build_scorer(selection, context.dim, "s")
        self.soft_topk = SoftTopK(selection)
        self.of_tokens = self.scorer.normalizes_tokens if selection.normalize == "scorer" else selection.normalize == "tokens"
        self.scope = selection.scope

    def scored(self, grid: Tensor) -> Tensor:
        """What the scorer is given: the grid `(B, T, H, W, C)`, or its motion, `(B, 1, H, W, C)`; see `selection.windows`."""
        return deviation(self.judged(grid), 1) if self.moving == "motion" else grid

    def normalized(self, scores: Tensor) -> Tensor:
        """Scores `(B, T, N)` in [0, 1]: of each frame, or of all frames of a clip."""
        if self.scope == "clip":
            return self.scorer.normalize(scores.flatten(1)).view_as(scores)
        return self.scorer.normalize(scores.flatten(0, 1)).view_as(scores)

    def window_scores(self, grid: Tensor) -> Tensor:
        """Mean score of each anchor: `(B, T, H, W, C)` -> `(B, T, G)`; `(B, 1, G)` where a clip has one window."""
        grid = self.scored(grid)
        batch, frames, height, width, _ = grid.shape
        tokens = self.scorer(grid.flatten(2, 3).flatten(0, 1)).float().view(batch, frames, -1)
        if self.of_tokens:
            tokens = self.normalized(tokens)
        anchors = self.anchor_means(tokens.view(batch * frames, 1, height, width)).view(batch, frames, -1)
        anchors = self.over_time(anchors)
        return anchors if self.of_tokens else self.normalized(anchors)

    def forward(self, grid: Tensor, sigma: Tensor, noise: Noise, attention: Tensor | None = None) -> tuple[Tensor, Selection]:
        """Grid `(B, T, H, W, C)` -> `(B, T, h, w, C)`; see `Selector.forward`."""
        frames = grid.shape[1]
        scores = self.window_scores(grid)
        shown = scores.expand(-1, frames, -1)
        best = shown.detach().argmax(-1)
        windows = self.windows_of(best)
        if not self.training:
            return self.take(grid, shown, windows, best)
        weights = self.soft_topk(scores.flatten(0, 1), 1, sigma, noise).view(scores.shape).expand_as(shown)
        kept: Tensor = _WeightedWindows.apply(grid, weights.to(grid.dtype), self.corners, self.window)  # type: ignore[assignment]
        return kept, Selection(self.slot, best, windows, shown, weights)
