"""Which random start new scorers begin from: of several, the one with which the model loses least."""

import logging
import math

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from stts_lightning.selection.scorer import Scorer
from stts_lightning.training.module import ClassificationModule
from stts_lightning.training.processes import gathered

log = logging.getLogger(__name__)


class StartSearch(pl.Callback):
    """Before the first step, draws the weights of new scorers several times, and keeps the draw with the lowest loss.

    The loss is the cross-entropy of the model that training starts from, with what the draw keeps in evaluation, on clips of the
    first steps. Such a model answers well where it sees the action: so the loss tells draws that keep it from those that drop it,
    before anything is learned. A model that has learned nothing, or whose head is new, cannot tell; the first draw is kept then.

    Args:
        draws: how many, the weights that the scorers have among them; 1: those are kept.
        clips: on which they are compared, of all processes together.
        seed: of the draws.
    """

    def __init__(self, draws: int = 1, clips: int = 64, seed: int = 0) -> None:
        self.draws, self.clips, self.seed = draws, clips, seed

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Search, unless the run was resumed: its scorers have begun."""
        assert isinstance(pl_module, ClassificationModule)
        scorers = new_scorers(pl_module)
        if self.draws == 1 or trainer.global_step or not scorers:
            return
        if why := pl_module.model.tells_nothing:
            log.info("callbacks.starts: the model cannot tell %d starts apart, as %s; the first is kept", self.draws, why)
            return
        first = [{name: value.clone() for name, value in scorer.state_dict().items()} for scorer in scorers]
        losses = self._losses(trainer, pl_module, scorers, first)
        best = min(range(self.draws), key=lambda draw: losses[draw])
        self._put(scorers, first, best)
        log.info(
            "new selectors: start %d of %d is the best, with a loss of %.2f (the first: %.2f, the worst: %.2f)",
            best + 1, self.draws, losses[best], losses[0], max(losses),
        )  # fmt: skip

    @torch.no_grad()
    def _losses(
        self, trainer: pl.Trainer, module: ClassificationModule, scorers: list[Scorer], first: list[dict[str, Tensor]]
    ) -> list[float]:
        """Mean loss of each draw over the clips of all processes; infinite where it is no number."""
        model, seen = module.model, 0
        training = {part: part.training for part in model.modules()}
        model.eval()
        sums = torch.zeros(self.draws, device=module.device)
        data = trainer.datamodule  # type: ignore[attr-defined]
        for batch in data.first_batches(self.clips):
            batch = trainer.strategy.batch_to_device(batch)
            for draw in range(self.draws):
                self._put(scorers, first, draw)
                module.tell_truth(batch, 1)
                model.slots.seed_noise(batch.draws or None)
                with trainer.precision_plugin.forward_context():
                    logits = model(batch.clip[:, 0])
                sums[draw] += cross_entropy(logits.float(), batch.label, reduction="sum")
            seen += len(batch.label)
        for part, was in training.items():
            part.training = was
        of_all = gathered(trainer, [*sums.tolist(), seen])
        *totals, count = (sum(of_each) for of_each in zip(*of_all, strict=True))
        return [loss / count if math.isfinite(loss) else math.inf for loss in totals]

    def _put(self, scorers: list[Scorer], first: list[dict[str, Tensor]], draw: int) -> None:
        """Give the scorers the weights of a draw; 0 are those that they had first. The same on all processes."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_000 + draw)
        for scorer, state in zip(scorers, first, strict=True):
            scorer.load_state_dict(state)
            if draw:
                scorer.redraw(generator)


def new_scorers(module: ClassificationModule) -> list[Scorer]:
    """Scorers that no checkpoint has given weights."""
    model = module.model
    named = ((name, part) for name, part in model.named_modules() if isinstance(part, Scorer))
    return [part for name, part in named if model.fresh is None or any(key.startswith(f"{name}.") for key in model.fresh)]
