"""What of a clip reached the last block: the slots' records put together and traced back to frames and places of the picture."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from stts_lightning.selection.reducer import Record, Reduction
from stts_lightning.selection.selector import GridSize
from stts_lightning.selection.truth import of_grid

Box = tuple[float, float, float, float]
"""Top, left, bottom and right, as shares of the picture."""


@dataclass(frozen=True)
class SlotScores:
    """What a slot thought of the frames that reached it.

    Attributes:
        slot: its name.
        frames: token frames of the clip that reached it.
        scores: temporal: of each of them; spatial: of the best window in each.
        kept: which of them it kept (a spatial slot keeps all).
    """

    slot: str
    frames: tuple[int, ...]
    scores: tuple[float, ...]
    kept: tuple[bool, ...]


@dataclass(frozen=True)
class Kept:
    """What is left of one clip.

    Attributes:
        frames: number of token frames of the clip.
        boxes: for each token frame that is left, the window that is left of it; it may hold tokens that are not.
        mask: `(frames, H, W)` bool, tokens that are left, on the grid that the first slot saw.
        groups: where tokens were merged, `(frames, H, W)` int: number of the token that each became a part of, -1 for none.
        slots: scores, slot by slot.
    """

    frames: int
    boxes: dict[int, Box]
    mask: NDArray[np.bool_]
    slots: tuple[SlotScores, ...]
    groups: NDArray[np.int64] | None = None

    @property
    def share(self) -> float:
        """Share of the first slot's tokens that is left; those that were merged count as one."""
        if self.groups is not None:
            return len(np.unique(self.groups[self.groups >= 0])) / self.groups.size
        return float(self.mask.mean())


def _merged(boxes: NDArray[np.float64], height: int, width: int) -> NDArray[np.float64]:
    """Places of tokens after a backbone pooled or merged neighbours: `(T, H, W, 4)` -> `(T, height, width, 4)`."""
    rows, columns = (_merged_side(was, now) for was, now in zip(boxes.shape[1:3], (height, width), strict=True))
    padded = np.pad(boxes, ((0, 0), (0, rows * height - boxes.shape[1]), (0, columns * width - boxes.shape[2]), (0, 0)), "edge")
    blocks = padded.reshape(len(boxes), height, rows, width, columns, 4)
    return np.concatenate([blocks[..., :2].min((2, 4)), blocks[..., 2:].max((2, 4))], -1)


def _merged_side(before: int, after: int) -> int:
    """How many neighbours along a side became one token: each stage of a backbone merges 2 and rounds up (10 -> 5 -> 3)."""
    return next(2**stages for stages in range(before.bit_length() + 1) if math.ceil(before / 2**stages) == after)


def shown_boxes(truth: Tensor, frames: int) -> list[Box | None]:
    """Where the action of one clip is in each of its token frames: truth `(T, 4)`, see `selection.truth`."""
    boxes = of_grid(truth[None], frames)[0].cpu().tolist()
    return [None if left != left else (top, left, bottom, right) for left, top, right, bottom in boxes]


def trace(kept: Sequence[Record], sizes: Mapping[str, GridSize], sample: int) -> Kept:
    """Follow one clip of a batch through all slots.

    Args:
        kept: records of a forward pass, in the order of the slots; at least one.
        sizes: frames, height and width of the grid that reaches each slot.
        sample: number of the clip in the batch.
    """
    total, height, width = sizes[kept[0].slot]
    rows, columns = np.meshgrid(np.arange(height) / height, np.arange(width) / width, indexing="ij")
    places = np.stack([rows, columns, rows + 1 / height, columns + 1 / width], -1)
    boxes = np.repeat(places[None], total, 0)
    numbers = np.arange(total)
    slots: list[SlotScores] = []
    reductions: list[Reduction] = []
    for record in kept:
        if isinstance(record, Reduction):
            reductions.append(record)
            continue
        _, now_high, now_wide = sizes[record.slot]
        if boxes.shape[1:3] != (now_high, now_wide):
            boxes = _merged(boxes, now_high, now_wide)
        indices, scores = record.indices[sample].cpu().numpy(), record.scores[sample].detach().float().cpu().numpy()
        seen = tuple(numbers.tolist())
        if scores.ndim == 1:  # Temporal.
            chosen = tuple(bool(i in set(indices.tolist())) for i in range(len(numbers)))
            slots.append(SlotScores(record.slot, seen, tuple(scores.tolist()), chosen))
            numbers, boxes = numbers[indices], boxes[indices]
            continue
        slots.append(SlotScores(record.slot, seen, tuple(scores.max(-1).tolist()), (True,) * len(seen)))
        if record.windows is not None:
            cut = record.windows[sample].cpu().tolist()
            boxes = np.stack([b[t : t + h, x : x + w] for b, (t, x, h, w) in zip(boxes, cut, strict=True)])
        else:  # Single tokens: a row of them, whatever grid they are laid out on.
            flat = boxes.reshape(len(boxes), -1, 4)
            boxes = np.stack([b[i] for b, i in zip(flat, indices, strict=True)])[:, None]
    last = None
    if reductions:
        last, scores = _reduced(reductions, boxes.shape[:3], sample)
        name = reductions[0].slot + (f"-{reductions[-1].slot[1:]}" if len(reductions) > 1 else "")
        slots.append(SlotScores(name, tuple(numbers.tolist()), scores, (True,) * len(numbers)))
    groups = np.full((total, height, width), -1)
    for frame, number in enumerate(numbers):
        ends = np.round(boxes[frame] * (height, width, height, width)).astype(int)
        for place, (top, left, bottom, right) in enumerate(ends.reshape(-1, 4)):
            groups[number, top:bottom, left:right] = place if last is None else last[frame].flat[place]
    flat = boxes.reshape(len(boxes), -1, 4)
    corners = np.concatenate([flat[..., :2].min(1), flat[..., 2:].max(1)], -1)
    mask = groups >= 0
    outer = {
        int(n): (float(t), float(le), float(b), float(r))
        for n, (t, le, b, r) in zip(numbers, corners, strict=True)
        if mask[n].any()
    }
    return Kept(total, outer, mask, tuple(slots), None if last is None else groups)


def _reduced(reductions: Sequence[Reduction], size: Sequence[int], sample: int) -> tuple[NDArray[np.int64], tuple[float, ...]]:
    """Where the tokens of a grid `(T, H, W)` ended, -1 where they were dropped; and the share of each frame's that is left.

    Of tokens that were merged, the first in time counts as left.
    """
    where = None
    for reduction in reductions:
        where = reduction.after(where)
    assert where is not None
    ends = where[sample].cpu().numpy().reshape(size)
    _, first = np.unique(ends, return_index=True)
    alone = np.isin(np.arange(ends.size), first).reshape(size) & (ends >= 0)
    return ends, tuple(alone.mean((1, 2)).tolist())
