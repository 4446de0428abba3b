"""MViT-B16 (Fan et al., ICCV 2021) with places for token selection.

Letters: B clips, T frames, H W grid, C channels, D heads, N = T * H * W tokens. Blocks see `(B, 1 + N, C)`, the class
token before those of the grid; selectors see the grid alone, `(B, T, H, W, C)`. The file reads from the stem to the named
sizes at its end.
"""

# torch's own types have gaps.
# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers.drop import DropPath
from timm.layers.mlp import Mlp
from timm.layers.weight_init import trunc_normal_
from torch import Tensor, nn
from torch.nn import functional as F

from stts_lightning.backbones.registry import Backbone, clip_size, register_backbone, start_linear
from stts_lightning.selection.reducer import Record
from stts_lightning.selection.selector import GridSize
from stts_lightning.selection.slots import SlotBank
from stts_lightning.selection.spec import SelectionSpec

Triple = tuple[int, int, int]


def pooled(size: GridSize, stride: Triple) -> GridSize:
    """Size of a grid after a pooling with kernel 3 and padding 1: ceil(n / stride) along each side."""
    t, h, w = (math.ceil(n / s) for n, s in zip(size, stride, strict=True))
    return t, h, w


def class_attention(q: Tensor, k: Tensor, size: GridSize, key_size: GridSize) -> Tensor:
    """How much the class token attends to each token of the grid, averaged over heads.

    From queries `(B, D, 1 + N, C / D)` and keys `(B, D, 1 + M, C / D)`, the class token first, to `(B, T, H, W)`, detached. Keys
    are coarser than the grid: a token gets the weight of the key it lies in, or the mean of several.
    """
    weights = (q[:, :, :1] @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).float().softmax(-1).mean(1)[:, 0, 1:]
    return F.interpolate(weights.unflatten(1, key_size).detach(), size[1:], mode="area")  # Frames are never pooled.


def pooled_skip(x: Tensor, size: GridSize, stride: Triple) -> Tensor:
    """Max-pooling of a residual path: `(B, 1 + N, C)`, the class token first, of a grid of this size -> `(B, 1 + N', C)`."""
    if math.prod(stride) == 1:
        return x
    cls, frames = x[:, :1], x[:, 1:].unflatten(1, size).flatten(0, 1).permute(0, 3, 1, 2)  # (B T, C, H, W)
    frames = F.max_pool2d(frames, [s + 1 for s in stride[1:]], stride[1:], [(s + 1) // 2 for s in stride[1:]])
    return torch.cat((cls, frames.flatten(2).transpose(1, 2).unflatten(0, (-1, size[0])).flatten(1, 2)), dim=1)


def select(slots: SlotBank, block: int, x: Tensor, size: GridSize, kept: list[Record] | None, attention: Tensor | None) -> Tensor:
    """Slots before a block: `(B, 1 + N, C)`, the class token first, of a grid of this size -> the same of what is left."""
    cls, grid = x.split((1, x.shape[1] - 1), dim=1)
    grid = slots(block, grid.unflatten(1, size), kept, attention)
    return torch.cat((cls, grid.flatten(1, 3)), dim=1)


class Pool(nn.Module):
    """Pooling of attention heads: a strided depthwise 3x3x3 convolution of the grid, then LayerNorm (MViT, Sec. 3.1).

    The class token skips the convolution. All heads share one kernel.
    """

    def __init__(self, head_dim: int, stride: Triple, eps: float) -> None:
        super().__init__()
        self.conv = nn.Conv3d(head_dim, head_dim, 3, stride, padding=1, groups=head_dim, bias=False)
        self.norm = nn.LayerNorm(head_dim, eps=eps)

    def forward(self, x: Tensor, size: GridSize) -> Tensor:
        """Args: x `(B, D, 1 + N, C / D)`, the class token first; size of its grid. Returns: `(B, D, 1 + N', C / D)`."""
        cls, tokens = x[:, :, :1], x[:, :, 1:]
        grid = tokens.flatten(0, 1).transpose(1, 2).unflatten(2, size)  # (B D, C / D, T, H, W)
        tokens = self.conv(grid).flatten(2).transpose(1, 2).unflatten(0, x.shape[:2])
        return self.norm(torch.cat((cls, tokens), dim=2))


class PooledAttention(nn.Module):
    """Multi-head pooling attention: queries, keys and values are pooled before they meet (MViT, Sec. 3.1).

    Args:
        dim: channels.
        heads: attention heads.
        size: T, H and W of the grid.
        q_stride: stride of the queries' pooling; at a stride of 1 throughout they are not pooled.
        kv_stride: stride of the keys' and values' pooling.
        pool_eps: epsilon of the norms after pooling.
    """

    def __init__(self, dim: int, heads: int, size: GridSize, q_stride: Triple, kv_stride: Triple, pool_eps: float) -> None:
        super().__init__()
        self.heads, self.size, self.q_stride, self.kv_stride = heads, size, q_stride, kv_stride
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.pool_q = Pool(dim // heads, q_stride, pool_eps) if math.prod(q_stride) > 1 else None
        self.pool_k = Pool(dim // heads, kv_stride, pool_eps)
        self.pool_v = Pool(dim // heads, kv_stride, pool_eps)

    def forward(self, x: Tensor, need_weights: bool = False) -> tuple[Tensor, Tensor | None]:
        """Attend.

        Args:
            x: `(B, 1 + N, C)`, the class token first.
            need_weights: also return the class token's attention.

        Returns:
            `(B, 1 + N', C)`, the grid pooled by `q_stride`; and `class_attention` or None.
        """
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()  # each (B, D, 1 + N, C / D)
        if self.pool_q is not None:
            q = self.pool_q(q, self.size)
        k, v = self.pool_k(k, self.size), self.pool_v(v, self.size)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).flatten(2)), self.class_attention(q, k) if need_weights else None

    def class_attention(self, q: Tensor, k: Tensor) -> Tensor:
        """See the function: pooled queries `(B, D, 1 + N', C / D)` and keys `(B, D, 1 + M, C / D)` -> `(B, T', H', W')`."""
        return class_attention(q, k, pooled(self.size, self.q_stride), pooled(self.size, self.kv_stride))


class Block(nn.Module):
    """Pooling attention and MLP, each with a residual path; the MLP may change the number of channels.

    Attributes:
        out_size: T, H and W of the grid that comes out.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        heads: int,
        size: GridSize,
        q_stride: Triple,
        kv_stride: Triple,
        drop_path: float,
        pool_eps: float,
    ) -> None:
        super().__init__()
        self.out_size = pooled(size, q_stride)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = PooledAttention(dim, heads, size, q_stride, kv_stride, pool_eps)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim, out_dim)
        self.proj = nn.Linear(dim, out_dim) if out_dim != dim else nn.Identity()
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, need_weights: bool = False) -> tuple[Tensor, Tensor | None]:
        """Args: x `(B, 1 + N, C)`, the class token first. Returns: `(B, 1 + N', C')`; see `PooledAttention.forward`."""
        attended, weights = self.attn(self.norm1(x), need_weights)
        return self.feed_forward(self.pool_skip(x) + self.drop_path(attended)), weights

    def feed_forward(self, x: Tensor) -> Tensor:
        """The second half: `(B, 1 + N', C)` -> `(B, 1 + N', C')`."""
        normed = self.norm2(x)
        # Where the width changes, the residual path starts from the normed tokens, as in the published models.
        skip = x if isinstance(self.proj, nn.Identity) else self.proj(normed)
        return skip + self.drop_path(self.mlp(normed))

    def pool_skip(self, x: Tensor) -> Tensor:
        """Max-pooling of the residual path where queries are pooled: `(B, 1 + N, C)` -> `(B, 1 + N', C)`."""
        return pooled_skip(x, self.attn.size, self.attn.q_stride)


class MViT(Backbone):
    """Multiscale vision transformer with selectors before any block.

    The head count and the channels double, and the grid halves in height and width, at each block of `stages`.

    Args:
        frames: frames of a clip, a multiple of 2.
        size: height and width of a frame in pixels, multiples of 4.
        dim: channels after the stem.
        heads: heads of the first block.
        depth: number of blocks.
        stages: blocks that pool their queries by (1, 2, 2).
        kv_stride: spatial stride of keys and values at block 0; halves at each stage.
        drop_path: rate of the last block; grows linearly from 0.
        pool_norm_eps: of the norms after pooling; 1e-6 in torchvision and newer SlowFast, 1e-5 in the STTS release.
        init_gain: the weights of a linear layer start with a deviation of init_gain / sqrt(its inputs); None is 0.02 for all, as
            in MViT-B. In narrow models 0.02 leaves next to nothing of a signal.
        selection: slots and operator.
    """

    mean = (0.45, 0.45, 0.45)
    std = (0.225, 0.225, 0.225)

    def __init__(
        self,
        frames: int = 16,
        size: int | Sequence[int] = 224,
        dim: int = 96,
        heads: int = 1,
        depth: int = 16,
        stages: Sequence[int] = (1, 3, 14),
        kv_stride: int = 8,
        drop_path: float = 0.0,
        pool_norm_eps: float = 1e-6,
        init_gain: float | None = None,
        selection: SelectionSpec | None = None,
    ) -> None:
        super().__init__()
        frames, height, width = self.clip_size = clip_size(frames, size, 2, 4)
        self.patch_embed = nn.Conv3d(3, dim, (3, 7, 7), (2, 4, 4), (1, 3, 3))
        grid: GridSize = (frames // 2, height // 4, width // 4)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed_spatial = nn.Parameter(torch.zeros(1, grid[1] * grid[2], dim))
        self.pos_embed_temporal = nn.Parameter(torch.zeros(1, grid[0], dim))
        self.pos_embed_class = nn.Parameter(torch.zeros(1, 1, dim))

        self.slots = SlotBank(selection or SelectionSpec())
        self.blocks = nn.ModuleList()
        self.block_sizes: list[GridSize] = []
        """Size of the grid that reaches each block."""
        for i in range(depth):
            grid = self.slots.build_selectors(i, grid, dim, "" if i else "no self-attention is computed before block 0")
            self.block_sizes.append(grid)
            q_stride = (1, 2, 2) if i in stages else (1, 1, 1)
            if i in stages:
                heads, kv_stride = 2 * heads, max(kv_stride // 2, 1)
            out_dim = 2 * dim if i + 1 in stages else dim
            rate = drop_path * i / max(depth - 1, 1)
            block = Block(dim, out_dim, heads, grid, q_stride, (1, kv_stride, kv_stride), rate, pool_norm_eps)
            self.blocks.append(block)
            grid, dim = block.out_size, out_dim
        self.slots.check_all_built(depth)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.out_dim = dim
        self._init_weights(init_gain)

    def _init_weights(self, gain: float | None) -> None:
        if self.cls_token.is_meta:
            return
        for name in ("cls_token", "pos_embed_spatial", "pos_embed_temporal", "pos_embed_class"):
            trunc_normal_(getattr(self, name), std=0.02)
        for module in self.modules():
            start_linear(module, gain)

    def no_weight_decay(self) -> set[str]:
        """See `Backbone.no_weight_decay`."""
        return {"cls_token", "pos_embed_spatial", "pos_embed_temporal", "pos_embed_class"}

    def adapt_weight(self, name: str, weight: Tensor, made_for: Mapping[str, Any]) -> Tensor:
        """See `Backbone.adapt_weight`: positions `(1, N, C)` of another frame size (bicubic) or number of frames (linear)."""
        frames, *size = self.clip_size
        if name.startswith("pos_embed_") and weight.dim() == 2:  # torchvision's
            weight = weight.unsqueeze(0)
        if name == "pos_embed_temporal" and weight.dim() == 3:
            return F.interpolate(weight.transpose(1, 2).float(), frames // 2, mode="linear").transpose(1, 2)
        if name == "pos_embed_spatial" and weight.dim() == 3:
            stored = made_for.get("size", 4 * math.isqrt(weight.shape[1]))
            height, width = (stored, stored) if isinstance(stored, int) else stored
            if height * width == 16 * weight.shape[1]:
                grid = weight.float().transpose(1, 2).unflatten(2, (height // 4, width // 4))
                grid = F.interpolate(grid, [n // 4 for n in size], mode="bicubic")
                return grid.flatten(2).transpose(1, 2)
        return weight

    def embed(self, clip: Tensor, kept: list[Record] | None) -> Tensor:
        """Clip `(B, 3, T, H, W)` -> input of block 0, `(B, 1 + N, C)`: patches and positions, then the slots there."""
        grid = self.patch_embed(clip).permute(0, 2, 3, 4, 1)
        t, h, w = grid.shape[1:4]
        grid = grid + self.pos_embed_spatial.unflatten(1, (1, h, w)) + self.pos_embed_temporal.unflatten(1, (t, 1, 1))
        grid = self.slots(0, grid, kept)
        cls = (self.cls_token + self.pos_embed_class).expand(clip.shape[0], -1, -1)
        return torch.cat((cls, grid.flatten(1, 3)), dim=1)

    def forward(self, clip: Tensor, kept: list[Record] | None = None) -> Tensor:
        """Features of a clip.

        Args:
            clip: `(B, 3, T, H, W)`, normalised by `mean` and `std`.
            kept: where to append what each slot kept, if that is wanted.

        Returns:
            `(B, C)`, the class token after the last block.

        Raises:
            ValueError: if the clip has another size than the backbone was built for.
        """
        self.check_clip(clip)
        x, size, attention = self.embed(clip, kept), self.block_sizes[0], None
        for i, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            if i and i in self.slots.at_block:
                x = select(self.slots, i, x, size, kept, attention)
            x, attention = self.run(block, x, self.slots.wants_attention(i + 1))
            size = block.out_size
        return self.norm(x[:, 0])


@register_backbone
def mvit_b16(**kwargs: Any) -> MViT:
    """MViT-B, 16x4: 16x224x224, 36.6 M parameters, 70.8 GFLOPs a view without selection."""
    return MViT(**(dict[str, Any](frames=16, size=224, dim=96, heads=1, depth=16, stages=(1, 3, 14)) | kwargs))


@register_backbone
def mvit_tiny(**kwargs: Any) -> MViT:
    """A small MViT for quick work: 16x64x64, 6 blocks, 0.8 M parameters. Other clips of 8-16 frames at 64-112 px fit."""
    sizes = dict[str, Any](frames=16, size=64, dim=32, heads=1, depth=6, stages=(1, 3), kv_stride=4)
    return MViT(**(sizes | dict[str, Any](init_gain=0.7) | kwargs))
