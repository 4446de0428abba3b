"""What is measured beside ours: torchvision's models with the same weights, and the Top-K that holds every sample's indicator."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stts_lightning.analysis.speed import float32_products
from stts_lightning.backbones.checkpoints import load_checkpoint, recognised
from stts_lightning.backbones.registry import BackboneError
from stts_lightning.classifier import VideoClassifier, create_model
from stts_lightning.selection.noise import Noise
from stts_lightning.selection.spec import SelectionSpec
from stts_lightning.selection.topk import hard_topk

TORCHVISION = {"mvit_v1_b": "mvit_b16", "swin3d_b": "video_swin_b", "swin3d_s": "video_swin_s", "swin3d_t": "video_swin_t"}
"""Models of torchvision, and ours of the same weights."""


def torchvision_model(name: str, **backbone: Any) -> tuple[nn.Module, VideoClassifier]:
    """One of torchvision's models with weights drawn at random, and ours with the same weights.

    Raises:
        BackboneError: for a name that has no counterpart here.
    """
    if name not in TORCHVISION:
        raise BackboneError(f"torchvision:{name}: allowed are {', '.join(TORCHVISION)}")
    from torchvision.models import video

    theirs: nn.Module = getattr(video, name)(weights=None).eval()
    checkpoint = recognised(Path(f"torchvision's {name}"), theirs.state_dict())
    ours = create_model(TORCHVISION[name], None, 400, **{**checkpoint.backbone(), **backbone}).eval()
    load_checkpoint(ours, checkpoint, SelectionSpec())
    return theirs, ours


class OneHot:
    """The Top-K's estimate with every sample's indicator, `(B, S, K, N)`, made and kept for the backward pass."""

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def __call__(self, scores: Tensor, k: int, sigma: Tensor, noise: Noise) -> Tensor:
        """See `Estimator`."""
        drawn = noise.normal((scores.shape[0], self.samples, scores.shape[1]), scores.device)
        return _OneHotTopK.apply(scores, drawn, sigma, k)  # type: ignore[return-value]


class _OneHotTopK(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, noise: Tensor, sigma: Tensor, k: int) -> Tensor:
        indices = hard_topk(scores.unsqueeze(1) + sigma * noise, k)
        samples = F.one_hot(indices, scores.shape[1]).float()
        ctx.save_for_backward(samples, noise, sigma)
        return samples.mean(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        samples, noise, sigma = ctx.saved_tensors
        jacobian = torch.einsum("bskn,bsm->bknm", samples, noise) / (noise.shape[1] * sigma)
        return torch.einsum("bkn,bknm->bm", grads[0], jacobian), None, None, None


@torch.inference_mode()
def difference(one: Callable[[Tensor], Tensor], other: Callable[[Tensor], Tensor], clip: Tensor) -> float:
    """Largest difference of two models' logits of a clip, on the clip's device, in float32 without TF32."""
    with float32_products(tf32=False):
        return float((one(clip).float() - other(clip).float()).abs().max())


def relative_difference(outputs: Tensor, expected: Tensor) -> float:
    """Norm of the difference of outputs from those expected, as a share of their norm; NaN or infinite if an output is."""
    return float((outputs.float() - expected).norm() / expected.norm())
