"""Video Swin (Liu et al., CVPR 2022) with places for token selection.

Letters: B clips, T frames, H W grid, C channels, D heads, W windows of N tokens. A grid is `(B, T, H, W, C)`. The file
reads from the stem to the named sizes at its end.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any

import torch
from timm.layers.drop import DropPath
from timm.layers.mlp import Mlp
from timm.layers.weight_init import trunc_normal_
from torch import Tensor, nn
from torch.nn import functional as F

from stts_lightning.backbones.registry import Backbone, BackboneError, register_backbone
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


@dataclass(frozen=True)
class WindowPlan:
    """How a grid falls into windows.

    Attributes:
        window: frames, height, width of a window.
        shift: by how much the grid is rolled before it is cut.
        padded: size of the grid, padded to whole windows.
        groups: numbers of the windows that share a mask.
        back: place of each window among the groups strung together.
        masks: a mask `(N, N)` a group, 0 or -100; None where every token may see every other.
    """

    window: Triple
    shift: Triple
    padded: GridSize
    groups: tuple[Tensor, ...]
    back: Tensor
    masks: tuple[Tensor | None, ...]


@lru_cache(maxsize=256)
@torch.inference_mode(False)  # Made in an evaluation, it serves training too.
def window_plan(size: GridSize, limit: Triple, shifted: bool, policy: str, device: torch.device) -> WindowPlan:
    """Windows and masks of a grid of a size; made once for each size and device.

    A shifted window holds tokens that were no neighbours before the roll: they do not see each other. Padding is seen
    by nobody, but for `official`, which shows it: what published checkpoints were tuned with.
    """
    window, shift = windows(size, limit, shifted, policy)
    padded = tuple(math.ceil(n / w) * w for n, w in zip(size, window, strict=True))
    axes = []
    for n, full, w, s in zip(size, padded, window, shift, strict=True):
        place = torch.arange(full)
        region = torch.where(place < full - w, 0, torch.where(place < full - s, 1, 2)) if s else torch.zeros_like(place)
        real = torch.ones(full, dtype=torch.bool) if policy == "official" else place.roll(-s) < n
        axes.append((region, real))
    (rt, et), (rh, eh), (rw, ew) = axes
    region = (rt[:, None, None] * 3 + rh[:, None]) * 3 + rw
    real = et[:, None, None] & eh[:, None] & ew
    regions, reals = (_cut(x[None, ..., None], window).squeeze(-1)[0] for x in (region, real))  # (W, N)
    hidden = (regions[:, :, None] != regions[:, None]) | ~reals[:, None]
    patterns, number = torch.unique(hidden.flatten(1), dim=0, return_inverse=True)
    groups = tuple((number == i).nonzero()[:, 0].to(device) for i in range(len(patterns)))
    side = hidden.shape[-1]
    masks = tuple(p.view(side, side).to(torch.float32).mul(-100).to(device) if bool(p.any()) else None for p in patterns)
    back = torch.cat(groups).argsort()
    return WindowPlan(window, shift, (padded[0], padded[1], padded[2]), groups, back, masks)


def _cut(grid: Tensor, window: Triple) -> Tensor:
    """Grid `(B, T, H, W, C)` of whole windows -> `(B, windows, N, C)`."""
    batch, *size, channels = grid.shape
    t, h, w = (n // m for n, m in zip(size, window, strict=True))
    x = grid.view(batch, t, window[0], h, window[1], w, window[2], channels)
    return x.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(batch, t * h * w, math.prod(window), channels)


def _join(x: Tensor, window: Triple, size: GridSize) -> Tensor:
    """Inverse of `_cut`: `(B, windows, N, C)` -> `(B, T, H, W, C)`."""
    t, h, w = (n // m for n, m in zip(size, window, strict=True))
    x = x.view(x.shape[0], t, h, w, *window, x.shape[-1])
    return x.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(x.shape[0], *size, x.shape[-1])


@lru_cache(maxsize=256)
@torch.inference_mode(False)  # Made in an evaluation, it serves training too.
def bias_index(window: Triple, table: Triple, policy: str, device: torch.device) -> Tensor:
    """Row of the bias table for each pair of a window's tokens, `(N * N,)`.

    A table made for windows of size `table` has a row for every offset up to +-(table - 1). `official` cuts the index of
    the full window to N x N, which is wrong where a window is smaller than the table's in height or width.
    """
    shown = table if policy == "official" else window
    at = torch.stack(torch.meshgrid(*(torch.arange(n) for n in shown), indexing="ij")).flatten(1)
    offset = at[:, :, None] - at[:, None] + torch.tensor(table).view(3, 1, 1) - 1
    index = (offset[0] * (2 * table[1] - 1) + offset[1]) * (2 * table[2] - 1) + offset[2]
    tokens = math.prod(window)
    return index[:tokens, :tokens].flatten().to(device)


class WindowAttention(nn.Module):
    """Multi-head attention in windows of the grid, with a learned bias for each offset between two tokens."""

    def __init__(self, dim: int, heads: int, window: Triple, shifted: bool, policy: str) -> None:
        super().__init__()
        self.heads, self.window, self.shifted, self.policy = heads, window, shifted, policy
        self.relative_position_bias_table = nn.Parameter(torch.zeros(math.prod(2 * n - 1 for n in window), heads))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, grid: Tensor) -> Tensor:
        """Args: grid `(B, T, H, W, C)`. Returns: the same size."""
        t, h, w = grid.shape[1:4]
        plan = window_plan((t, h, w), self.window, self.shifted, self.policy, grid.device)
        # The bias comes after the padding: a padded token is q, k, v = bias, as if it had gone through the layer.
        qkv = F.linear(grid, self.qkv.weight)
        ends = [n - m for n, m in zip(plan.padded, (t, h, w), strict=True)]
        if any(ends):
            qkv = F.pad(qkv, (0, 0, 0, ends[2], 0, ends[1], 0, ends[0]))
        qkv = qkv + self.qkv.bias.to(qkv.dtype)
        if any(plan.shift):
            qkv = qkv.roll([-s for s in plan.shift], (1, 2, 3))
        qkv = _cut(qkv, plan.window).unflatten(-1, (3, self.heads, -1)).permute(3, 0, 1, 4, 2, 5)  # (3, B, W, D, N, C/D)
        out = self._attend(qkv, plan).transpose(2, 3).flatten(3)  # (B, W, N, C)
        out = _join(out, plan.window, plan.padded)
        if any(plan.shift):
            out = out.roll(list(plan.shift), (1, 2, 3))
        return self.proj(out[:, :t, :h, :w])

    def _attend(self, qkv: Tensor, plan: WindowPlan) -> Tensor:
        """Attention of each window, a call for each group of windows that share a mask: `(B, W, D, N, C/D)`."""
        tokens = math.prod(plan.window)
        index = bias_index(plan.window, self.window, self.policy, qkv.device)
        bias = self.relative_position_bias_table[index].view(tokens, tokens, -1).permute(2, 0, 1).to(qkv.dtype)  # (D, N, N)
        if len(plan.groups) == 1:
            return self._sdpa(qkv, bias, plan.masks[0])
        parts = [self._sdpa(qkv[:, :, g], bias, mask) for g, mask in zip(plan.groups, plan.masks, strict=True)]
        return torch.cat(parts, 1)[:, plan.back]

    @staticmethod
    def _sdpa(qkv: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
        shape = qkv.shape[1:]
        q, k, v = qkv.flatten(1, 2).unbind(0)
        seen = bias if mask is None else bias + mask.to(bias.dtype)
        return F.scaled_dot_product_attention(q, k, v, seen.contiguous().unsqueeze(0)).view(shape)


class Block(nn.Module):
    """Window attention and perceptron, each with a residual path."""

    def __init__(self, dim: int, heads: int, window: Triple, shifted: bool, policy: str, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, heads, window, shifted, policy)
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
        init_std: standard deviation of linear layers at the start; narrow models need more than the 0.02 of VideoSwin-B.
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
        init_std: float = 0.02,
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
        self.patch_embed = nn.Conv3d(3, dim, self.patch, self.patch)
        self.patch_norm = nn.LayerNorm(dim)
        t, h, w = (math.ceil(n / p) for n, p in zip(self.clip_size, self.patch, strict=True))
        grid: GridSize = (t, h, w)

        self.slots = SlotBank(selection or SelectionSpec())
        self.stages = nn.ModuleList()
        self.block_sizes = []
        total = sum(depths)
        for depth, stage_heads in zip(depths, heads, strict=True):
            blocks = []
            for i in range(depth):
                number = len(self.block_sizes)
                grid = self.slots.attach(number, grid, dim, "this backbone has no class token")
                self.block_sizes.append(grid)
                rate = drop_path * number / max(total - 1, 1)
                blocks.append(Block(dim, stage_heads, limit, i % 2 == 1, window_policy, rate))
            last = len(self.stages) == len(depths) - 1
            self.stages.append(Stage(blocks, None if last else PatchMerging(dim)))
            if not last:
                grid, dim = (grid[0], math.ceil(grid[1] / 2), math.ceil(grid[2] / 2)), 2 * dim
        self.slots.check_all_attached(total)
        self.norm = nn.LayerNorm(dim)
        self.out_dim = dim
        for module in () if self.norm.weight.is_meta else self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=init_std)
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
        return self.patch_norm(self.patch_embed(F.pad(clip, (0, w, 0, h, 0, t))).permute(0, 2, 3, 4, 1))

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
                grid = block(self.slots(number, grid, kept))
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
    return VideoSwin(**{**sizes, "init_std": 0.1, **kwargs})
