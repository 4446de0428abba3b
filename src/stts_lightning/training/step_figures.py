"""Figures of a training step: of all processes by the reduction that the gradients need anyway, on the host without a wait."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


class HostCopy:
    """A copy of a tensor on its way to the host. Read a step later, it has long arrived: nothing waits for the device.

    Args:
        tensor: of any device; may be changed as soon as this is built.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.late = tensor.is_cuda
        """Whether reading it at once would be a wait."""
        if self.late:
            # Only from pinned memory a copy does not hold up the host.
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()
        else:
            self._host = tensor.detach().cpu().clone()

    def read(self) -> Tensor:
        """The copy, in the host's memory."""
        if self.late:
            self._arrived.synchronize()
        return self._host


class StepFigures(nn.Module):
    """Averages figures of a step over its batches and over all processes, in the one reduction of the gradients.

    A parameter of zeros is multiplied with the figures and added to the loss: the loss stays as it is, and the parameter's
    gradient is the figures. DDP averages it with all others. The first figure is 1: whatever else gradients are multiplied by
    (a share of accumulated batches, float16's scale of the loss) it has too, and the others are divided by it.

    The parameter belongs to no optimiser, is never changed, and is no part of a checkpoint.
    """

    own: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.seat = nn.Parameter(torch.zeros(5))
        # 1, and this process's two flags. They change rarely: no copy to the device at each step.
        self.register_buffer("own", torch.tensor([1.0, 0.0, 0.0]), persistent=False)
        self._told = (False, False)

    def tell(self, asked: bool, due: bool) -> None:
        """Set this process's flags: whether it was asked to end, and whether a checkpoint is due."""
        if (asked, due) != self._told:
            self._told = asked, due
            for place, flag in enumerate(self._told, 1):
                self.own[place].fill_(float(flag))

    def carried_by(self, loss: Tensor, top1: Tensor | None = None) -> Tensor:
        """The loss of a batch, 0-d, which takes itself, the accuracy and the flags along in its backward pass."""
        figures = torch.stack([loss.detach(), loss.new_zeros(()) if top1 is None else top1]).float()
        return loss + (self.seat * torch.cat([self.own, figures])).sum()

    def take(self) -> Tensor:
        """Means since the last call, of all processes, `(4,)`: whether asked, whether due, loss, top-1. After the reduction."""
        found = self.seat.grad
        assert found is not None, "no backward pass since the last call"
        self.seat.grad = None
        return found[1:] / found[0]

    def _save_to_state_dict(self, *_: object, **__: object) -> None:
        """Nothing: a checkpoint holds a model, and can be loaded by those who have no such figures."""

    def _load_from_state_dict(self, *_: object, **__: object) -> None:
        """Nothing."""


@dataclass
class Known:
    """What the host knows of a step.

    Attributes:
        step: its number, from 0.
        asked, due: whether any process was asked to end, or says that a checkpoint is due.
        loss: mean of all processes.
        finite: whether its loss and gradients, and those of all steps before, were finite.
    """

    step: int = -1
    asked: bool = False
    due: bool = False
    loss: float = 0.0
    finite: bool = True


@dataclass
class StepRecord:
    """A step that the host has not looked at yet.

    Attributes:
        step: its number, from 0.
        figures: `StepFigures.take`, and 1 where the update was not finite: `(5,)`.
        batches: this process's loss, 0-d, and videos, `(B,)`, of each batch.
    """

    step: int
    figures: HostCopy
    batches: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def known(self) -> Known:
        """What it says, on the host."""
        asked, due, loss, spoilt = self.figures.read()[[0, 1, 2, 4]].tolist()
        return Known(self.step, asked > 0, due > 0, loss, not spoilt)
