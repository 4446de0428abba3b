"""Plain ViT for video, as in VideoMAE (Tong et al., NeurIPS 2022), with places for token selection and token reduction.

Letters: B clips, T frames, H W grid, C channels, D heads, N = T * H * W tokens in the order t, h, w. Blocks see `(B, N, C)`;
selectors see the grid, `(B, T, H, W, C)`; reducers leave none. There is no class token: the features are the mean of all tokens.
"""

# torch's own types have gaps.
# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import math
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from timm.layers.drop import DropPath
from timm.layers.mlp import Mlp
from timm.layers.weight_init import trunc_normal_
from torch import Tensor, nn
from torch.nn import functional as F

from stts_lightning.backbones.registry import Backbone, BackboneError, clip_size, register_backbone, start_linear
from stts_lightning.selection.reducer import Given, Record, Reducing, Reduction, Tokens
from stts_lightning.selection.selector import GridSize
from stts_lightning.selection.slots import SlotBank
from stts_lightning.selection.spec import SelectionSpec

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TUBELET = 2
"""Frames of a token."""


def sinusoid(tokens: int, dim: int) -> Tensor:
    """Positions of tokens by their number n, `(1, tokens, dim)`: sin and cos of n / 10000^(2 floor(j / 2) / dim) in channel j."""
    channel = torch.arange(dim, dtype=torch.float64, device="cpu")
    angle = torch.arange(tokens, dtype=torch.float64, device="cpu")[:, None] / 10000 ** (2 * (channel // 2) / dim)
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos()).float()[None]


def resampled(positions: Tensor, made_for: GridSize, size: GridSize) -> Tensor:
    """Positions `(1, N, C)` of one grid for another: bicubic in space, then linear in time, as in VideoMAE."""
    if made_for == size:
        return positions
    table = positions.float()[0].unflatten(0, made_for)
    if made_for[1:] != size[1:]:
        table = F.interpolate(table.permute(0, 3, 1, 2), size[1:], mode="bicubic").permute(0, 2, 3, 1)
    if made_for[0] != size[0]:
        table = F.interpolate(table.flatten(1).T[None], size[0], mode="linear")[0].T.unflatten(1, (*size[1:], -1))
    return table.flatten(0, 2)[None]


class Attention(nn.Module):
    """Multi-head self-attention among all tokens.

    Queries and values have a bias, keys have none: it would change nothing, as it moves all logits of a query alike.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, bias: Tensor | None = None, needs: Collection[str] = ()) -> tuple[Tensor, Given]:
        """Args: x `(B, N, C)`; see `Tokens.bias`; what of `Given` is wanted. Returns: `(B, N, C)`; and what is wanted."""
        own = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        q, k, v = F.linear(x, self.qkv.weight, own).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        out = F.scaled_dot_product_attention(q, k, v, bias)  # (B, D, N, C / D)
        given = Given(
            keys=k.mean(1).detach() if "keys" in needs else None, received=received(q, k) if "received" in needs else None
        )
        return self.proj(out.transpose(1, 2).flatten(2)), given


def received(q: Tensor, k: Tensor) -> Tensor:
    """Attention that each token receives, averaged over heads and queries: `(B, D, N, C / D)` twice -> `(B, N)`, detached."""
    q, k = q.detach(), k.detach()
    # A head at a time: all heads' weights would take D times N x N.
    heads = [(q[:, d] @ k[:, d].mT * q.shape[-1] ** -0.5).float().softmax(-1).mean(1) for d in range(q.shape[1])]
    return torch.stack(heads).mean(0)


class Block(nn.Module):
    """Attention and MLP, each normalised first and added to what came in."""

    def __init__(self, dim: int, heads: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)
        self.drop_path = DropPath(drop_path)

    def forward(
        self, x: Tensor, tokens: Tokens, bias: Tensor | None = None, reducing: Reducing | None = None, need_weights: bool = False
    ) -> tuple[Tokens, Tensor | None, Tensor | None]:
        """Attention, a reducer if there is one, and MLP.

        Args:
            x: `(B, N, C)`.
            tokens: x with sizes.
            bias: of the logits of attention.
            reducing: the reducer.
            need_weights: whether `received` is wanted.

        Returns:
            tokens, `(B, N', C)`; `received` or None; where the reducer has put each token (`Reduction.where`) or None.
        """
        needs = {*(reducing.needs if reducing else ()), *(["received"] if need_weights else ())}
        attended, given = self.attn(self.norm1(x), bias, needs)
        tokens, where = tokens._replace(x=x + self.drop_path(attended)), None
        if reducing is not None:
            tokens, where = reducing(tokens, given)
        return tokens._replace(x=tokens.x + self.drop_path(self.mlp(self.norm2(tokens.x)))), given.received, where


class ViT(Backbone):
    """Vision transformer over tubelets of two frames, with selectors before any block.

    Args:
        frames: frames of a clip, a multiple of 2.
        size: height and width of a frame in pixels, multiples of `patch`.
        patch: height and width of a token in pixels.
        dim: channels.
        depth: number of blocks.
        heads: attention heads.
        drop_path: rate of the last block; grows linearly from 0.
        positions: "sinusoid", fixed and in no file (VideoMAE), or "learned" (image ViTs).
        mean: of each channel of the pixels, on the scale 0 to 1; ImageNet's for VideoMAE, 0.5 for many ViTs of timm.
        std: of each channel, likewise.
        init_gain: as in `MViT`.
        selection: slots and operator.
    """

    reading = MappingProxyType({"views": 5, "crops": 3, "sampling": "videomae", "short_side": "crop"})
    made_for: GridSize = (8, 14, 14)
    """Grid whose numbers the fixed positions count (VideoMAE's 16 frames of 224 px); those of other grids are resampled."""

    def __init__(
        self,
        frames: int = 16,
        size: int | Sequence[int] = 224,
        patch: int = 16,
        dim: int = 768,
        depth: int = 12,
        heads: int = 12,
        drop_path: float = 0.0,
        positions: str = "sinusoid",
        mean: Sequence[float] = IMAGENET[0],
        std: Sequence[float] = IMAGENET[1],
        init_gain: float | None = None,
        selection: SelectionSpec | None = None,
    ) -> None:
        super().__init__()
        if positions not in ("sinusoid", "learned"):
            raise BackboneError(f"backbone.positions={positions!r}: allowed are sinusoid, learned")
        frames, height, width = self.clip_size = clip_size(frames, size, TUBELET, patch)
        self.mean, self.std = (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])
        self.patch_embed = nn.Conv3d(3, dim, (TUBELET, patch, patch), (TUBELET, patch, patch))
        self.grid: GridSize = (frames // TUBELET, height // patch, width // patch)
        self.pos_embed: Tensor
        if positions == "learned":
            self.pos_embed = nn.Parameter(torch.zeros(1, math.prod(self.grid), dim))
        else:
            table = resampled(sinusoid(math.prod(self.made_for), dim), self.made_for, self.grid)
            self.register_buffer("pos_embed", table.to(self.patch_embed.weight.device), persistent=False)

        self.slots = SlotBank(selection or SelectionSpec())
        self.blocks = nn.ModuleList()
        self.block_sizes: list[GridSize] = []
        """Size of the grid that reaches each block; after a reducer, of the one that its tokens were."""
        grid, tokens = self.grid, None
        for i in range(depth):
            grid = self.slots.build_selectors(i, grid, dim, "" if i else "no self-attention is computed before block 0")
            self.block_sizes.append(grid)
            tokens = math.prod(grid) if tokens is None or i in self.slots.at_block else tokens
            tokens = self.slots.build_reducer(i, tokens, grid, dim, self.clip_size, self.std)
            self.blocks.append(Block(dim, heads, drop_path * i / max(depth - 1, 1)))
        self.slots.check_all_built(depth)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.out_dim = dim
        self._init_weights(init_gain)

    def _init_weights(self, gain: float | None) -> None:
        if self.norm.weight.is_meta:
            return
        if isinstance(self.pos_embed, nn.Parameter):
            trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            start_linear(module, gain)

    def no_weight_decay(self) -> set[str]:
        """See `Backbone.no_weight_decay`."""
        return {"pos_embed"} if isinstance(self.pos_embed, nn.Parameter) else set()

    def adapt_weight(self, name: str, weight: Tensor, made_for: Mapping[str, Any]) -> Tensor:
        """See `Backbone.adapt_weight`: patches of an image ViT, and its learned positions or those of another clip size.

        An image's patches are spread over the two frames of a token, so that a still clip gives the image's features.
        """
        if name == "patch_embed.weight" and weight.dim() == 4:
            return weight.unsqueeze(2).expand(-1, -1, TUBELET, -1, -1) / TUBELET
        if name == "pos_embed" and weight.dim() == 3:
            frames, *size = (made_for.get(key) for key in ("frames", "size"))
            if frames and size[0]:
                patch = self.patch_embed.kernel_size[1]
                height, width = (size[0], size[0]) if isinstance(size[0], int) else size[0]
                return resampled(weight, (frames // TUBELET, height // patch, width // patch), self.grid)
            side = math.isqrt(weight.shape[1])
            if weight.shape[1] - side * side == 1:  # A class token's before those of a square picture.
                weight = weight[:, 1:]
            if side * side == weight.shape[1]:
                one = resampled(weight, (1, side, side), (1, *self.grid[1:]))
                return one.repeat(1, self.grid[0], 1)
        return weight

    def forward(self, clip: Tensor, kept: list[Record] | None = None) -> Tensor:
        """Features of a clip.

        Args:
            clip: `(B, 3, T, H, W)`, normalised by `mean` and `std`.
            kept: where to append what each slot did, if that is wanted.

        Returns:
            `(B, C)`, the mean of all tokens after the last block, normalised.

        Raises:
            ValueError: if the clip has another size than the backbone was built for.
        """
        self.check_clip(clip)
        x = self.patch_embed(clip).flatten(2).transpose(1, 2).contiguous()
        x = x + self.pos_embed.to(self.patch_embed.weight.dtype)  # Fixed positions are no weight, and may be wider.
        selection = self.slots.selection
        size, tokens, attention = self.grid, Tokens(x), None
        for i, block in enumerate(self.blocks):
            if i in self.slots.at_block:
                tokens = Tokens(self.slots(i, tokens.x.unflatten(1, size), kept, attention).flatten(1, 3))
                size = self.block_sizes[i]
            tokens = self.slots.reduce(i, tokens, clip, kept)
            bias, reducing = tokens.bias(selection.proportional_attention), self.slots.reducer(i)
            wanted = self.slots.wants_attention(i + 1)  # By a selector, which stands before all reducers: tokens are a grid.
            tokens, weights, where = self.run(block, tokens.x, tokens, bias, reducing, wanted)
            if kept is not None and reducing is not None:
                kept.append(Reduction(reducing.reducer.name, where))
            attention = weights.unflatten(1, size) if wanted and weights is not None else None
        if self.slots.keeps_final:
            self.slots.leave_final(tokens._replace(x=self.norm(tokens.x)))
        return self.norm(tokens.mean(selection.proportional_pooling))


@register_backbone
def vit_s(**kwargs: Any) -> ViT:
    """ViT-S of VideoMAE: 16x224x224, 22.0 M parameters, 57.0 GFLOPs a view without selection."""
    return ViT(**(dict[str, Any](dim=384, depth=12, heads=6) | kwargs))


@register_backbone
def vit_b(**kwargs: Any) -> ViT:
    """ViT-B of VideoMAE: 16x224x224, 86.5 M parameters, 180.5 GFLOPs a view without selection."""
    return ViT(**(dict[str, Any](dim=768, depth=12, heads=12) | kwargs))


@register_backbone
def vit_l(**kwargs: Any) -> ViT:
    """ViT-L of VideoMAE: 16x224x224, 304.3 M parameters, 597.2 GFLOPs a view without selection."""
    return ViT(**(dict[str, Any](dim=1024, depth=24, heads=16) | kwargs))


@register_backbone
def vit_tiny(**kwargs: Any) -> ViT:
    """A small ViT for quick work: 16x64x64, tokens of 8x8 pixels, 6 blocks, 0.5 M parameters."""
    return ViT(**(dict[str, Any](frames=16, size=64, patch=8, dim=96, depth=6, heads=3, init_gain=0.7) | kwargs))
