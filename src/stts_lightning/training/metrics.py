"""Accuracies and loss of a validation.

torchmetrics' own pick rows by masks, for which the host waits for the device at each batch.
"""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torchmetrics import Metric


class Accuracy(Metric):
    """Share of clips whose class is among the k that are taken for likeliest.

    Args:
        k: how many.
    """

    full_state_update = False
    right: Tensor
    clips: Tensor

    def __init__(self, k: int = 1) -> None:
        super().__init__()
        self.k = k
        self.add_state("right", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("clips", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, logits: Tensor, label: Tensor, valid: Tensor) -> None:
        """Count clips: `(B, classes)`, `(B,)`, and whether each counts, `(B,)` bool."""
        found = (logits.topk(self.k).indices == label[:, None]).any(1)
        self.right += (found & valid).sum()
        self.clips += valid.sum()

    def compute(self) -> Tensor:
        """The share."""
        return self.right / self.clips


class Loss(Metric):
    """Mean cross-entropy of clips, without smoothing and weights: what accuracies are compared with."""

    full_state_update = False
    total: Tensor
    clips: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("clips", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, logits: Tensor, label: Tensor, valid: Tensor) -> None:
        """Add clips: `(B, classes)`, `(B,)`, and whether each counts, `(B,)` bool."""
        losses = cross_entropy(logits, label, reduction="none")
        self.total += torch.where(valid, losses, 0.0).sum()
        self.clips += valid.sum()

    def compute(self) -> Tensor:
        """The mean."""
        return self.total / self.clips


class MeanClassAccuracy(Metric):
    """Mean of the accuracies of the classes that occur.

    torchmetrics' own counts a class that was guessed but does not occur as one of accuracy 0.
    """

    full_state_update = False
    right: Tensor
    clips: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.add_state("right", torch.zeros(num_classes, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("clips", torch.zeros(num_classes, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, logits: Tensor, label: Tensor, valid: Tensor) -> None:
        """Count clips: `(B, classes)`, `(B,)`, and whether each counts, `(B,)` bool."""
        found = logits.argmax(-1) == label
        self.right.scatter_add_(0, label, (found & valid).long())
        self.clips.scatter_add_(0, label, valid.long())

    def compute(self) -> Tensor:
        """The mean."""
        occurs = self.clips > 0
        return (self.right / self.clips.clamp_min(1)).sum() / occurs.sum()
