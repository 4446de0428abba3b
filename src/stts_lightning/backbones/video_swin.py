"""Video Swin (Liu et al., CVPR 2022) with places for token selection.

Letters: B clips, T frames, H W grid, C channels, D heads. A grid is `(B, T, H, W, C)`, and its W windows of N tokens are
`(B * W, N, C)`. The file reads from the windows and the stem to the named sizes at its end.
"""

# torch's own types have gaps.
# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import math
from collections.abc import Mapping, Sequence
from itertools import product
from types import MappingProxyType
from typing import Any

import torch
from timm.layers.drop import DropPath
from timm.layers.mlp import Mlp
from timm.layers.weight_init import trunc_normal_
from torch import Tensor, nn
from torch.nn import functional as F

from stts_lightning.backbones.registry import Backbone, BackboneError, clip_size, register_backbone, start_linear
from stts_lightning.selection.reducer import Record
from stts_lightning.selection.selector import GridSize
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


class WindowPlan(nn.Module):
    """How a grid of one size is cut into windows; shared by the blocks that cut it alike.

    Shifted windows are cut from a grid that is rolled by the shift, so that tokens from opposite ends of the grid meet in one
    window. Those must not attend to each other, nor to padding.

    Attributes:
        size: frames, height and width of the grid.
        padded_size: the same, rounded up to whole windows.
        window: size of a window.
        shift: where the second window starts; 0 without a shift.
        sees_padding: whether tokens attend to padding, as in the released code.
        regions: `(W, N)`, a number for each token of each window: tokens attend to those of the same number; None if all do.
        bias_index: `(N * N,)`, row of the bias table for each pair of a window's tokens.
    """

    regions: Tensor | None
    bias_index: Tensor

    def __init__(self, size: GridSize, limit: Triple, shifted: bool, policy: str) -> None:
        super().__init__()
        self.size, self.sees_padding = size, policy == "official"
        self.window, self.shift = windows(size, limit, shifted, policy)
        t, h, w = (math.ceil(n / m) * m for n, m in zip(size, self.window, strict=True))
        self.padded_size: GridSize = (t, h, w)
        with torch.device("cpu"):  # Also for a model on the meta device: whether there are regions depends on their values.
            regions, index = self._regions(), bias_index(self.window, limit, policy)
        target = torch.get_default_device()
        self.register_buffer("regions", None if regions is None else regions.to(target), persistent=False)
        self.register_buffer("bias_index", index.to(target), persistent=False)

    def _regions(self) -> Tensor | None:
        region = torch.zeros(self.padded_size, dtype=torch.int16)
        for axis, (n, padded, shift) in enumerate(zip(self.size, self.padded_size, self.shift, strict=True)):
            at = torch.arange(padded).view([-1 if axis == i else 1 for i in range(3)])
            rolled, padding = at < shift, (at >= n) & (not self.sees_padding)
            region = 4 * region + 2 * padding + 1 * rolled
        regions = partition(self.roll(region[None, ..., None]), self.window).squeeze(-1)
        return regions if (regions != regions[:, :1]).any() else None

    def roll(self, grid: Tensor, back: bool = False) -> Tensor:
        """Roll a padded grid `(B, T, H, W, C)` by the shift, so that the first shifted window starts at its corner; or back."""
        return grid.roll([s if back else -s for s in self.shift], (1, 2, 3)) if any(self.shift) else grid


def partition(grid: Tensor, window: Triple) -> Tensor:
    """Cut a grid `(B, T, H, W, C)`, whose sides are multiples of the window's, into windows `(B * W, N, C)`."""
    for axis, side in zip((1, 3, 5), window, strict=True):
        grid = grid.unflatten(axis, (-1, side))
    return grid.permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(4, 6).flatten(0, 3)


def join(rows: Tensor, window: Triple, size: GridSize) -> Tensor:
    """Put windows `(B * W, N, C)` together again to the grid `(B, T, H, W, C)` of this size."""
    counts = [n // m for n, m in zip(size, window, strict=True)]
    rows = rows.unflatten(0, (-1, *counts)).unflatten(4, window)
    return rows.permute(0, 1, 4, 2, 5, 3, 6, 7).flatten(5, 6).flatten(3, 4).flatten(1, 2)


def bias_index(window: Triple, table: Triple, policy: str) -> Tensor:
    """Row of the bias table for each pair of a window's tokens, `(N * N,)`.

    A table made for windows of size `table` has a row for every offset up to +-(table - 1). `official` cuts the index of
    the full window to N x N, which is wrong where a window is smaller than the table's in height or width.
    """
    shown = table if policy == "official" else window
    at = torch.stack(torch.meshgrid(*map(torch.arange, shown), indexing="ij")).flatten(1)
    offset = at[:, :, None] - at[:, None] + torch.tensor(table)[:, None, None] - 1
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
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, grid: Tensor) -> Tensor:
        """Args: grid `(B, T, H, W, C)`. Returns: the same size."""
        plan, (t, h, w) = self.plan, self.plan.size
        qkv = partition(plan.roll(self._pad(self.qkv(grid))), plan.window)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()  # each (B W, D, N, C / D)
        out = F.scaled_dot_product_attention(q, k, v, self.bias(grid.shape[0]).to(q.dtype))
        out = join(out.transpose(1, 2).flatten(2), plan.window, plan.padded_size)
        return self.proj(plan.roll(out, back=True)[:, :t, :h, :w])

    def relative_bias(self) -> Tensor:
        """The learned bias for each pair of a window's tokens, `(D, N, N)`, from the table."""
        n = math.prod(self.plan.window)
        # Contiguous: a GPU's fused attention takes no other layout.
        return self.relative_position_bias_table[self.plan.bias_index].view(n, n, -1).permute(2, 0, 1).contiguous()

    def bias(self, batch: int) -> Tensor:
        """What is added to the attention's logits: `(1, D, N, N)`, or `(B * W, D, N, N)` where some pairs are masked."""
        regions, bias = self.plan.regions, self.relative_bias().unsqueeze(0)
        if regions is None:
            return bias
        apart = regions[:, None, :, None] != regions[:, None, None]  # (W, 1, N, N)
        return bias.masked_fill(apart, -math.inf).repeat(batch, 1, 1, 1)

    def _pad(self, qkv: Tensor) -> Tensor:
        """Pad to whole windows. A padded token's q, k and v are the layer's bias, as if it were zeros that went through."""
        size, padded = self.plan.size, self.plan.padded_size
        if size == padded:
            return qkv
        for axis, (n, full) in enumerate(zip(size, padded, strict=True), start=1):
            ends = [*qkv.shape[:axis], full - n, *qkv.shape[axis + 1 :]]
            qkv = torch.cat((qkv, self.qkv.bias.to(qkv.dtype).expand(ends)), dim=axis)
        return qkv


class Block(nn.Module):
    """Window attention and MLP, each with a residual path."""

    def __init__(self, dim: int, heads: int, limit: Triple, plan: WindowPlan, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, heads, limit, plan)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, grid: Tensor) -> Tensor:
        """Args: grid `(B, T, H, W, C)`. Returns: the same size."""
        grid = grid + self.drop_path(self.attn(self.norm1(grid)))
        return grid + self.drop_path(self.mlp(self.norm2(grid)))


class PatchMerging(nn.Module):
    """Four neighbours in space become one token of twice the channels; odd sides are padded by zeros."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

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


def _stretched(table: Tensor, stored: tuple[int, int, int], wanted: tuple[int, ...]) -> Tensor:
    """A bias table `(rows, D)` of `stored` offsets in time, height and width, for `wanted` ones."""
    x = table.view(*stored, -1).permute(0, 3, 1, 2)  # (T, D, H, W)
    if stored[1:] != wanted[1:]:
        x = F.interpolate(x, wanted[1:], mode="bicubic")
    if stored[0] != wanted[0]:
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

    reading = MappingProxyType({"views": 4, "crops": 3, "stride": 2, "sampling": "parts", "short_side": "crop"})
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
        limit: Triple = (window[0], window[1], window[2])
        self.window = limit
        self.clip_size = clip_size(frames, size, 1, 1)
        self.patch_embed = nn.Conv3d(3, dim, self.patch, self.patch)
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
                grid = self.slots.build_selectors(number, grid, dim, "this backbone has no class token")
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
        self.slots.check_all_built(total)
        self.norm = nn.LayerNorm(dim)
        self.out_dim = dim
        for module in () if self.norm.weight.is_meta else self.modules():
            start_linear(module, init_gain)
            if isinstance(module, WindowAttention):
                trunc_normal_(module.relative_position_bias_table, std=0.02)

    def no_weight_decay(self) -> set[str]:
        """See `Backbone.no_weight_decay`."""
        return {name for name, _ in self.named_parameters() if name.endswith("relative_position_bias_table")}

    def variant(self) -> dict[str, str]:
        """See `Backbone.variant`."""
        return {"window_policy": self.window_policy}

    def adapt_weight(self, name: str, weight: Tensor, made_for: Mapping[str, Any]) -> Tensor:
        """See `Backbone.adapt_weight`.

        A 2-D patch embedding is spread evenly over the frames of a patch. A bias table is stretched to this model's
        offsets, bicubic in space and linear in time; a 2-D table is one of a single frame, the same at each offset in time.
        """
        if name == "patch_embed.weight" and weight.dim() == 4:
            return weight.unsqueeze(2).expand(-1, -1, self.patch[0], -1, -1) / self.patch[0]
        if name.endswith("relative_position_bias_table") and weight.dim() == 2:
            size = tuple(2 * n - 1 for n in self.window)
            stored = _table_size(weight.shape[0], size, made_for.get("window"))
            return _stretched(weight.float(), stored, size) if stored else weight
        return weight

    def embed(self, clip: Tensor) -> Tensor:
        """Clip `(B, 3, T, H, W)` -> grid `(B, T/2, H/4, W/4, C)`; sides that are no multiple are padded by zeros."""
        t, h, w = (-n % p for n, p in zip(clip.shape[2:], self.patch, strict=True))
        grid = self.patch_embed(F.pad(clip, (0, w, 0, h, 0, t)))
        return self.patch_norm(grid.permute(0, 2, 3, 4, 1))

    def forward(self, clip: Tensor, kept: list[Record] | None = None) -> Tensor:
        """Features of a clip.

        Args:
            clip: `(B, 3, T, H, W)`, normalised by `mean` and `std`.
            kept: where to append what each slot kept, if that is wanted.

        Returns:
            `(B, C)`, the mean of the last grid.

        Raises:
            ValueError: if the clip has another size than the backbone was built for.
        """
        self.check_clip(clip)
        grid = self.embed(clip)
        number = 0
        for stage in self.stages:
            assert isinstance(stage, Stage)
            for block in stage.blocks:
                grid = self.run(block, self.slots(number, grid, kept))
                number += 1
            if stage.merge is not None:
                grid = stage.merge(grid)
        return self.norm(grid).mean((1, 2, 3))


@register_backbone
def video_swin_b(**kwargs: Any) -> VideoSwin:
    """VideoSwin-B: 32x224x224, 88.0 M parameters, 282 GFLOPs a view without selection."""
    return VideoSwin(**(dict[str, Any](dim=128, depths=(2, 2, 18, 2), heads=(4, 8, 16, 32)) | kwargs))


@register_backbone
def video_swin_s(**kwargs: Any) -> VideoSwin:
    """VideoSwin-S: 32x224x224, 49.8 M parameters."""
    return VideoSwin(**(dict[str, Any](dim=96, depths=(2, 2, 18, 2), heads=(3, 6, 12, 24)) | kwargs))


@register_backbone
def video_swin_t(**kwargs: Any) -> VideoSwin:
    """VideoSwin-T: 32x224x224, 28.2 M parameters."""
    return VideoSwin(**(dict[str, Any](dim=96, depths=(2, 2, 6, 2), heads=(3, 6, 12, 24)) | kwargs))


@register_backbone
def video_swin_tiny(**kwargs: Any) -> VideoSwin:
    """A small VideoSwin for quick work: 16x64x64, 6 blocks."""
    sizes = dict[str, Any](frames=16, size=64, dim=32, depths=(2, 2, 2), heads=(1, 2, 4), window=(4, 4, 4))
    return VideoSwin(**(sizes | dict[str, Any](init_gain=1.0) | kwargs))
