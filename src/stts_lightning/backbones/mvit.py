"""MViT-B16 (Fan et al., ICCV 2021) with places for token selection.

Letters: B clips, T frames, H W grid, C channels, D heads, N = T * H * W tokens. Blocks see `(B, 1 + N, C)`, the class
token before those of the grid; selectors see the grid alone, `(B, T, H, W, C)`. The file reads from the stem to the named
sizes at its end.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from timm.layers.drop import DropPath
from timm.layers.weight_init import trunc_normal_
from torch import Tensor, nn
from torch.nn import functional as F

from stts_lightning.backbones.registry import Backbone, BackboneError, register_backbone
from stts_lightning.layers.attention import attend
from stts_lightning.layers.depthwise import depthwise
from stts_lightning.layers.linear import Linear
from stts_lightning.layers.products import lean
from stts_lightning.layers.rowwise import (
    Look,
    Perceptron,
    ahead,
    hooked,
    joined,
    perceive,
    piecewise,
    project,
    untouched,
)
from stts_lightning.selection.selector import GridSize, Selection
from stts_lightning.selection.slots import SlotBank
from stts_lightning.selection.spec import SelectionSpec

Triple = tuple[int, int, int]


def pooled(size: GridSize, stride: Triple) -> GridSize:
    """Size of a grid after a pooling with kernel 3 and padding 1: ceil(n / stride) along each side."""
    t, h, w = (math.ceil(n / s) for n, s in zip(size, stride, strict=True))
    return t, h, w


class Pool(nn.Module):
    """Depthwise 3x3x3 convolution of each head's grid, the class token passing by, then LayerNorm over the head."""

    def __init__(self, head_dim: int, stride: Triple, eps: float) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv3d(head_dim, head_dim, 3, stride, padding=1, groups=head_dim, bias=False)
        self.norm = nn.LayerNorm(head_dim, eps=eps)

    def forward(self, x: Tensor, size: GridSize, heads: int, stride: Triple | None = None) -> Tensor:
        """Args: x `(B, 1 + N, C)`, the class token first; size of its grid; another stride. Returns: `(B, D, 1 + N', C/D)`."""
        stride = stride or self.stride
        # Heads share a kernel, so that all channels are one convolution, of the tokens as they lie.
        cls, grid = x.split((1, x.shape[1] - 1), dim=1)
        grid = grid.unflatten(1, size).permute(0, 4, 1, 2, 3)
        weight = torch.cat((self.conv.weight,) * heads)
        grid = depthwise(grid, weight, stride)
        x = torch.cat((cls, grid.flatten(2).transpose(1, 2)), dim=1)
        return self.norm(x.unflatten(-1, (heads, -1))).transpose(1, 2)


def read(n: int, stride: int) -> list[int]:
    """Which of n tokens in a row a pooling with kernel 3 reads: of each 8, at a stride of 8, the last and the first two."""
    return sorted({at + tap for at in range(0, n, stride) for tap in (-1, 0, 1) if 0 <= at + tap < n})


class PooledAttention(nn.Module):
    """Multi-head pooling attention: queries, keys and values are pooled before they meet (MViT, Sec. 3.1).

    Keys and values are worked out of those tokens alone that their pooling reads.

    Args:
        dim: channels.
        heads: of attention.
        size: T, H and W of the grid.
        q_stride: by which queries are pooled; they are left as they are if it is 1 throughout.
        kv_stride: by which keys and values are pooled.
        pool_eps: of the norms after pooling.
    """

    places: Tensor

    def __init__(self, dim: int, heads: int, size: GridSize, q_stride: Triple, kv_stride: Triple, pool_eps: float) -> None:
        super().__init__()
        self.heads, self.size = heads, size
        self.q_stride, self.kv_stride = q_stride, kv_stride
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)
        head_dim = dim // heads
        self.pool_q = Pool(head_dim, q_stride, pool_eps) if math.prod(q_stride) > 1 else None
        self.pool_k = Pool(head_dim, kv_stride, pool_eps)
        self.pool_v = Pool(head_dim, kv_stride, pool_eps)
        rows = [read(n, stride) for n, stride in zip(size, kv_stride, strict=True)]
        grid = np.arange(1, 1 + math.prod(size)).reshape(size)[np.ix_(*rows)]
        self.read_size: GridSize = (len(rows[0]), len(rows[1]), len(rows[2]))
        self.reads_all = grid.size == math.prod(size)
        self.register_buffer("places", torch.from_numpy(np.append(0, grid)), persistent=False)

    def forward(self, x: Tensor, norm: nn.Module, tell: bool = False, cls_only: bool = False) -> tuple[Tensor, Tensor | None]:
        """Attend.

        Args:
            x: `(B, 1 + N, C)`, the class token first.
            norm: of tokens, before all else; see `ahead`.
            tell: also return the class token's attention.
            cls_only: work out what becomes of the class token alone; not where queries are pooled.

        Returns:
            `(B, 1 + N', C)`, its grid pooled by `q_stride`; `(B, 1, C)` if `cls_only`. And, if `tell`, the class token's
            attention to each token of that grid, `(B, T', H', W')`: the mean over heads, of the pooled keys where the
            token lies (their mean, if queries are pooled more than keys).
        """
        if lean(x) and len(x) > 1:  # A clip's tokens lie close together; those of several clips would be copied.
            found, told = zip(*(self(clip, norm, tell, cls_only) for clip in x.split(1)), strict=True)
            return torch.cat(found), torch.cat(told) if tell else None
        q, k, v, read_size, stride = self._projected(x, norm, cls_only)
        k, v = self.pool_k(k, read_size, self.heads, stride), self.pool_v(v, read_size, self.heads, stride)
        q = self.pool_q(q, self.size, self.heads) if self.pool_q else q.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        out = attend(q, k, v)
        attention = None
        if tell:
            paid = (q[:, :, :1] @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).float().softmax(-1).mean(1)[:, 0, 1:]
            paid = paid.unflatten(1, pooled(self.size, self.kv_stride)).detach()
            attention = F.interpolate(paid.unsqueeze(1), pooled(self.size, self.q_stride), mode="area").squeeze(1)
        return piecewise(self.proj, out, out.shape[-1]), attention

    def _projected(self, x: Tensor, norm: nn.Module, cls_only: bool) -> tuple[Tensor, Tensor, Tensor, GridSize, Triple]:
        """Queries, and keys and values of what their pooling reads; the grid of these, and the stride there."""
        width = x.shape[-1]
        # Counted as published: a cost is that of all tokens.
        whole = self.reads_all or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
        looks: list[Look] = [(self.places[:1] if cls_only else None, (width,)), (None if whole else self.places, (width, width))]
        if whole and not cls_only:
            looks = [(None, (width, width, width))]
        q, k, v = project(norm, self.qkv, x, looks)
        if whole:
            return q, k, v, self.size, self.kv_stride
        # A kernel of 3 that moves on by more is, in the rows that it reads, one that moves on by 3.
        t, h, w = (min(stride, 3) for stride in self.kv_stride)
        return q, k, v, self.read_size, (t, h, w)


class Block(nn.Module):
    """Pooled attention and perceptron, each with a residual path; the perceptron may change the channels.

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
        self.mlp = Perceptron(dim, 4 * dim, out_dim)
        self.proj = Linear(dim, out_dim) if out_dim != dim else nn.Identity()
        self.drop_path = DropPath(drop_path)

    def _shortcut(self, x: Tensor) -> Tensor:
        stride = self.attn.q_stride
        if math.prod(stride) == 1:
            return x
        kernel = [s + 1 if s > 1 else 1 for s in stride]
        cls, grid = x.split((1, x.shape[1] - 1), dim=1)
        grid = grid.unflatten(1, self.attn.size).permute(0, 4, 1, 2, 3)
        grid = F.max_pool3d(grid, kernel, list(stride), [k // 2 for k in kernel])
        return torch.cat((cls, grid.flatten(2).transpose(1, 2)), dim=1)

    def forward(self, x: Tensor, tell: bool = False, cls_only: bool = False) -> tuple[Tensor, Tensor | None]:
        """Args: x `(B, 1 + N, C)`, the class token first. Returns: `(B, 1 + N', C')`, or `(B, 1, C')` if `cls_only`.

        And the attention of the class token, `(B, T', H', W')`, if `tell`.
        """
        attended, attention = self.attn(*ahead(self.norm1, x), tell, cls_only)
        beside = x[:, :1] if cls_only else self._shortcut(x)
        own = type(self.attn) is PooledAttention and not hooked(self.attn) and untouched(self.attn.proj, self.drop_path)
        x = joined(beside, self.drop_path(attended), own)
        past = None if isinstance(self.proj, nn.Identity) else self.proj
        return perceive(self.norm2, self.mlp, x, self.drop_path, past), attention

    def ends(self) -> bool:
        """Whether, as the last block, it may work out its class token alone: nobody would see the others."""
        if self.attn.pool_q is not None or torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
            return False  # Counted as published.
        layers = (self.norm1, self.norm2, self.drop_path, self.attn.proj, self.mlp)
        plain = untouched(*layers) and untouched(*self.mlp) and isinstance(self.proj, nn.Identity | Linear)
        return plain and not any(map(hooked, self.modules()))


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
        height, width = (size, size) if isinstance(size, int) else size
        if frames % 2 or height % 4 or width % 4:
            raise BackboneError(f"backbone: frames={frames} must be a multiple of 2, size={size} of 4")
        self.clip_size = (frames, height, width)
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
            grid = self.slots.attach(i, grid, dim, "" if i else "no self-attention is computed before block 0")
            self.block_sizes.append(grid)
            q_stride = (1, 2, 2) if i in stages else (1, 1, 1)
            if i in stages:
                heads, kv_stride = 2 * heads, max(kv_stride // 2, 1)
            out_dim = 2 * dim if i + 1 in stages else dim
            rate = drop_path * i / max(depth - 1, 1)
            block = Block(dim, out_dim, heads, grid, q_stride, (1, kv_stride, kv_stride), rate, pool_norm_eps)
            self.blocks.append(block)
            grid, dim = block.out_size, out_dim
        self.slots.check_all_attached(depth)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.out_dim = dim
        self._init_weights(init_gain)

    def _init_weights(self, gain: float | None) -> None:
        if self.cls_token.is_meta:
            return
        for name in ("cls_token", "pos_embed_spatial", "pos_embed_temporal", "pos_embed_class"):
            trunc_normal_(getattr(self, name), std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=gain / math.sqrt(module.in_features) if gain else 0.02)
                nn.init.zeros_(module.bias)

    def no_weight_decay(self) -> set[str]:
        """See `Backbone.no_weight_decay`."""
        return {"cls_token", "pos_embed_spatial", "pos_embed_temporal", "pos_embed_class"}

    def fitted(self, name: str, weight: Tensor, made_for: Mapping[str, Any]) -> Tensor:
        """See `Backbone.fitted`: positions `(1, N, C)` of another frame size (bicubic) or number of frames (linear)."""
        frames, *size = self.clip_size
        if name.startswith("pos_embed_") and weight.dim() == 2:  # torchvision's
            weight = weight.unsqueeze(0)
        if name == "pos_embed_temporal" and weight.dim() == 3:
            return F.interpolate(weight.transpose(1, 2).float(), frames // 2, mode="linear").transpose(1, 2)
        if name == "pos_embed_spatial" and weight.dim() == 3:
            made = made_for.get("size", 4 * math.isqrt(weight.shape[1]))
            height, width = (made, made) if isinstance(made, int) else made
            if height * width == 16 * weight.shape[1]:
                grid = weight.float().transpose(1, 2).unflatten(2, (height // 4, width // 4))
                grid = F.interpolate(grid, [n // 4 for n in size], mode="bicubic")
                return grid.flatten(2).transpose(1, 2)
        return weight

    def embed(self, clip: Tensor, kept: list[Selection] | None) -> Tensor:
        """Clip `(B, 3, T, H, W)` -> what reaches block 0, `(B, 1 + N, C)`: positions added, then the slots there."""
        space, time = self.pos_embed_spatial, self.pos_embed_temporal
        if clip.device.type == "cpu":  # The convolution takes half the time, and its grid comes as it is wanted.
            clip = clip.contiguous(memory_format=torch.channels_last_3d)
        grid = self.patch_embed(clip).permute(0, 2, 3, 4, 1).to(space.dtype)
        _, t, h, w, _ = grid.shape
        own = lean(grid) and type(self.patch_embed) is nn.Conv3d and not hooked(self.patch_embed)
        grid = grid.contiguous() if own else grid.clone(memory_format=torch.contiguous_format)
        grid = grid.add_(space.unflatten(1, (1, h, w))).add_(time.unflatten(1, (t, 1, 1)))
        grid = self.slots(0, grid, kept)
        cls = (self.cls_token + self.pos_embed_class).expand(clip.shape[0], -1, -1)
        return torch.cat((cls, grid.flatten(1, 3)), dim=1)

    def select(self, block: int, x: Tensor, size: GridSize, kept: list[Selection] | None, attention: Tensor | None) -> Tensor:
        """Slots before a block: `(B, 1 + N, C)`, of a grid of this size -> the same of `block_sizes`."""
        cls, grid = x.split((1, x.shape[1] - 1), dim=1)
        grid = self.slots(block, grid.unflatten(1, size), kept, attention)
        return torch.cat((cls, grid.flatten(1, 3)), dim=1)

    def forward(self, clip: Tensor, kept: list[Selection] | None = None) -> Tensor:
        """Features of a clip.

        Args:
            clip: `(B, 3, T, H, W)`, normalised by `mean` and `std`.
            kept: where to append what each slot kept, if that is wanted.

        Returns:
            `(B, C)`, the class token after the last block.

        Raises:
            ValueError: if the clip has another size than the backbone was built for.
        """
        if tuple(clip.shape[2:]) != self.clip_size:
            raise ValueError(f"clip of {tuple(clip.shape[2:])} frames x height x width: this backbone takes {self.clip_size}")
        x, size, attention = self.embed(clip, kept), self.block_sizes[0], None
        for i, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            if i and i in self.slots.at_block:
                x = self.select(i, x, size, kept, attention)
            cls_only = i + 1 == len(self.blocks) and block.ends()
            x, attention = self.through(block, x, self.slots.wants_attention(i + 1), cls_only)
            size = block.out_size
        return self.norm(x[:, 0])


@register_backbone
def mvit_b16(**kwargs: Any) -> MViT:
    """MViT-B, 16x4: 16x224x224, 36.6 M parameters, 70.8 GFLOPs a view without selection."""
    return MViT(**{"frames": 16, "size": 224, "dim": 96, "heads": 1, "depth": 16, "stages": (1, 3, 14), **kwargs})


@register_backbone
def mvit_tiny(**kwargs: Any) -> MViT:
    """A small MViT for quick work: 16x64x64, 6 blocks, 0.8 M parameters. Other clips of 8-16 frames at 64-112 px fit."""
    sizes = {"frames": 16, "size": 64, "dim": 32, "heads": 1, "depth": 6, "stages": (1, 3), "kv_stride": 4}
    return MViT(**{**sizes, "init_gain": 0.7, **kwargs})
