"""Where the action is, for selectors that may know it and for figures that compare a choice with it.

A truth is a box for each frame, `(B, T, 4)`: left, top, right and bottom as shares of the picture; NaN where the frame shows no
action. Only data sets that were made for it have one.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from stts_lightning.selection.reducer import Record
from stts_lightning.selection.selector import GridSize, Selection


def joined(boxes: Tensor, dim: int) -> Tensor:
    """The smallest box around all boxes along a dimension of `(..., 4)`; NaN where there is none."""
    none = boxes.isnan()
    low = boxes.masked_fill(none, torch.inf)[..., :2].amin(dim)
    high = boxes.masked_fill(none, -torch.inf)[..., 2:].amax(dim)
    both = torch.cat((low, high), -1)
    return both.masked_fill(both.isinf(), torch.nan)


def of_grid(truth: Tensor, frames: int) -> Tensor:
    """A box for each frame of a grid: `(B, T, 4)` -> `(B, frames, 4)`; T is a multiple of `frames`."""
    return joined(truth.view(len(truth), frames, -1, 4), 2)


def seen(boxes: Tensor, windows: Tensor, size: GridSize) -> Tensor:
    """Boxes as shares of the windows that were kept of their frames, cut at their edges; NaN outside.

    Args:
        boxes: `(B, T, 4)`.
        windows: `(B, T, 4)`, see `Selection.windows`.
        size: of the grid that the windows lie in.
    """
    top, left, height, width = windows.to(boxes.dtype).unbind(-1)
    sides = torch.tensor([size[2], size[1], size[2], size[1]], dtype=boxes.dtype, device=boxes.device)
    tokens = boxes * sides - torch.stack((left, top, left, top), -1)
    shares = (tokens / torch.stack((width, height, width, height), -1)).clamp(0, 1)
    empty = (shares[..., 2:] <= shares[..., :2]).any(-1, keepdim=True)
    return shares.masked_fill(empty, torch.nan)


def follow(boxes: Tensor, selection: Selection, size: GridSize) -> Tensor:
    """The boxes of what a slot kept, from those of the grid that reached it; single tokens leave them as they are."""
    if selection.windows is not None:
        return seen(boxes, selection.windows, size)
    if selection.indices.dim() == 2 and selection.slot.startswith("t"):
        rows = torch.arange(len(boxes), device=boxes.device)[:, None]
        return boxes[rows, selection.indices]
    return boxes


def area(boxes: Tensor) -> Tensor:
    """Share of the picture that each box covers: `(..., 4)` -> `(...)`; 0 where there is none."""
    return ((boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])).nan_to_num(0.0)


def tokens_shown(boxes: Tensor, size: GridSize) -> Tensor:
    """Share of each token that a box covers: boxes `(B, T, 4)` of a grid -> `(B, T H W)`."""
    _, height, width = size
    along: list[Tensor] = []
    for low, high, side in ((1, 3, height), (0, 2, width)):
        edge = torch.arange(side, device=boxes.device)
        covered = (boxes[..., high, None] * side).minimum(edge + 1.0) - (boxes[..., low, None] * side).maximum(edge)
        along.append(covered.clamp_min(0).nan_to_num(0.0))
    return (along[0].unsqueeze(-1) * along[1].unsqueeze(-2)).flatten(1)


def found(truth: Tensor, kept: Sequence[Record], sizes: Mapping[str, GridSize]) -> dict[str, Tensor]:
    """How much of the action that reached each slot it kept, for each clip: of its frames, or of its area in these.

    Of a reducer: of the area of its tokens.

    Args:
        truth: `(B, T, 4)`, of the clip's frames.
        kept: what each slot kept, in the order of the slots.
        sizes: of the grid that reached each slot.

    Returns:
        By slot `(B,)` between 0 and 1; NaN where no action reached it.
    """
    shares: dict[str, Tensor] = {}
    boxes: Tensor | None = None
    left: Tensor | None = None
    """Of each token that reached the first reducer, where it is now; -1 where it was dropped."""
    for selection in kept:
        size = sizes[selection.slot]
        boxes = of_grid(truth, size[0]) if boxes is None else boxes
        if not isinstance(selection, Selection):
            shown = tokens_shown(boxes, size)
            reached = torch.ones_like(shown) if left is None else (left >= 0).float()
            left = selection.after(left)
            shares[selection.slot] = (shown * (left >= 0)).sum(1) / (shown * reached).sum(1)
            continue
        after = follow(boxes, selection, size)
        if selection.windows is not None:
            # In shares of the window, an area counts for as much less as the window is smaller than the grid.
            smaller = selection.windows[..., 2:].prod(-1) / (size[1] * size[2])
            shares[selection.slot] = (area(after) * smaller).sum(1) / area(boxes).sum(1)
        elif selection.slot.startswith("t"):
            has = ~boxes[..., 0].isnan()
            shares[selection.slot] = (~after[..., 0].isnan()).sum(1) / has.sum(1)
        boxes = after
    return shares
