"""MViT-B16 (Fan et al., ICCV 2021) with places for token selection.

Letters: B clips, T frames, H W grid, C channels, D heads, N = T * H * W tokens. A grid is `(B, T, H, W, C)`; the class
token `(B, 1, C)` travels beside it. The file reads from the stem to the named sizes at its end.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import torch
from timm.layers.drop import DropPath
from timm.layers.mlp import Mlp
from timm.layers.weight_init import trunc_normal_
from torch import Tensor, nn
from torch.amp import custom_bwd, custom_fwd
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from stts_lightning.backbones.registry import Backbone, BackboneError, register_backbone
from stts_lightning.selection.selector import GridSize, Selection
from stts_lightning.selection.slots import SlotBank
from stts_lightning.selection.spec import SelectionSpec

Triple = tuple[int, int, int]


def pooled(size: GridSize, stride: Triple) -> GridSize:
    """Size of a grid after a pooling with kernel 3 and padding 1: ceil(n / stride) along each side."""
    t, h, w = (math.ceil(n / s) for n, s in zip(size, stride, strict=True))
    return t, h, w


class _DepthwiseConv(torch.autograd.Function):
    """Depthwise 3x3x3 convolution whose backward pass suits a CPU, where the library's takes ten times its forward.

    The gradient of the input is again a depthwise convolution, that of the weight 27 products of shifted grids.
    """

    @staticmethod
    @custom_fwd(device_type="cpu")
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: Triple) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last_3d)
        ctx.save_for_backward(x, weight)
        ctx.stride = stride
        return F.conv3d(x, weight, None, stride, padding=1, groups=x.shape[1])

    @staticmethod
    @once_differentiable
    @custom_bwd(device_type="cpu")
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        grad = grads[0].contiguous(memory_format=torch.channels_last_3d)
        channels = x.shape[1]
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            spread = grad
            if math.prod(ctx.stride) > 1:
                spread = torch.zeros_like(x, dtype=grad.dtype)
                spread[(..., *(slice(None, None, s) for s in ctx.stride))] = grad
            grad_x = F.conv3d(spread, weight.flip(2, 3, 4), padding=1, groups=channels)
        if ctx.needs_input_grad[1]:
            padded = F.pad(x.permute(0, 2, 3, 4, 1), (0, 0, 1, 1, 1, 1, 1, 1))
            grad = grad.permute(0, 2, 3, 4, 1)  # (B, T', H', W', C)
            ends = [(n - 1) * s + 1 for n, s in zip(grad.shape[1:4], ctx.stride, strict=True)]
            taps = [
                padded[:, a : a + ends[0] : ctx.stride[0], b : b + ends[1] : ctx.stride[1], c : c + ends[2] : ctx.stride[2]]
                for a, b, c in product(range(3), repeat=3)
            ]
            grad_weight = torch.stack([torch.mul(tap, grad).flatten(0, 3).sum(0) for tap in taps], 1).view_as(weight)
        return grad_x, grad_weight, None


class Pool(nn.Module):
    """Depthwise 3x3x3 convolution of each head's grid, the class token passing by, then LayerNorm over the head."""

    def __init__(self, head_dim: int, stride: Triple, eps: float) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv3d(head_dim, head_dim, 3, stride, padding=1, groups=head_dim, bias=False)
        self.norm = nn.LayerNorm(head_dim, eps=eps)

    def forward(self, cls: Tensor, grid: Tensor) -> Tensor:
        """Args: cls `(B, D, 1, C/D)`, grid `(B, T, H, W, D, C/D)`. Returns: tokens `(B, D, 1 + N', C/D)`."""
        batch, _, _, _, heads, _ = grid.shape
        x = grid.permute(0, 4, 5, 1, 2, 3).flatten(0, 1)  # (B D, C/D, T, H, W)
        slow_backward = x.device.type == "cpu" and torch.is_grad_enabled()
        x = _DepthwiseConv.apply(x, self.conv.weight, self.stride) if slow_backward else self.conv(x)
        tokens = x.flatten(2).transpose(1, 2).unflatten(0, (batch, heads))
        return self.norm(torch.cat((cls, tokens), dim=2))


class PooledAttention(nn.Module):
    """Multi-head pooling attention: queries, keys and values are pooled before they meet (MViT, Sec. 3.1)."""

    def __init__(self, dim: int, heads: int, q_stride: Triple, kv_stride: Triple, pool_eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.q_stride, self.kv_stride = q_stride, kv_stride
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        head_dim = dim // heads
        self.pool_q = Pool(head_dim, q_stride, pool_eps) if math.prod(q_stride) > 1 else None
        self.pool_k = Pool(head_dim, kv_stride, pool_eps)
        self.pool_v = Pool(head_dim, kv_stride, pool_eps)

    def forward(self, cls: Tensor, grid: Tensor, tell: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
        """Args: cls `(B, 1, C)`, grid `(B, T, H, W, C)`. Returns: the same, the grid pooled by `q_stride`.

        And, if `tell`, the class token's attention to each token of the grid that comes out, `(B, T', H', W')`: the mean
        over heads, of the pooled keys where the token lies (their mean, if queries are pooled more than keys).
        """
        t, h, w = grid.shape[1:4]
        size: GridSize = (t, h, w)
        q_cls, k_cls, v_cls = self.qkv(cls).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        q_grid, k_grid, v_grid = self.qkv(grid).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        k = self.pool_k(k_cls, k_grid)
        v = self.pool_v(v_cls, v_grid)
        if self.pool_q is None:
            q = torch.cat((q_cls, q_grid.flatten(1, 3).transpose(1, 2)), dim=2)
        else:
            q = self.pool_q(q_cls, q_grid)
            size = pooled(size, self.q_stride)
        out = F.scaled_dot_product_attention(q, k, v)
        out = self.proj(out.transpose(1, 2).flatten(2))
        attention = None
        if tell:
            paid = (q[:, :, :1] @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).float().softmax(-1).mean(1)[:, 0, 1:]
            paid = paid.unflatten(1, pooled((t, h, w), self.kv_stride)).detach()
            attention = F.interpolate(paid.unsqueeze(1), size, mode="area").squeeze(1)
        return out[:, :1], out[:, 1:].unflatten(1, size), attention


class Block(nn.Module):
    """Pooled attention and perceptron, each with a residual path; the perceptron may change the channels."""

    def __init__(
        self, dim: int, out_dim: int, heads: int, q_stride: Triple, kv_stride: Triple, drop_path: float, pool_eps: float
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = PooledAttention(dim, heads, q_stride, kv_stride, pool_eps)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim, out_dim)
        self.proj = nn.Linear(dim, out_dim) if out_dim != dim else nn.Identity()
        self.drop_path = DropPath(drop_path)

    def _shortcut(self, grid: Tensor) -> Tensor:
        stride = self.attn.q_stride
        if math.prod(stride) == 1:
            return grid
        kernel = [s + 1 if s > 1 else 1 for s in stride]
        x = F.max_pool3d(grid.permute(0, 4, 1, 2, 3), kernel, list(stride), [k // 2 for k in kernel])
        return x.permute(0, 2, 3, 4, 1)

    def forward(self, cls: Tensor, grid: Tensor, tell: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
        """Args: cls `(B, 1, C)`, grid `(B, T, H, W, C)`. Returns: cls `(B, 1, C')`, grid `(B, T', H', W', C')`, attention.

        The attention of the class token, `(B, T', H', W')`, is there if `tell`.
        """
        attended_cls, attended, attention = self.attn(self.norm1(cls), self.norm1(grid), tell)
        size = attended.shape[1:4]
        # Class token and grid join for the row-wise rest, so that drop path drops a whole clip at once.
        x = torch.cat((cls, self._shortcut(grid).flatten(1, 3)), dim=1)
        x = x + self.drop_path(torch.cat((attended_cls, attended.flatten(1, 3)), dim=1))
        normed = self.norm2(x)
        shortcut = x if isinstance(self.proj, nn.Identity) else self.proj(normed)
        x = shortcut + self.drop_path(self.mlp(normed))
        return x[:, :1], x[:, 1:].unflatten(1, size), attention


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
        init_std: standard deviation of linear layers at the start; narrow models need more than the 0.02 of MViT-B.
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
        init_std: float = 0.02,
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
            self.blocks.append(Block(dim, out_dim, heads, q_stride, (1, kv_stride, kv_stride), rate, pool_norm_eps))
            grid, dim = pooled(grid, q_stride), out_dim
        self.slots.check_all_attached(depth)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.out_dim = dim
        self._init_weights(init_std)

    def _init_weights(self, std: float) -> None:
        if self.cls_token.is_meta:
            return
        for name in ("cls_token", "pos_embed_spatial", "pos_embed_temporal", "pos_embed_class"):
            trunc_normal_(getattr(self, name), std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=std)
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

    def embed(self, clip: Tensor) -> tuple[Tensor, Tensor]:
        """Clip `(B, 3, T, H, W)` -> class token `(B, 1, C)` and grid `(B, T/2, H/4, W/4, C)`, positions added."""
        grid = self.patch_embed(clip).permute(0, 2, 3, 4, 1)
        _, t, h, w, _ = grid.shape
        grid = grid + self.pos_embed_spatial.unflatten(1, (1, h, w)) + self.pos_embed_temporal.unflatten(1, (t, 1, 1))
        cls = (self.cls_token + self.pos_embed_class).expand(clip.shape[0], -1, -1)
        return cls, grid

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
        cls, grid = self.embed(clip)
        attention = None
        for i, block in enumerate(self.blocks):
            grid = self.slots(i, grid, kept, attention)
            cls, grid, attention = block(cls, grid, self.slots.wants_attention(i + 1))
        return self.norm(cls[:, 0])


@register_backbone
def mvit_b16(**kwargs: Any) -> MViT:
    """MViT-B, 16x4: 16x224x224, 36.6 M parameters, 70.8 GFLOPs a view without selection."""
    return MViT(**{"frames": 16, "size": 224, "dim": 96, "heads": 1, "depth": 16, "stages": (1, 3, 14), **kwargs})


@register_backbone
def mvit_tiny(**kwargs: Any) -> MViT:
    """A small MViT for quick work: 16x64x64, 6 blocks, 0.8 M parameters. Other clips of 8-16 frames at 64-112 px fit."""
    sizes = {"frames": 16, "size": 64, "dim": 32, "heads": 1, "depth": 6, "stages": (1, 3), "kv_stride": 4}
    return MViT(**{**sizes, "init_std": 0.1, **kwargs})
