"""A VideoSwin block on a CPU: shifted windows are cut as they are, without rolling, padding or masking the grid."""

import functools
import math
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from stts_lightning.backbones import video_swin
from stts_lightning.backbones.video_swin import Triple
from stts_lightning.kernels.cpu.attention import attend
from stts_lightning.kernels.cpu.linear import CHUNK_TOKENS, linear, mkldnn_linear, mlp_residual, prepack
from stts_lightning.selection.selector import GridSize


class Span(NamedTuple):
    """A part of an axis: where it starts in the grid, its length, and where it starts in its window."""

    start: int
    length: int
    inside: int


def spans(n: int, window: int, shift: int, sees_padding: bool) -> list[Span]:
    """How shifted windows cut one axis.

    The plain model rolls the grid by the shift, cuts it into windows, and masks the pairs that the roll has brought together.
    What is left of the windows at both ends are smaller windows.

    Args:
        n: tokens of the axis.
        window: size of a window.
        shift: where the second window starts; 0 without a shift.
        sees_padding: whether the last windows reach over the end, into padding that is attended to.
    """
    full = math.ceil(n / window) * window
    parts = [Span(start, min(window, full - start), 0) for start in range(shift, full, window)]
    if shift:
        parts.append(Span(0, shift, window - shift))  # In the rolled grid, the first tokens end the last window.
    if not sees_padding:  # Then only offsets count, and those are the same in any corner of a window.
        parts = [Span(start, min(length, n - start), 0) for start, length, _ in parts]
    return [part for part in parts if part.start < n]


class Group(NamedTuple):
    """Boxes of one shape, which attend together.

    Attributes:
        boxes: how many.
        tokens: of each.
        inside: the part of a window that they are, along each axis; its bias is the same part of the window's.
    """

    boxes: int
    tokens: int
    inside: tuple[slice, slice, slice]


class Boxes:
    """A grid of one size, cut into boxes.

    Attributes:
        groups: boxes by their shape.
        padded: whether some boxes hold padding.
        tokens: `(S,)`, number of the token at each position of the boxes, one group after the other; N for padding.
        positions: `(N,)`, position of each token.
    """

    def __init__(self, size: GridSize, window: Triple, shift: Triple, sees_padding: bool) -> None:
        n = math.prod(size)
        padded_size = [math.ceil(n / m) * m for n, m in zip(size, window, strict=True)]
        number = torch.full(padded_size, n)
        number[: size[0], : size[1], : size[2]] = torch.arange(n).view(size)
        by_shape: dict[tuple[tuple[int, int], ...], list[Tensor]] = {}
        for box in product(*(spans(n, w, s, sees_padding) for n, w, s in zip(size, window, shift, strict=True))):
            cut = number[tuple(slice(span.start, span.start + span.length) for span in box)]
            by_shape.setdefault(tuple((span.inside, span.length) for span in box), []).append(cut.flatten())
        self.groups: list[Group] = []
        for key, boxes in by_shape.items():
            t, h, w = (slice(start, start + length) for start, length in key)
            self.groups.append(Group(len(boxes), len(boxes[0]), (t, h, w)))
        self.tokens = torch.cat([cut for boxes in by_shape.values() for cut in boxes])
        self.positions = self.tokens.argsort(stable=True)[:n]
        self.padded = len(self.tokens) > n


@functools.cache
def boxes_of(size: GridSize, window: Triple, shift: Triple, sees_padding: bool) -> Boxes:
    """Boxes of a grid, made once."""
    with torch.device("cpu"), torch.inference_mode(False):
        return Boxes(size, window, shift, sees_padding)


def block(module: video_swin.Block, grid: Tensor) -> Tensor:
    """See `video_swin.Block.forward`: grid `(B, T, H, W, C)`."""
    x = grid.flatten(1, 3)
    x = x + module.drop_path(_attention(module, x))
    return mlp_residual(x, module.norm2, module.mlp, module.drop_path).view_as(grid)


def _attention(module: video_swin.Block, x: Tensor) -> Tensor:
    """Norm and window attention of all tokens of a grid, in their order: `(B, N, C)` -> `(B, N, C)`."""
    attn, plan = module.attn, module.attn.plan
    boxes = boxes_of(plan.size, plan.window, plan.shift, plan.sees_padding)
    biases = _biases(attn, boxes)
    if boxes.padded or torch.is_grad_enabled():
        x = module.norm1(x)
        if boxes.padded:  # A zero, whose q, k and v are the layer's bias.
            x = F.pad(x, (0, 0, 0, 1))
        qkv = linear(x.index_select(1, boxes.tokens), attn.qkv)
        parts = qkv.split([group.boxes * group.tokens for group in boxes.groups], dim=1)
        out = [_attend(rows, group.tokens, bias) for rows, group, bias in zip(parts, boxes.groups, biases, strict=True)]
        return linear(torch.cat(out, dim=1).index_select(1, boxes.positions), attn.proj)
    # In evaluation some boxes go all the way at a time, while their tokens are in a cache.
    out = torch.empty_like(x)
    qkv_weight, proj_weight = prepack(attn.qkv.weight, x[..., 0].numel()), prepack(attn.proj.weight, x[..., 0].numel())
    for clip, place in zip(x, out, strict=True):
        begin = 0
        for group, bias in zip(boxes.groups, biases, strict=True):
            end = begin + group.boxes * group.tokens
            for chunk in boxes.tokens[begin:end].split(max(CHUNK_TOKENS // group.tokens, 1) * group.tokens):
                qkv = mkldnn_linear(module.norm1(clip.index_select(0, chunk)), qkv_weight, attn.qkv.bias)
                attended = _attend(qkv.unsqueeze(0), group.tokens, bias).squeeze(0)
                place.index_copy_(0, chunk, mkldnn_linear(attended, proj_weight, attn.proj.bias))
            begin = end
    return out


def _attend(rows: Tensor, tokens: int, bias: Tensor) -> Tensor:
    """Attention within boxes of so many tokens: `(B, S, 3 C)` -> `(B, S, C)`; bias `(D, n, n)`."""
    batch, positions, channels = rows.shape
    boxes = batch * positions // tokens
    q, k, v = rows.reshape(boxes, tokens, 3, len(bias), channels // (3 * len(bias))).permute(2, 0, 3, 1, 4)
    return attend(q, k, v, bias).view(batch, positions, channels // 3)


def _biases(attn: video_swin.WindowAttention, boxes: Boxes) -> list[Tensor]:
    """Bias of each group of boxes, `(D, n, n)`: a part of the whole window's."""
    window = attn.plan.window
    # Gathered from one row a head: four times as fast as rows of the table.
    table = attn.relative_position_bias_table.T.contiguous()
    whole = table.gather(1, attn.plan.bias_index.expand(attn.heads, -1)).unflatten(1, (*window, *window))
    return [
        whole[:, t, h, w, t, h, w].reshape(attn.heads, group.tokens, group.tokens)
        for group in boxes.groups
        for t, h, w in (group.inside,)
    ]
