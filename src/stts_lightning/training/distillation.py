"""Learning from a trained model beside the labels."""

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from stts_lightning.classifier import VideoClassifier
from stts_lightning.errors import UserError


class Teacher:
    """A trained model whose predictions another learns (Hinton et al. 2015; DynamicViT, Rao et al. 2021, for pruned tokens).

    No module: it is no part of the model that learns, nor of its checkpoints.

    Args:
        model: unpruned, for the same classes and clips.
        weight: of its part of the loss.
        temperature: both models' logits are divided by it.
        tokens: weight of DynamicViT's loss on final tokens (its Eq. 11); 0 for none. For the reducer `dynamic_vit` alone, which
            keeps the place of each token in training.
    """

    def __init__(self, model: VideoClassifier, weight: float = 1.0, temperature: float = 1.0, tokens: float = 0.0) -> None:
        self.model = model.eval().requires_grad_(False)
        self.weight, self.temperature, self.tokens = weight, temperature, tokens
        self.model.slots.keeps_final = tokens > 0

    def teach(self, model: VideoClassifier) -> None:
        """Let a model leave what the losses need.

        Raises:
            UserError: for a loss on tokens of a model that removes them in training, or whose tokens are others.
        """
        if not self.tokens:
            return
        same = model.backbone.out_dim == self.model.backbone.out_dim and type(model.backbone) is type(self.model.backbone)
        if not model.slots.masks or not same:
            raise UserError(
                f"distill.tokens={self.tokens}: compares final tokens one by one; it needs the reducer dynamic_vit, and a "
                "teacher of the same backbone"
            )
        model.slots.keeps_final = True

    def loss(self, clip: Tensor, logits: Tensor, model: VideoClassifier | None = None) -> Tensor:
        """What is added to the loss of a batch, 0-d.

        The Kullback-Leibler divergence from its predictions, times `weight` and the squared temperature; and `tokens` times the
        mean squared difference of the final tokens that are kept from its own.

        Args:
            clip: of the batch, `(B, 3, T, H, W)`.
            logits: of the model that learns, `(B, classes)`.
            model: that model, after its pass; for the loss on tokens.
        """
        with torch.no_grad():
            target = self.model(clip) / self.temperature
        own = (logits / self.temperature).log_softmax(-1)
        divergence = kl_div(own, target.log_softmax(-1), reduction="batchmean", log_target=True)
        loss = divergence * (self.weight * self.temperature**2)
        if self.tokens and model is not None:
            kept, full = model.slots.take_final(), self.model.slots.take_final()
            assert kept.sizes is not None
            alive = (kept.sizes.detach() > 0.5).float()
            apart = (kept.x - full.x).float().square().mean(-1)
            loss = loss + self.tokens * (apart * alive).sum() / alive.sum().clamp_min(1)
        return loss
