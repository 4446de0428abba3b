"""Weights held in bfloat16 or float16 while a model is tested."""

from typing import Any

import torch
from lightning.pytorch.plugins.precision import Precision
from torch import nn

CAST_WEIGHTS = {"bf16-true": torch.bfloat16, "16-true": torch.float16}
"""Precisions of a trainer in which the weights themselves are cast."""


class CastWeights(Precision):
    """Casts a model's weights and none of its constants: Lightning's plugin of this name would round those too.

    Args:
        precision: a name of `CAST_WEIGHTS`.
    """

    def __init__(self, precision: str) -> None:
        self.precision: Any = precision
        self.dtype = CAST_WEIGHTS[precision]

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Cast the classifier in a `ClassificationModule`."""
        classifier: Any = module.model
        classifier.cast_weights(self.dtype)
        return module
