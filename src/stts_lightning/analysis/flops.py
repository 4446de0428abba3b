"""GFLOPs as the field counts them: fvcore, one multiply-add is 1, fused attention included."""

import logging
import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from fvcore.nn import FlopCountAnalysis

from stts_lightning.classifier import VideoClassifier


def _attention(inputs: Sequence[Any], _: Sequence[Any]) -> int:
    """Two products of scaled-dot-product attention, which fvcore itself counts as 0."""
    q, k, v = (value.type().sizes() for value in inputs[:3])
    return math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1])


def count_gflops(model: VideoClassifier) -> float:
    """GFLOPs of one clip (one view) in evaluation, with hard selection and scorers.

    Counts convolutions, linear layers, attention products and LayerNorms; leaves out additions, softmax, GELU, pooling.
    """
    training = model.training
    model.eval()
    clip = torch.zeros(1, 3, *model.backbone.clip_size, device=model.mean.device)
    logging.getLogger("fvcore.nn.jit_analysis").setLevel(logging.ERROR)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Tracing warns of Python numbers; every shape here is fixed.
            analysis = FlopCountAnalysis(model, clip).set_op_handle("aten::scaled_dot_product_attention", _attention)
            analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
            return analysis.total() / 1e9
    finally:
        model.train(training)
