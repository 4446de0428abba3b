"""An MViT block on a CUDA GPU: as it is written, with its heads pooled by one kernel each."""

from torch import Tensor
from torch.nn import functional as F

from stts_lightning.backbones import mvit
from stts_lightning.kernels.cuda.pool import pool
from stts_lightning.selection.selector import GridSize


def block(module: mvit.Block, x: Tensor, need_weights: bool = False) -> tuple[Tensor, Tensor | None]:
    """See `mvit.Block.forward`: x `(B, 1 + N, C)`, the class token first."""
    attn = module.attn
    qkv = attn.qkv(module.norm1(x))
    q, k, v = qkv.unflatten(-1, (3, attn.heads, -1)).unbind(2)  # each (B, 1 + N, D, C / D)
    q = q if attn.pool_q is None else _pool(attn.pool_q, q, attn.size)
    k, v = _pool(attn.pool_k, k, attn.size), _pool(attn.pool_v, v, attn.size)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    attended = attn.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    x = module.pool_skip(x) + module.drop_path(attended)
    return module.feed_forward(x), attn.class_attention(q, k) if need_weights else None


def _pool(module: mvit.Pool, x: Tensor, size: GridSize) -> Tensor:
    stride: GridSize = module.conv.stride  # type: ignore[assignment]
    return pool(x, module.conv.weight, module.norm.weight, module.norm.bias, size, stride, module.norm.eps)
