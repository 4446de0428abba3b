"""A VideoSwin block on a CUDA GPU: as it is written, with attention in windows by one kernel."""

from torch import Tensor

from stts_lightning.backbones import video_swin
from stts_lightning.kernels.cuda.window import window_attention


def block(module: video_swin.Block, grid: Tensor) -> Tensor:
    """See `video_swin.Block.forward`: grid `(B, T, H, W, C)`."""
    attn = module.attn
    qkv = attn.qkv(module.norm1(grid))
    bias = attn.relative_bias().to(qkv.dtype)
    attended = attn.proj(window_attention(qkv, bias, attn.plan))
    grid = grid + module.drop_path(attended)
    return grid + module.drop_path(module.mlp(module.norm2(grid)))
