"""An MViT block on a CPU."""

import torch
from torch import Tensor, nn

from stts_lightning.backbones import mvit
from stts_lightning.kernels.cpu.attention import attend
from stts_lightning.kernels.cpu.depthwise import depthwise
from stts_lightning.kernels.cpu.linear import linear, mlp_residual
from stts_lightning.selection.selector import GridSize


def block(module: mvit.Block, x: Tensor, need_weights: bool = False, class_only: bool = False) -> tuple[Tensor, Tensor | None]:
    """See `mvit.Block.forward`.

    Args:
        module: the block.
        x: `(B, 1 + N, C)`, the class token first.
        need_weights: also return the class token's attention.
        class_only: compute what becomes of the class token alone, if queries are not pooled: `(B, 1, C')` comes out.
    """
    attn = module.attn
    class_only = class_only and attn.pool_q is None
    q, k, v = linear(module.norm1(x), attn.qkv).chunk(3, dim=-1)
    q = _heads(q[:, :1] if class_only else q, attn.heads) if attn.pool_q is None else _pool(attn.pool_q, q, attn.size, attn.heads)
    k, v = _pool(attn.pool_k, k, attn.size, attn.heads), _pool(attn.pool_v, v, attn.size, attn.heads)
    attended = linear(attend(q, k, v), attn.proj)
    x = (x[:, :1] if class_only else module.pool_skip(x)) + module.drop_path(attended)
    skip_proj = module.proj if isinstance(module.proj, nn.Linear) else None
    out = mlp_residual(x, module.norm2, module.mlp, module.drop_path, skip_proj)
    return out, attn.class_attention(q, k) if need_weights else None


def _heads(x: Tensor, heads: int) -> Tensor:
    """`(B, N, C)` -> `(B, D, N, C / D)`."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _pool(pool: mvit.Pool, x: Tensor, size: GridSize, heads: int) -> Tensor:
    """Pooling of all heads by one convolution, of channels last: `(B, 1 + N, C)` -> `(B, D, 1 + N', C / D)`."""
    cls, tokens = x[:, :1], x[:, 1:]
    grid = tokens.unflatten(1, size).permute(0, 4, 1, 2, 3)
    stride: GridSize = pool.conv.stride  # type: ignore[assignment]
    grid = depthwise(grid, pool.conv.weight.repeat(heads, 1, 1, 1, 1), stride)
    return pool.norm(_heads(torch.cat((cls, grid.flatten(2).transpose(1, 2)), dim=1), heads))
