"""Which random start new scorers begin from: of several, the one with which the model loses least."""

import logging
import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from stts_lightning.classifier import VideoClassifier
from stts_lightning.data.dataset import Batch
from stts_lightning.selection.scorer import Scorer
from stts_lightning.training.module import ClassificationModule
from stts_lightning.training.processes import gathered

log = logging.getLogger(__name__)


class Starts:
    """Random weights of a model's new scorers, by number: 0 are those that they have, others follow from the seed and the number.

    Args:
        model: where scorers that its checkpoint did not give weights are new.
        seed: of the draws.
    """

    def __init__(self, model: VideoClassifier, seed: int) -> None:
        named = ((name, part) for name, part in model.named_modules() if isinstance(part, Scorer))
        fresh = model.fresh
        self.scorers = [part for name, part in named if fresh is None or any(key.startswith(f"{name}.") for key in fresh)]
        self.model, self.seed = model, seed
        self._first = [{name: value.clone() for name, value in scorer.state_dict().items()} for scorer in self.scorers]

    def put(self, number: int) -> None:
        """Give the scorers the weights of a start, the same on every machine."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_000 + number)
        for scorer, first in zip(self.scorers, self._first, strict=True):
            scorer.load_state_dict(first)
            if number:
                scorer.redraw(generator)

    def keep_best(self, count: int, batches: Iterable[Batch]) -> None:
        """Give the scorers the start with the lowest loss; see `losses`."""
        if count > 1:
            self.put(int(self.losses(count, batches)[0].argmin()))

    @torch.no_grad()
    def losses(
        self, count: int, batches: Iterable[Batch], context: Callable[[], AbstractContextManager[None]] = nullcontext
    ) -> tuple[Tensor, int]:
        """How much the model loses with each of the first starts, and what that keeps in evaluation.

        Args:
            count: of starts.
            batches: of training, on the model's device.
            context: of a forward pass; says its precision.

        Returns:
            Cross-entropy of each start, summed over the clips, `(count,)` float32; and the number of clips.
        """
        model, clips = self.model, 0
        training = {part: part.training for part in model.modules()}
        model.eval()
        sums = torch.zeros(count, device=model.scale.device)
        for batch in batches:
            for number in range(count):
                self.put(number)
                model.slots.tell_truth(None if batch.truth is None else batch.truth[:, 0])
                model.slots.seed_noise(batch.draws or None)
                with context():
                    logits = model(batch.clip[:, 0])
                sums[number] += cross_entropy(logits.float(), batch.label, reduction="sum")
            clips += len(batch.label)
        for part, was in training.items():
            part.training = was
        return sums, clips


class StartSearch(pl.Callback):
    """Before the first step, draws the weights of new scorers several times, and keeps the draw with the lowest loss.

    The loss is the cross-entropy of the model that training starts from, with what the draw keeps in evaluation, on clips of the
    first steps. Such a model answers well where it sees the action: so the loss tells draws that keep it from those that drop it,
    before anything is learned. A model that has learned nothing, or whose head is new, cannot tell; the first draw is kept then.

    Args:
        draws: random starts that are compared, the scorers' own among them; 1: that one is kept.
        clips: on which they are compared, of all processes together.
        seed: of the draws.
    """

    def __init__(self, draws: int = 1, clips: int = 64, seed: int = 0) -> None:
        self.draws, self.clips, self.seed = draws, clips, seed

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Search, unless the run was resumed: its scorers have begun."""
        assert isinstance(pl_module, ClassificationModule)
        if self.draws == 1 or trainer.global_step:
            return
        starts = Starts(pl_module.model, self.seed)
        if not starts.scorers:
            return
        if why := pl_module.model.tells_nothing:
            log.info("callbacks.starts: the model cannot tell %d starts apart, as %s; the first is kept", self.draws, why)
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        batches = map(trainer.strategy.batch_to_device, data.first_batches(self.clips))
        sums, clips = starts.losses(self.draws, batches, trainer.precision_plugin.forward_context)
        # All processes add up the same numbers in the same order, and choose alike.
        *totals, count = map(sum, zip(*gathered(trainer, [*sums.tolist(), clips]), strict=True))
        losses = [loss / count if math.isfinite(loss) else math.inf for loss in totals]
        best = min(range(self.draws), key=lambda number: losses[number])
        starts.put(best)
        log.info(
            "new selectors: start %d of %d is the best, with a loss of %.2f (the first: %.2f, the worst: %.2f)",
            best + 1, self.draws, losses[best], losses[0], max(losses),
        )  # fmt: skip
