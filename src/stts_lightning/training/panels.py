"""What the selectors are doing while they learn: pictures of a few fixed clips, figures, and a warning when one has collapsed."""

import logging
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers import WandbLogger
from PIL import Image
from torch import Tensor

from stts_lightning.analysis.kept import shown_boxes, trace
from stts_lightning.analysis.overlay import contact_sheet
from stts_lightning.data.datamodule import VideoDataModule
from stts_lightning.selection.reducer import Record
from stts_lightning.selection.selector import GridSize, Selection, Selector
from stts_lightning.selection.truth import found
from stts_lightning.training.module import ClassificationModule
from stts_lightning.training.processes import gathered
from stts_lightning.training.step_figures import HostCopy

log = logging.getLogger(__name__)


def score_entropy(scores: Tensor) -> Tensor:
    """Entropy of scores `(..., N)` as shares of their sum, over log N: `(...)`; 1 where all are alike, 0 where one has all."""
    share = scores.float().clamp_min(0) + 1e-8
    share = share / share.sum(-1, keepdim=True)
    return -(share * share.log()).sum(-1) / np.log(max(scores.shape[-1], 2))


class SelectionPanels(pl.Callback):
    """Follows the selectors over the validation of each epoch.

    Figures, for each slot: `selection/<slot>/entropy` (see `score_entropy`), `.../changed` (share of the validation clips for
    which it chooses otherwise than at the validation before), `.../choices` (how many different choices it made, over the
    number of clips), `.../found` (where the data set says where the action is: the share of its frames, or of its area, that
    reached the slot and was kept), `.../softness` (mean over kept tokens of 1 - largest weight in the training's soft
    indicator). Over the model: `selection/gap`, half the summed difference between class probabilities with the training's
    soft selection and with the test's hard one, on the fixed clips: the train-test gap that sigma's decay closes (paper
    Sec. 3.2). Pictures go to `folder/epoch_<n>.png` and to W&B.

    Args:
        folder: of the pictures.
        every_n_epochs: of pictures and gap; the figures of a validation come with each.
        clips: how many of the validation videos are fixed, evenly over the list.
        collapsed_at: share of clips with one and the same choice from which a selector with scores of its own has collapsed.
    """

    def __init__(self, folder: str, every_n_epochs: int = 1, clips: int = 4, collapsed_at: float = 0.95) -> None:
        self.folder, self.every, self.clips, self.collapsed_at = Path(folder), every_n_epochs, clips, collapsed_at
        # A choice is kept as its hash: one of single tokens has thousands of numbers.
        self.before: dict[str, dict[int, int]] = {}
        self._reset()

    def _reset(self) -> None:
        self.choices: dict[str, dict[int, int]] = defaultdict(dict)
        self.examples: dict[int, list[int]] = {}
        self.entropies: dict[str, list[float]] = defaultdict(list)
        self.found: dict[str, list[float]] = defaultdict(list)
        self.unread: list[tuple[str, HostCopy, HostCopy, HostCopy, HostCopy | None, HostCopy | None]] = []
        """Of the latest batch, for each slot: videos, which are valid, choices, entropies, how much of the action was kept."""

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Note what was chosen for each video."""
        if trainer.sanity_checking:
            return
        kept: Mapping[str, Record] = outputs or {}
        while self.unread:
            self._note(*self.unread.pop())  # The batch before: its copies are on the host by now.
        videos, valid = HostCopy(batch.video), HostCopy(batch.valid)
        shares: dict[str, Tensor] = {}
        if batch.truth is not None and kept:
            shares = found(batch.truth[:, 0], list(kept.values()), pl_module.model.slots.sizes)
        for name, record in kept.items():
            share = HostCopy(shares[name]) if name in shares else None
            if isinstance(record, Selection):
                chosen = record.indices.flatten(1)
                entropy = HostCopy(score_entropy(record.scores).reshape(len(record.scores), -1).mean(1))
            else:
                chosen, entropy = record.where, None
            self.unread.append((name, videos, valid, HostCopy(chosen), entropy, share))

    def _note(
        self, name: str, videos: HostCopy, valid: HostCopy, indices: HostCopy, entropy: HostCopy | None, share: HostCopy | None
    ) -> None:
        if entropy is not None:
            self.entropies[name] += entropy.read().tolist()
        if share is not None:
            self.found[name] += [value for value in share.read().tolist() if value == value]  # NaN: no action there.
        rows = (copy.read().tolist() for copy in (videos, valid, indices))
        for video, is_valid, chosen in zip(*rows, strict=True):
            if is_valid:
                choice = hash(tuple(chosen))
                self.choices[name][video] = choice
                if len(self.examples) < 50:
                    self.examples.setdefault(choice, chosen)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log figures, draw, and warn."""
        assert isinstance(pl_module, ClassificationModule)
        if trainer.sanity_checking or pl_module.model.slots.empty:
            return
        while self.unread:
            self._note(*self.unread.pop())
        self._gather(trainer)
        figures: dict[str, float] = {}
        for name, choices in self.choices.items():
            slots = pl_module.model.slots
            selector = slots.selectors[name] if name in slots.selectors else slots.reducers[name]
            if self.entropies[name]:
                figures[f"selection/{name}/entropy"] = float(np.mean(self.entropies[name]))
            if self.found[name]:
                figures[f"selection/{name}/found"] = float(np.mean(self.found[name]))
            figures[f"selection/{name}/choices"] = len(set(choices.values())) / len(choices)
            if same := [video for video in choices if video in self.before.get(name, {})]:
                changed = sum(choices[video] != self.before[name][video] for video in same)
                figures[f"selection/{name}/changed"] = changed / len(same)
            if any(True for _ in selector.parameters()):
                self._warn(trainer, name, selector, choices)
        self.before = dict(self.choices)
        self._reset()
        if trainer.current_epoch % self.every == 0 or trainer.current_epoch == (trainer.max_epochs or 0) - 1:
            figures |= self._look(trainer, pl_module)
        # The same on all processes; Lightning wants it said.
        pl_module.log_dict(figures, sync_dist=trainer.world_size > 1, batch_size=1)

    def _gather(self, trainer: pl.Trainer) -> None:
        """Choices and entropies of all processes: what a selector does is judged over all videos."""
        if trainer.world_size == 1:
            return
        parts = gathered(trainer, (dict(self.choices), dict(self.entropies), dict(self.found)))
        self.choices, self.entropies, self.found = defaultdict(dict), defaultdict(list), defaultdict(list)
        for choices, entropies, shares in parts:
            for name, values in shares.items():
                self.found[name] += values
            for name, chosen in choices.items():
                self.choices[name] |= chosen
            for name, values in entropies.items():
                self.entropies[name] += values

    def _warn(self, trainer: pl.Trainer, name: str, selector: Any, choices: Mapping[int, int]) -> None:
        (choice, times), *_ = Counter(choices.values()).most_common(1)
        possible = isinstance(selector, Selector) and selector.out_size != selector.in_size
        if trainer.is_global_zero and possible and len(choices) >= 10 and times >= self.collapsed_at * len(choices):
            example = self.examples.get(choice, [])
            shown = f"{example[:8]}{'...' if len(example) > 8 else ''}"
            log.warning(
                "selector %s has collapsed: it keeps %s of %d of %d validation clips, whatever they show; try a larger "
                "selection.sigma or a lower learning rate; a fixed choice (selection.selector=uniform) would cost less",
                name, shown, times, len(choices),
            )  # fmt: skip

    @torch.no_grad()
    def _look(self, trainer: pl.Trainer, module: ClassificationModule) -> dict[str, float]:
        """Pictures of the fixed clips, and how far soft and hard selection are apart on them."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, VideoDataModule)
        loader = data.val_dataloader()
        dataset: Any = loader.dataset
        numbers = np.linspace(0, len(dataset) - 1, min(self.clips, len(dataset))).round().astype(int)
        items = [item for item in (dataset[int(number)] for number in np.unique(numbers)) if bool(item.valid)]
        if not items:
            return {}
        model = module.model
        clips = torch.stack([item.clip[0] for item in items]).to(module.device)
        truths = [item.truth[0] for item in items if item.truth is not None]
        truth = torch.stack(truths).to(module.device) if truths else None
        model.slots.tell_truth(truth)
        hard, kept = model(clips, return_selection=True)
        # Only the selectors: dropout and drop path are no part of this gap.
        model.slots.train()
        model.slots.seed_noise(range(len(items)))
        model.slots.tell_truth(truth)
        soft, soft_kept = model(clips, return_selection=True)
        model.slots.eval()
        figures = {"selection/gap": float((soft.softmax(-1) - hard.softmax(-1)).abs().sum(-1).mean() / 2)}
        for name, record in soft_kept.items():
            if isinstance(record, Selection) and record.indicator is not None:
                figures[f"selection/{name}/softness"] = float(1 - record.indicator.float().amax(-1).mean())
        if trainer.is_global_zero:
            self._draw(trainer, model.slots.sizes, clips, items, hard, list(kept.values()), data.classes)
        return figures

    def _draw(
        self,
        trainer: pl.Trainer,
        sizes: Mapping[str, GridSize],
        clips: Tensor,
        items: list[Any],
        logits: Tensor,
        kept: list[Record],
        classes: Any,
    ) -> None:
        pictures = clips.permute(0, 2, 3, 4, 1).cpu().numpy()
        chances = logits.float().softmax(-1).cpu()
        sheets = []
        for row, item in enumerate(items):
            guess = int(chances[row].argmax())
            verdict = "right" if guess == int(item.label) else f"wrong: {classes[guess]}"
            title = f"video {int(item.video)}: {classes[int(item.label)]}   {verdict} ({chances[row, guess]:.0%})"
            traced = trace(kept, sizes, row)
            truth = None if item.truth is None else shown_boxes(item.truth[0], traced.frames)
            sheets.append(contact_sheet(pictures[row], traced, title, truth=truth))
        page = np.concatenate(sheets)
        self.folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(page).save(self.folder / f"epoch_{trainer.current_epoch:03d}.png")
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image("selection", [page])  # A step of its own would be refused.
