"""What of a clip reached the last block: the slots' records put together and traced back to frames and places of the picture."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from stts_lightning.selection.selector import GridSize, Selection
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
        slots: scores, slot by slot.
    """

    frames: int
    boxes: dict[int, Box]
    mask: NDArray[np.bool_]
    slots: tuple[SlotScores, ...]

    @property
    def share(self) -> float:
        """Share of the first slot's tokens that is left."""
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


def trace(kept: Sequence[Selection], sizes: Mapping[str, GridSize], sample: int) -> Kept:
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
    for record in kept:
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
    mask = np.zeros((total, height, width), bool)
    for number, frame in zip(numbers, boxes, strict=True):
        for top, left, bottom, right in frame.reshape(-1, 4):
            mask[number, round(top * height) : round(bottom * height), round(left * width) : round(right * width)] = True
    flat = boxes.reshape(len(boxes), -1, 4)
    corners = np.concatenate([flat[..., :2].min(1), flat[..., 2:].max(1)], -1)
    outer = {int(n): (float(t), float(le), float(b), float(r)) for n, (t, le, b, r) in zip(numbers, corners, strict=True)}
    return Kept(total, outer, mask, tuple(slots))
