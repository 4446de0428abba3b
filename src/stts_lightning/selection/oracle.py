"""Selectors that read the truth: what the best choice is worth. No learned selector can do what these cannot."""

import torch
from torch import Tensor

from stts_lightning.selection.noise import Noise
from stts_lightning.selection.selector import Selection, Selector, SlotContext
from stts_lightning.selection.spatial import ONE_WINDOW, WindowSelector
from stts_lightning.selection.temporal import FrameSelector
from stts_lightning.selection.topk import hard_topk
from stts_lightning.selection.truth import joined


class Told(Selector):
    """A selector to which the slots tell, before each pass, where the action is in the grid that reaches it."""

    boxes: Tensor | None = None
    """`(B, T, 4)`, see `truth`."""

    def told(self, grid: Tensor) -> Tensor:
        """The boxes; NaN, as in clips without action, where nobody told any."""
        return grid.new_full((*grid.shape[:2], 4), torch.nan, dtype=torch.float32) if self.boxes is None else self.boxes


class OracleFrames(Told, FrameSelector):
    """The K frames nearest to the middle of the action; those in the middle of a clip without one."""

    def forward(self, grid: Tensor, sigma: Tensor, noise: Noise, attention: Tensor | None = None) -> tuple[Tensor, Selection]:
        """Grid `(B, T, H, W, C)` -> `(B, K, H, W, C)`; see `Selector.forward`."""
        has = (~self.told(grid)[..., 0].isnan()).float()
        at = torch.arange(grid.shape[1], device=grid.device, dtype=torch.float32)
        middle = (has * at).sum(1) / has.sum(1)
        scores = -(at - middle.nan_to_num(float(at.numel() - 1) / 2)[:, None]).abs()
        return self.take(grid, scores, hard_topk(scores, self.keep))


class OracleWindow(Told, WindowSelector):
    """The anchor nearest to the action: of each frame, or one for a clip (`selection.windows=clip`).

    Frames without action take the window of the whole action; a clip without one that in the middle.
    """

    def __init__(self, context: SlotContext) -> None:
        super().__init__(context)
        self.of_clip = context.selection.windows in ONE_WINDOW

    def forward(self, grid: Tensor, sigma: Tensor, noise: Noise, attention: Tensor | None = None) -> tuple[Tensor, Selection]:
        """Grid `(B, T, H, W, C)` -> `(B, T, h, w, C)`; see `Selector.forward`."""
        boxes, (_, height, width) = self.told(grid), self.in_size
        whole = joined(boxes, 1).unsqueeze(1).expand_as(boxes)
        boxes = whole if self.of_clip else torch.where(boxes.isnan(), whole, boxes)
        middle = ((boxes[..., :2] + boxes[..., 2:]) / 2).nan_to_num(0.5)
        # Middle of each anchor from its number, as `windows_of` has its corner.
        anchors = self.windows_of(torch.arange(len(self.corners), device=grid.device)[None]).float()[0]
        x, y = (anchors[:, 1] + anchors[:, 3] / 2) / width, (anchors[:, 0] + anchors[:, 2] / 2) / height
        scores = -torch.maximum((middle[..., :1] - x).abs(), (middle[..., 1:] - y).abs())
        best = scores.argmax(-1)
        return self.take(grid, scores, self.windows_of(best), best)
