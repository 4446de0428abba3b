"""MViTv2 (Li et al., CVPR 2022) with places for token selection.

Letters: B clips, T frames, H W grid, C channels, D heads, N = T * H * W tokens. Blocks see `(B, 1 + N, C)`, the class token
before those of the grid; selectors see the grid alone, `(B, T, H, W, C)`. What is as in MViT comes from there.

Attention has learned tables of relative positions. What is selected keeps its place: dropped frames and moved windows change no
displacement between the tokens that are left. So every block knows the numbers of the frames, and the corners of the windows, on
the grid that the unpruned model would have there.
"""

# torch's own types have gaps.
# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers.drop import DropPath
from timm.layers.mlp import Mlp
from timm.layers.weight_init import trunc_normal_
from torch import Tensor, nn
from torch.nn import functional as F

from stts_lightning.backbones.mvit import Pool, Triple, class_attention, pooled, pooled_skip, select
from stts_lightning.backbones.registry import Backbone, BackboneError, clip_size, register_backbone, start_linear
from stts_lightning.selection.reducer import Record
from stts_lightning.selection.selector import GridSize, Selection
from stts_lightning.selection.slots import SlotBank
from stts_lightning.selection.spec import SelectionSpec

DISPLACEMENTS = ("picture", "window")
"""Ways to count displacements between windows of different frames."""


@dataclass(frozen=True)
class Places:
    """Where the tokens of a grid lie on the grid that the unpruned model would have.

    Attributes:
        frames: number of each frame, `(B, T)`; None where all are there.
        corners: row and column of the first token of each frame's window, `(B, T, 2)` float; None where frames are whole.
    """

    frames: Tensor | None = None
    corners: Tensor | None = None

    def after(self, selection: Selection) -> "Places":
        """What a slot leaves."""
        if selection.windows is not None:
            moved = selection.windows[..., :2].float()
            return Places(self.frames, moved if self.corners is None else self.corners + moved)
        kept = selection.indices
        frames = kept if self.frames is None else self.frames.gather(1, kept)
        corners = None if self.corners is None else self.corners.gather(1, kept.unsqueeze(-1).expand(-1, -1, 2))
        return Places(frames, corners)

    def after_pooling(self, stride: int) -> "Places":
        """On a grid that is coarser by a stride. Corners may fall between two places of it."""
        return self if self.corners is None or stride == 1 else Places(self.frames, self.corners / stride)


def rows_at(projected: Tensor, index: Tensor) -> Tensor:
    """Values at rows that may lie between two, `(..., L)` and `(..., K)` -> `(..., K)`: linear, and held at both ends."""
    index = index.clamp(0, projected.shape[-1] - 1)
    below = index.floor()
    above = (below + 1).clamp(max=projected.shape[-1] - 1)
    low, high = (projected.gather(-1, rows.long()) for rows in (below, above))
    return torch.lerp(low, high, (index - below).to(low.dtype))


class RelativeAttention(nn.Module):
    """Multi-head pooling attention with decomposed relative positions and a residual path for the queries (MViTv2, Sec. 3.1).

    Args:
        dim: channels that come in.
        out_dim: channels that go out.
        heads: attention heads.
        size: T, H and W of the grid.
        full: the same of the unpruned model.
        q_stride: stride of the queries' pooling.
        kv_stride: stride of the keys' and values' pooling.
        displacements: see `MViTv2`.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        heads: int,
        size: GridSize,
        full: GridSize,
        q_stride: Triple,
        kv_stride: Triple,
        displacements: str,
    ) -> None:
        super().__init__()
        self.heads, self.size, self.full, self.q_stride, self.kv_stride = heads, size, full, q_stride, kv_stride
        self.displacements = displacements
        self.qkv = nn.Linear(dim, 3 * out_dim)
        self.proj = nn.Linear(out_dim, out_dim)
        self.pool_q = Pool(out_dim // heads, q_stride, 1e-6)
        self.pool_k = Pool(out_dim // heads, kv_stride, 1e-6)
        self.pool_v = Pool(out_dim // heads, kv_stride, 1e-6)
        _, *queries = pooled(full, q_stride)
        _, *keys = pooled(full, kv_stride)
        rows = [2 * full[0] - 1, *(2 * max(q, k) - 1 for q, k in zip(queries, keys, strict=True))]
        self.rel_pos_t, self.rel_pos_h, self.rel_pos_w = (nn.Parameter(torch.zeros(n, out_dim // heads)) for n in rows)
        # Within a window displacements are always the same, and in time where no frames were dropped.
        at = torch.arange(size[0], device="cpu")
        index = (at[:, None] - at + full[0] - 1).to(self.rel_pos_t.device)
        self.register_buffer("index_t", index, persistent=False)
        self.index_t: Tensor
        for axis, name in enumerate("hw"):
            index = self._displacements(axis)
            whole = index.clamp(0, rows[axis + 1] - 1).floor().long()
            for key, values in (("index", index), ("row", whole), ("next", (whole + 1).clamp(max=rows[axis + 1] - 1))):
                self.register_buffer(f"{key}_{name}", values.to(self.rel_pos_h.device), persistent=False)
        self.index_h: Tensor
        """Row of the table for each query and key, `(h, k)`; may lie between two, `row_h` and `next_h`."""
        self.index_w: Tensor
        self.between = tuple(bool((self._displacements(axis) % 1).any()) for axis in (0, 1))
        """Whether any does, along rows and along columns."""

    def _displacements(self, axis: int) -> Tensor:
        """Row of the table for each query and key along rows (0) or columns (1), `(h or w, k)` float."""
        s_q, s_k = self.q_stride[axis + 1], self.kv_stride[axis + 1]
        queries, keys = (pooled(self.size, stride)[axis + 1] for stride in (self.q_stride, self.kv_stride))
        full_q, full_k = (pooled(self.full, stride)[axis + 1] for stride in (self.q_stride, self.kv_stride))
        # Row of displacement 0: a key stands where its pooling is centred.
        zero = (full_k - 1) * max(full_q / full_k, 1)
        at_q, at_k = (torch.arange(n, device="cpu") * s for n, s in ((queries, s_q), (keys, s_k)))
        return (at_q[:, None] - at_k) / min(s_q, s_k) + zero

    def forward(self, x: Tensor, places: Places, need_weights: bool = False) -> tuple[Tensor, Tensor | None]:
        """Attend.

        Args:
            x: `(B, 1 + N, C)`, the class token first.
            places: of the grid.
            need_weights: also return the class token's attention.

        Returns:
            `(B, 1 + N', C')`, the grid pooled by `q_stride`; and `class_attention` or None.
        """
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()  # each (B, D, 1 + N, C / D)
        q, k, v = self.pool_q(q, self.size), self.pool_k(k, self.size), self.pool_v(v, self.size)
        out = F.scaled_dot_product_attention(q, k, v, F.pad(self.bias(q, places), (1, 0, 1, 0)))
        # The pooled queries are added to what they found; the class token's is not.
        out = torch.cat((out[:, :, :1], out[:, :, 1:] + q[:, :, 1:]), dim=2)
        weights = (
            class_attention(q, k, pooled(self.size, self.q_stride), pooled(self.size, self.kv_stride)) if need_weights else None
        )
        return self.proj(out.transpose(1, 2).flatten(2)), weights

    def bias(self, q: Tensor, places: Places) -> Tensor:
        """What relative positions add to the logits of the grid: pooled queries `(B, D, 1 + N', C / D)` -> `(B, D, N', M)`."""
        grid = q[:, :, 1:].unflatten(2, pooled(self.size, self.q_stride))  # (B, D, T, h, w, C / D)
        keys = pooled(self.size, self.kv_stride)
        time = self._over_time(grid, places)  # (B, D, T, h, w, T)
        rows, columns = (self._over_space(grid, places, axis) for axis in (0, 1))  # (B, D, T, h, w, T or 1, k)
        total = rows.unsqueeze(-1) + columns.unsqueeze(-2) + time[..., None, None]
        return total.expand(*total.shape[:5], *keys).flatten(5, 7).flatten(2, 4)

    def _over_time(self, grid: Tensor, places: Places) -> Tensor:
        """By displacement in time, `(B, D, T, h, w, T)`."""
        if places.frames is None:
            table = self.rel_pos_t[self.index_t]  # (T, T, C / D)
            return torch.einsum("bdthwc,tkc->bdthwk", grid, table.to(grid.dtype))
        table = self.rel_pos_t[places.frames[:, :, None] - places.frames[:, None] + self.full[0] - 1]
        return torch.einsum("bdthwc,btkc->bdthwk", grid, table.to(grid.dtype))

    def _over_space(self, grid: Tensor, places: Places, axis: int) -> Tensor:
        """By displacement along rows (0) or columns (1), `(B, D, T, h, w, 1, k)`, or one for each frame of the keys."""
        table, index = (self.rel_pos_h, self.rel_pos_w)[axis], (self.index_h, self.index_w)[axis]
        if places.corners is None or self.displacements == "window":
            name = "hw"[axis]
            row = self.get_buffer(f"row_{name}")
            along = table[row]
            if self.between[axis]:
                share = (index.clamp(0, len(table) - 1) - row).unsqueeze(-1).to(table.dtype)
                along = torch.lerp(along, table[self.get_buffer(f"next_{name}")], share)
            equation = ("bdthwc,hkc->bdthwk", "bdthwc,wkc->bdthwk")[axis]
            return torch.einsum(equation, grid, along.to(grid.dtype)).unsqueeze(-2)
        finer = min(self.q_stride[axis + 1], self.kv_stride[axis + 1])
        corner = places.corners[..., axis]
        between = (corner[:, :, None] - corner[:, None]) / finer  # (B, T of the query, T of the key)
        index = between[:, :, None, :, None] + index[:, None]  # (B, T, h or w, T, k)
        projected = grid @ table.T.to(grid.dtype)  # (B, D, T, h, w, rows of the table)
        index = index.unsqueeze(4 - axis - 1).unsqueeze(1)  # (B, 1, T, h or 1, 1 or w, T, k)
        return rows_at(projected, index.expand(*projected.shape[:5], *index.shape[5:]).flatten(5)).unflatten(5, index.shape[5:])


class Block(nn.Module):
    """Pooling attention, which may change the number of channels, and MLP, each with a residual path.

    Attributes:
        out_size: T, H and W of the grid that comes out.
        out_full: the same of the unpruned model.
    """

    def __init__(self, dim: int, attn: RelativeAttention, drop_path: float) -> None:
        super().__init__()
        out_dim = attn.proj.out_features
        self.out_size, self.out_full = pooled(attn.size, attn.q_stride), pooled(attn.full, attn.q_stride)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = attn
        self.norm2 = nn.LayerNorm(out_dim, eps=1e-6)
        self.mlp = Mlp(out_dim, 4 * out_dim)
        self.proj = nn.Linear(dim, out_dim) if out_dim != dim else nn.Identity()
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, places: Places, need_weights: bool = False) -> tuple[Tensor, Tensor | None]:
        """Args: x `(B, 1 + N, C)`, the class token first. Returns: `(B, 1 + N', C')`; see `RelativeAttention.forward`."""
        normed = self.norm1(x)
        attended, weights = self.attn(normed, places, need_weights)
        # Where the width changes, the residual path starts from the normed tokens.
        skip = x if isinstance(self.proj, nn.Identity) else self.proj(normed)
        x = pooled_skip(skip, self.attn.size, self.attn.q_stride) + self.drop_path(attended)
        return x + self.drop_path(self.mlp(self.norm2(x))), weights


class MViTv2(Backbone):
    """Improved multiscale vision transformer with selectors before any block.

    Args:
        frames: frames of a clip, a multiple of 2.
        size: height and width of a frame in pixels, multiples of 4.
        dim: channels after the stem.
        heads: heads of the first block; they double with the channels.
        depth: number of blocks.
        stages: blocks whose attention doubles the channels and pools its queries by (1, 2, 2).
        kv_stride: spatial stride of keys and values at block 0; halves at each stage.
        drop_path: rate of the last block; grows linearly from 0.
        displacements: between tokens of frames whose windows lie at different places: as in the "picture", which the
            tables were trained on; or "window", each counted from the corner of its own window, which costs less. In time, and
            within a frame, both are true.
        init_gain: as in `MViT`.
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
        displacements: str = "picture",
        init_gain: float | None = None,
        selection: SelectionSpec | None = None,
    ) -> None:
        super().__init__()
        if displacements not in DISPLACEMENTS:
            raise BackboneError(f"backbone.displacements={displacements!r}: allowed are {', '.join(DISPLACEMENTS)}")
        frames, height, width = self.clip_size = clip_size(frames, size, 2, 4)
        self.displacements = displacements
        self.patch_embed = nn.Conv3d(3, dim, (3, 7, 7), (2, 4, 4), (1, 3, 3))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        full: GridSize = (frames // 2, height // 4, width // 4)
        grid = full

        self.slots = SlotBank(selection or SelectionSpec())
        self.blocks = nn.ModuleList()
        self.block_sizes: list[GridSize] = []
        """Size of the grid that reaches each block."""
        for i in range(depth):
            grid = self.slots.build_selectors(i, grid, dim, "" if i else "no self-attention is computed before block 0")
            self.block_sizes.append(grid)
            q_stride, out_dim = ((1, 2, 2), 2 * dim) if i in stages else ((1, 1, 1), dim)
            if i in stages:
                heads, kv_stride = 2 * heads, max(kv_stride // 2, 1)
            attn = RelativeAttention(dim, out_dim, heads, grid, full, q_stride, (1, kv_stride, kv_stride), displacements)
            block = Block(dim, attn, drop_path * i / max(depth - 1, 1))
            self.blocks.append(block)
            grid, full, dim = block.out_size, block.out_full, out_dim
        self.slots.check_all_built(depth)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.out_dim = dim
        self._init_weights(init_gain)

    def _init_weights(self, gain: float | None) -> None:
        if self.cls_token.is_meta:
            return
        for name, table in self.named_parameters():
            if name == "cls_token" or ".rel_pos_" in name:
                trunc_normal_(table, std=0.02)
        for module in self.modules():
            start_linear(module, gain)

    def no_weight_decay(self) -> set[str]:
        """See `Backbone.no_weight_decay`: none. The published training decays the class token and the tables of positions."""
        return set()

    def variant(self) -> dict[str, str]:
        """See `Backbone.variant`."""
        return {"displacements": self.displacements}

    def adapt_weight(self, name: str, weight: Tensor, made_for: Mapping[str, Any]) -> Tensor:
        """See `Backbone.adapt_weight`: tables of positions of another clip size, resampled linearly as the official code does."""
        if ".rel_pos_" in name and weight.dim() == 2:
            rows = self.get_parameter(name).shape[0]
            return F.interpolate(weight.float().T[None], rows, mode="linear")[0].T
        return weight

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
        grid = self.patch_embed(clip).permute(0, 2, 3, 4, 1)
        x = torch.cat((self.cls_token.expand(clip.shape[0], -1, -1), grid.flatten(1, 3)), dim=1)
        size: GridSize = (grid.shape[1], grid.shape[2], grid.shape[3])
        places, attention = Places(), None
        for i, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            if i in self.slots.at_block:
                here: list[Record] = []
                x = select(self.slots, i, x, size, here, attention)
                for selection in here:
                    assert isinstance(selection, Selection)
                    places = places.after(selection)
                if kept is not None:
                    kept += here
            x, attention = self.run(block, x, places, self.slots.wants_attention(i + 1))
            size, places = block.out_size, places.after_pooling(block.attn.q_stride[1])
        return self.norm(x[:, 0])


@register_backbone
def mvit_v2_s(**kwargs: Any) -> MViTv2:
    """MViTv2-S, 16x4: 16x224x224, 34.5 M parameters, 64.5 GFLOPs a view without selection."""
    return MViTv2(**(dict[str, Any](depth=16, stages=(1, 3, 14)) | kwargs))


@register_backbone
def mvit_v2_b(**kwargs: Any) -> MViTv2:
    """MViTv2-B, 32x3: 32x224x224, 51.2 M parameters, 225.2 GFLOPs a view without selection."""
    model = MViTv2(**(dict[str, Any](frames=32, depth=24, stages=(2, 5, 21)) | kwargs))
    model.reading = {"stride": 3}
    return model


@register_backbone
def mvit_v2_tiny(**kwargs: Any) -> MViTv2:
    """A small MViTv2 for quick work: 16x64x64, 6 blocks, 0.8 M parameters."""
    sizes = dict[str, Any](frames=16, size=64, dim=32, heads=1, depth=6, stages=(1, 3), kv_stride=4)
    return MViTv2(**(sizes | dict[str, Any](init_gain=0.7) | kwargs))
