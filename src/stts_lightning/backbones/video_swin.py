"""Video Swin (Liu et al., CVPR 2022) with places for token selection.

Letters: B clips, T frames, H W grid of N tokens, C channels, D heads, S slots. A grid is `(B, T, H, W, C)`. The file reads
from the windows and the stem to the named sizes at its end.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from timm.layers.drop import DropPath
from timm.layers.weight_init import trunc_normal_
from torch import Tensor, nn
from torch.nn import functional as F

from stts_lightning.backbones.registry import Backbone, BackboneError, register_backbone
from stts_lightning.layers.attention import attend
from stts_lightning.layers.linear import Linear, linear
from stts_lightning.layers.products import PIECE, constant_weights, lean, once, working_dtype
from stts_lightning.layers.rowwise import Look, Perceptron, ahead, hooked, joined, perceive, project, untouched
from stts_lightning.selection.selector import GridSize, Selection
from stts_lightning.selection.slots import SlotBank
from stts_lightning.selection.spec import SelectionSpec

Triple = tuple[int, int, int]

POLICIES = ("balanced", "official")


def windows(size: GridSize, limit: Triple, shifted: bool, policy: str) -> tuple[Triple, Triple]:
    """Size of the attention windows of a grid, and by how much they are shifted.

    `official` takes the limit wherever the grid is larger: 10 frames make two windows of 8, padded by 6. `balanced`
    takes as many windows and shares the grid out evenly: two of 5.
    """
    window, shift = [], []
    for n, most in zip(size, limit, strict=True):
        count = math.ceil(n / most)
        window.append(n if n <= most else most if policy == "official" else math.ceil(n / count))
        shift.append(window[-1] // 2 if shifted and count > 1 else 0)
    return (window[0], window[1], window[2]), (shift[0], shift[1], shift[2])


class Span(NamedTuple):
    """A box along one axis: where it starts in the grid, its length, and where it starts in its window."""

    start: int
    length: int
    inside: int


def spans(n: int, window: int, shift: int, padded: bool) -> list[Span]:
    """How windows cut one axis.

    Published code rolls the grid by the shift, cuts it into windows, and masks the pairs that the roll has brought together.
    What is left are smaller windows at both ends: cut as such they need neither roll nor mask, and no product is worked
    out to be hidden.

    Args:
        n: tokens of the axis.
        window: size of a window.
        shift: where the second window starts; 0 if they are not shifted.
        padded: whether the last windows reach over the end, into padding that attention sees.
    """
    full = math.ceil(n / window) * window
    found = [Span(start, min(window, full - start), 0) for start in range(shift, full, window)]
    if shift:
        found.append(Span(0, shift, window - shift))  # Rolled, the first tokens end the last window.
    if not padded:  # Then only offsets count, the same in any corner of a window.
        found = [Span(start, min(length, n - start), 0) for start, length, _ in found]
    return [span for span in found if span.start < n]


class Group(NamedTuple):
    """Boxes of one shape, which attend together.

    Attributes:
        boxes: how many.
        tokens: of each.
        inside: the part of a window that they are, along each axis: the part of its bias that they need.
    """

    boxes: int
    tokens: int
    inside: tuple[slice, slice, slice]


class WindowPlan(nn.Module):
    """How a grid of one size falls into boxes; shared by the blocks that cut it alike. Moves with the model.

    Attributes:
        size: frames, height and width of the grid.
        window: of a whole window.
        shift: by how much windows are shifted.
        groups: boxes by their shape.
        pieces: numbers of slots and of boxes of each group, a few boxes at a time.
        padded: whether some slots hold padding.
        hidden: pairs of tokens that published code works out and then masks.
        slots: `(S,)`, the token in each place of the groups, one group after the other; N, for padding.
        slot: `(N,)`, where each token lies among them.
        first, length: `(S,)`, where the group of a slot starts, and its slots.
        bias_index: row of the bias table for each pair of a whole window's tokens, flat.
    """

    slots: Tensor
    slot: Tensor
    first: Tensor
    length: Tensor
    bias_index: Tensor

    def __init__(self, size: GridSize, limit: Triple, shifted: bool, policy: str) -> None:
        super().__init__()
        self.size = size
        self.window, self.shift = windows(size, limit, shifted, policy)
        tokens = math.prod(size)
        number = np.full([math.ceil(n / m) * m for n, m in zip(size, self.window, strict=True)], tokens)
        number[: size[0], : size[1], : size[2]] = np.arange(tokens).reshape(size)
        boxes: dict[tuple[tuple[int, int], ...], list[NDArray[np.int64]]] = {}
        for box in product(
            *(spans(n, w, s, policy == "official") for n, w, s in zip(size, self.window, self.shift, strict=True))
        ):
            cut = number[tuple(slice(span.start, span.start + span.length) for span in box)]
            boxes.setdefault(tuple((span.inside, span.length) for span in box), []).append(cut.reshape(-1))
        self.groups: list[Group] = []
        for key, members in boxes.items():
            t, h, w = (slice(start, start + length) for start, length in key)
            self.groups.append(Group(len(members), len(members[0]), (t, h, w)))
        slots = np.concatenate([cut for members in boxes.values() for cut in members])
        lengths = np.array([group.boxes * group.tokens for group in self.groups])
        self.padded = len(slots) > tokens
        self.hidden = number.size * math.prod(self.window) - sum(group.boxes * group.tokens**2 for group in self.groups)
        self.pieces = self._pieces()
        for name, values in {
            "slots": slots,
            "slot": np.argsort(slots)[:tokens],
            "first": np.repeat(np.cumsum(lengths) - lengths, lengths),
            "length": np.repeat(lengths, lengths),
            "bias_index": bias_index(self.window, limit, policy),
        }.items():
            self.register_buffer(name, torch.from_numpy(values), persistent=False)

    def _pieces(self) -> list[tuple[int, list[tuple[int, int]]]]:
        """Slots, and (group, boxes) that they are, of each piece."""
        pieces: list[tuple[int, list[tuple[int, int]]]] = []
        for number, group in enumerate(self.groups):
            left = group.boxes
            while left:
                rows, parts = pieces.pop() if pieces and pieces[-1][0] + group.tokens <= PIECE else (0, [])
                taken = min(left, max((PIECE - rows) // group.tokens, 1))
                pieces.append((rows + taken * group.tokens, [*parts, (number, taken)]))
                left -= taken
        return pieces

    def arranged(self, batch: int) -> tuple[Tensor, Tensor]:
        """Places of several clips, boxes of one shape together over all clips.

        Returns:
            `(B * S,)`, the token in each place, of tokens numbered through the batch; B * N, for padding. And
            `(B * N,)`, the place of each token.
        """
        if batch == 1:
            return self.slots, self.slot
        slots, tokens = len(self.slots), len(self.slot)
        clip = torch.arange(batch, device=self.slots.device).unsqueeze(1)
        at = torch.arange(slots, device=self.slots.device) + (batch - 1) * self.first + clip * self.length  # (B, S)
        token = torch.where(self.slots < tokens, self.slots + clip * tokens, batch * tokens)
        held = torch.empty_like(token).flatten().scatter_(0, at.flatten(), token.flatten())
        return held, at[:, self.slot].flatten()


def bias_index(window: Triple, table: Triple, policy: str) -> NDArray[np.int64]:
    """Row of the bias table for each pair of a window's tokens, `(N * N,)`.

    A table made for windows of size `table` has a row for every offset up to +-(table - 1). `official` cuts the index of
    the full window to N x N, which is wrong where a window is smaller than the table's in height or width.
    """
    shown = table if policy == "official" else window
    at = np.stack(np.meshgrid(*(np.arange(n) for n in shown), indexing="ij")).reshape(3, -1)
    offset = at[:, :, None] - at[:, None] + np.array(table)[:, None, None] - 1
    index = (offset[0] * (2 * table[1] - 1) + offset[1]) * (2 * table[2] - 1) + offset[2]
    tokens = math.prod(window)
    return index[:tokens, :tokens].flatten()


class WindowAttention(nn.Module):
    """Multi-head attention in windows of the grid, with a learned bias for each offset between two tokens.

    Args:
        dim: channels.
        heads: of attention.
        limit: largest window; the bias table is made for it.
        plan: how the grid is cut.
    """

    def __init__(self, dim: int, heads: int, limit: Triple, plan: WindowPlan) -> None:
        super().__init__()
        self.heads, self.plan = heads, plan
        self.relative_position_bias_table = nn.Parameter(torch.zeros(math.prod(2 * n - 1 for n in limit), heads))
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    @property
    def hidden_macs(self) -> int:
        """Multiply-adds of pairs that published code masks after working them out; counted, as is the custom, not done."""
        return 2 * self.plan.hidden * self.proj.in_features

    def forward(self, x: Tensor, norm: nn.Module) -> Tensor:
        """Args: x `(B, N, C)`, the tokens of the grid in their order; what norms them first. Returns: the same size."""
        plan = self.plan
        dtype, table = working_dtype(x), self.relative_position_bias_table
        biases = once(table, plan, dtype, make=lambda: self._biases(dtype)) if lean(x) else self._biases(dtype)
        if lean(x) and not plan.padded:
            out = torch.empty_like(x)
            pieces = list(zip(plan.slots.split([rows for rows, _ in plan.pieces]), plan.pieces, strict=True))
            with constant_weights():
                for (clip, found), (places, (_, parts)) in product(zip(x, out, strict=True), pieces):
                    qkv = self.qkv(norm(clip.index_select(0, places)))
                    found.index_copy_(0, places, self.proj(self._attend(qkv, biases, parts)).to(out.dtype))
            return out
        held, back = plan.arranged(len(x))
        look: Look = (None if plan.padded else held, (3 * x.shape[-1],))
        qkv = project(norm, self.qkv, x.reshape(1, -1, x.shape[-1]), [look])[0].squeeze(0)
        if plan.padded:  # A padded token is q, k, v = bias, as if zeros had gone through the layer.
            qkv = torch.cat((qkv, self.qkv.bias.unsqueeze(0).to(qkv.dtype))).index_select(0, held)
        parts = [(number, group.boxes * len(x)) for number, group in enumerate(plan.groups)]
        rows = self._attend(qkv, biases, parts).index_select(0, back)
        return self.proj(rows).view_as(x)

    def _biases(self, dtype: torch.dtype) -> list[Tensor]:
        """Bias of each group of boxes, `(D, n, n)`: a part of the whole window's."""
        # A row a head, gathered: four times as fast as rows of the table and then turned.
        table, index = self.relative_position_bias_table.to(dtype).T.contiguous(), self.plan.bias_index
        whole = table.gather(1, index.expand(self.heads, -1)).unflatten(1, (*self.plan.window, *self.plan.window))
        return [
            whole[:, t, h, w, t, h, w].reshape(self.heads, group.tokens, group.tokens)
            for group in self.plan.groups
            for t, h, w in (group.inside,)
        ]

    def _attend(self, qkv: Tensor, biases: Sequence[Tensor], parts: Sequence[tuple[int, int]]) -> Tensor:
        """Attention within boxes: rows of queries, keys and values `(R, 3 C)`, (group, boxes) they are -> `(R, C)`."""
        groups = self.plan.groups
        found = []
        for rows, (number, boxes) in zip(qkv.split([n * groups[g].tokens for g, n in parts]), parts, strict=True):
            q, k, v = rows.view(boxes, groups[number].tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
            found.append(attend(q, k, v, biases[number]).flatten(0, 1))
        return torch.cat(found) if len(found) > 1 else found[0]


class Block(nn.Module):
    """Window attention and perceptron, each with a residual path."""

    def __init__(self, dim: int, heads: int, limit: Triple, plan: WindowPlan, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, heads, limit, plan)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Perceptron(dim, 4 * dim, dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, grid: Tensor) -> Tensor:
        """Args: grid `(B, T, H, W, C)`. Returns: the same size."""
        x = grid.flatten(1, 3)
        own = type(self.attn) is WindowAttention and not hooked(self.attn) and untouched(self.attn.proj, self.drop_path)
        x = joined(x, self.drop_path(self.attn(*ahead(self.norm1, x))), own)
        return perceive(self.norm2, self.mlp, x, self.drop_path).view_as(grid)


class PatchEmbedding(nn.Conv3d):
    """A convolution whose patches do not overlap, which makes it one linear layer of the pixels of each."""

    def forward(self, input: Tensor) -> Tensor:
        """Args: clip `(B, 3, T, H, W)`. Returns: `(B, T', H', W', C)`."""
        (t, h, w), (batch, colours, *size) = self.kernel_size, input.shape
        x = input.view(batch, colours, size[0] // t, t, size[1] // h, h, size[2] // w, w)
        x = x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4)
        return linear(x, self.weight.flatten(1), self.bias)


class PatchMerging(nn.Module):
    """Four neighbours in space become one token of twice the channels; odd sides are padded by zeros."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, grid: Tensor) -> Tensor:
        """Args: grid `(B, T, H, W, C)`. Returns: `(B, T, ceil(H/2), ceil(W/2), 2 C)`."""
        h, w = grid.shape[2:4]
        grid = F.pad(grid, (0, 0, 0, w % 2, 0, h % 2))
        # Down the columns first, as the weights expect.
        corners = [grid[:, :, top::2, left::2] for left, top in product((0, 1), (0, 1))]
        return self.reduction(self.norm(torch.cat(corners, -1)))


def _table_size(rows: int, wanted: tuple[int, ...], window: Sequence[int] | None) -> tuple[int, int, int] | None:
    """Offsets in time, height and width of a bias table, from its rows; None where they cannot be told.

    In this order: a table of the window it is known to be made for; one of the wanted offsets in space; a square table
    of one frame; one of the wanted offsets in time.
    """
    if window and math.prod(2 * n - 1 for n in window) == rows:
        return 2 * window[0] - 1, 2 * window[1] - 1, 2 * window[2] - 1
    frame = wanted[1] * wanted[2]
    if rows % frame == 0 and (rows // frame) % 2:
        return rows // frame, wanted[1], wanted[2]
    for time in (1, wanted[0]):
        side = math.isqrt(rows // time)
        if side * side * time == rows and side % 2:
            return time, side, side
    return None


def _stretched(table: Tensor, made: tuple[int, int, int], wanted: tuple[int, ...]) -> Tensor:
    """A bias table `(rows, D)` of `made` offsets in time, height and width, for `wanted` ones."""
    x = table.view(*made, -1).permute(0, 3, 1, 2)  # (T, D, H, W)
    if made[1:] != wanted[1:]:
        x = F.interpolate(x, wanted[1:], mode="bicubic")
    if made[0] != wanted[0]:
        x = F.interpolate(x.flatten(1).T[None], wanted[0], mode="linear")[0].T.view(wanted[0], *x.shape[1:])
    return x.permute(0, 2, 3, 1).flatten(0, 2)


class Stage(nn.Module):
    """Blocks of one width, and the merging after them; the last stage has none."""

    def __init__(self, blocks: Sequence[Block], merge: PatchMerging | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.merge = merge


class VideoSwin(Backbone):
    """Shifted-window transformer on video with selectors before any block.

    Blocks are counted through all stages, from 0. A slot before the first block of a stage acts on the merged grid.

    Args:
        frames: frames of a clip.
        size: height and width of a frame in pixels.
        dim: channels of the first stage.
        depths: blocks of each stage.
        heads: heads of each stage.
        window: largest attention window, in tokens; its bias tables are made for it.
        window_policy: `balanced` shares a grid out evenly among its windows, `official` pads it to whole windows of full
            size that see the padding; see `windows` and `window_plan`. None is `balanced`.
        drop_path: rate of the last block; grows linearly from 0.
        init_gain: the weights of a linear layer start with a deviation of init_gain / sqrt(its inputs); None is 0.02 for all, as
            in VideoSwin-B. In narrow models 0.02 leaves next to nothing of a signal.
        selection: slots and operator.
    """

    mean = (0.485, 0.456, 0.406)
    std = (0.229, 0.224, 0.225)
    patch = (2, 4, 4)

    def __init__(
        self,
        frames: int = 32,
        size: int | Sequence[int] = 224,
        dim: int = 128,
        depths: Sequence[int] = (2, 2, 18, 2),
        heads: Sequence[int] = (4, 8, 16, 32),
        window: Sequence[int] = (8, 7, 7),
        window_policy: str | None = None,
        drop_path: float = 0.0,
        init_gain: float | None = None,
        selection: SelectionSpec | None = None,
    ) -> None:
        super().__init__()
        self.window_policy = window_policy = window_policy or "balanced"
        if window_policy not in POLICIES:
            raise BackboneError(f"backbone.window_policy={window_policy!r}: allowed are {', '.join(POLICIES)}")
        height, width = (size, size) if isinstance(size, int) else size
        limit: Triple = (window[0], window[1], window[2])
        self.window = limit
        self.clip_size = (frames, height, width)
        self.patch_embed = PatchEmbedding(3, dim, self.patch, self.patch)
        self.patch_norm = nn.LayerNorm(dim)
        t, h, w = (math.ceil(n / p) for n, p in zip(self.clip_size, self.patch, strict=True))
        grid: GridSize = (t, h, w)

        self.slots = SlotBank(selection or SelectionSpec())
        self.stages = nn.ModuleList()
        self.block_sizes = []
        plans: dict[tuple[GridSize, tuple[Triple, Triple]], WindowPlan] = {}
        total = sum(depths)
        for depth, stage_heads in zip(depths, heads, strict=True):
            blocks = []
            for i in range(depth):
                number = len(self.block_sizes)
                grid = self.slots.attach(number, grid, dim, "this backbone has no class token")
                self.block_sizes.append(grid)
                rate = drop_path * number / max(total - 1, 1)
                key = grid, windows(grid, limit, i % 2 == 1, window_policy)
                if key not in plans:
                    plans[key] = WindowPlan(grid, limit, i % 2 == 1, window_policy)
                blocks.append(Block(dim, stage_heads, limit, plans[key], rate))
            last = len(self.stages) == len(depths) - 1
            self.stages.append(Stage(blocks, None if last else PatchMerging(dim)))
            if not last:
                grid, dim = (grid[0], math.ceil(grid[1] / 2), math.ceil(grid[2] / 2)), 2 * dim
        self.slots.check_all_attached(total)
        self.norm = nn.LayerNorm(dim)
        self.out_dim = dim
        for module in () if self.norm.weight.is_meta else self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=init_gain / math.sqrt(module.in_features) if init_gain else 0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            if isinstance(module, WindowAttention):
                trunc_normal_(module.relative_position_bias_table, std=0.02)

    def no_weight_decay(self) -> set[str]:
        """See `Backbone.no_weight_decay`."""
        return {name for name, _ in self.named_parameters() if name.endswith("relative_position_bias_table")}

    def choices(self) -> dict[str, str]:
        """See `Backbone.choices`."""
        return {"window_policy": self.window_policy}

    def fitted(self, name: str, weight: Tensor, made_for: Mapping[str, Any]) -> Tensor:
        """See `Backbone.fitted`.

        A 2-D patch embedding is spread evenly over the frames of a patch. A bias table is stretched to this model's
        offsets, bicubic in space and linear in time; a 2-D table is one of a single frame, the same at each offset in time.
        """
        if name == "patch_embed.weight" and weight.dim() == 4:
            return weight.unsqueeze(2).expand(-1, -1, self.patch[0], -1, -1) / self.patch[0]
        if name.endswith("relative_position_bias_table") and weight.dim() == 2:
            size = tuple(2 * n - 1 for n in self.window)
            made = _table_size(weight.shape[0], size, made_for.get("window"))
            return _stretched(weight.float(), made, size) if made else weight
        return weight

    def embed(self, clip: Tensor) -> Tensor:
        """Clip `(B, 3, T, H, W)` -> grid `(B, T/2, H/4, W/4, C)`; sides that are no multiple are padded by zeros."""
        t, h, w = (-n % p for n, p in zip(clip.shape[2:], self.patch, strict=True))
        if t or h or w:  # Padding by nothing would be a copy.
            clip = F.pad(clip, (0, w, 0, h, 0, t))
        return self.patch_norm(self.patch_embed(clip))

    def forward(self, clip: Tensor, kept: list[Selection] | None = None) -> Tensor:
        """Features of a clip.

        Args:
            clip: `(B, 3, T, H, W)`, normalised by `mean` and `std`.
            kept: where to append what each slot kept, if that is wanted.

        Returns:
            `(B, C)`, the mean of the last grid.

        Raises:
            ValueError: if the clip has another size than the backbone was built for.
        """
        if tuple(clip.shape[2:]) != self.clip_size:
            raise ValueError(f"clip of {tuple(clip.shape[2:])} frames x height x width: this backbone takes {self.clip_size}")
        grid = self.embed(clip)
        number = 0
        for stage in self.stages:
            assert isinstance(stage, Stage)
            for block in stage.blocks:
                grid = self.through(block, self.slots(number, grid, kept))
                number += 1
            if stage.merge is not None:
                grid = stage.merge(grid)
        return self.norm(grid).mean((1, 2, 3))


@register_backbone
def video_swin_b(**kwargs: Any) -> VideoSwin:
    """VideoSwin-B: 32x224x224, 88.0 M parameters, 282 GFLOPs a view without selection."""
    return VideoSwin(**{"dim": 128, "depths": (2, 2, 18, 2), "heads": (4, 8, 16, 32), **kwargs})


@register_backbone
def video_swin_s(**kwargs: Any) -> VideoSwin:
    """VideoSwin-S: 32x224x224, 49.8 M parameters."""
    return VideoSwin(**{"dim": 96, "depths": (2, 2, 18, 2), "heads": (3, 6, 12, 24), **kwargs})


@register_backbone
def video_swin_t(**kwargs: Any) -> VideoSwin:
    """VideoSwin-T: 32x224x224, 28.2 M parameters."""
    return VideoSwin(**{"dim": 96, "depths": (2, 2, 6, 2), "heads": (3, 6, 12, 24), **kwargs})


@register_backbone
def video_swin_tiny(**kwargs: Any) -> VideoSwin:
    """A small VideoSwin for quick work: 16x64x64, 6 blocks."""
    sizes = {"frames": 16, "size": 64, "dim": 32, "depths": (2, 2, 2), "heads": (1, 2, 4), "window": (4, 4, 4)}
    return VideoSwin(**{**sizes, "init_gain": 0.7, **kwargs})
