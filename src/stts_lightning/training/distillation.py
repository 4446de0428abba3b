"""Learning from a trained model beside the labels."""

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from stts_lightning.classifier import VideoClassifier


class Teacher:
    """A trained model whose predictions another learns (Hinton et al. 2015; DynamicViT, Rao et al. 2021, for pruned tokens).

    No module: it is no part of the model that learns, nor of its checkpoints.

    Args:
        model: unpruned, for the same classes and clips.
        weight: of its part of the loss.
        temperature: both models' logits are divided by it.
    """

    def __init__(self, model: VideoClassifier, weight: float = 1.0, temperature: float = 1.0) -> None:
        self.model = model.eval().requires_grad_(False)
        self.weight, self.temperature = weight, temperature

    def loss(self, clip: Tensor, logits: Tensor) -> Tensor:
        """Kullback-Leibler divergence from its predictions to those of a batch, times `weight` and the squared temperature."""
        with torch.no_grad():
            target = self.model(clip) / self.temperature
        own = (logits / self.temperature).log_softmax(-1)
        divergence = kl_div(own, target.log_softmax(-1), reduction="batchmean", log_target=True)
        return divergence * (self.weight * self.temperature**2)
