"""The LightningModule: loss, metrics, noise seeds; everything else is passed in."""

import math
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch import Tensor
from torch.nn.functional import cross_entropy
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from stts_lightning.classifier import VideoClassifier
from stts_lightning.data.dataset import Batch
from stts_lightning.data.windows import WindowBatch
from stts_lightning.errors import UserError
from stts_lightning.selection.selector import Selection
from stts_lightning.training.augment import BatchAugment
from stts_lightning.training.optim import OptimSpec, build_optimizer, freeze
from stts_lightning.training.processes import end_all, gathered

NAMED = 10
"""How many videos or weights an error names."""


class TrainingError(UserError):
    """A training or test that cannot begin or go on: says why."""


class MeanClassAccuracy(MulticlassAccuracy):
    """Mean of the accuracies of the classes that occur.

    torchmetrics' own counts a class that was guessed but does not occur as one of accuracy 0.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes, average="none")

    def compute(self) -> Tensor:
        """The mean."""
        right, _, _, missed = self._final_state()
        occurs = right + missed > 0
        return (right[occurs] / (right + missed)[occurs]).mean()


def _named(names: Iterable[str]) -> str:
    """Names in a line, the first few of many."""
    names = list(names)
    more = f", and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{', '.join(names[:NAMED])}{more}"


def _checked_weights(weights: Sequence[float], num_classes: int) -> Tensor:
    if len(weights) != num_classes:
        raise TrainingError(f"class_weights: {len(weights)} values; the data set has {num_classes} classes")
    for weight in weights:
        if not 0 < weight < math.inf:
            raise TrainingError(f"class_weights: {weight} is not allowed; each must be above 0, and finite")
    return torch.tensor(weights, dtype=torch.float32)


class ClassificationModule(pl.LightningModule):
    """Trains and tests a video classifier.

    Args:
        model: backbone, selectors and head.
        optim: learning rates, decay and schedule.
        num_classes: number of classes.
        label_smoothing: of the cross-entropy.
        augment: of training batches, or None.
        compile: how the model runs, of `classifier.COMPILE`.
        class_weights: of each class in the cross-entropy, by label; None: all alike. As torch has it, the mean over clips is
            divided by the sum of their labels' weights (of all processes), but over mixed clips, which have no one label, by
            their number.

    Raises:
        TrainingError: for fewer than two classes, or weights that do not fit them.
    """

    class_weights: Tensor | None

    def __init__(
        self,
        model: VideoClassifier,
        optim: OptimSpec,
        num_classes: int,
        label_smoothing: float = 0.0,
        augment: BatchAugment | None = None,
        compile: str = "false",
        class_weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if num_classes < 2:
            count = "1 class" if num_classes == 1 else f"{num_classes} classes"
            raise TrainingError(f"the data set has {count}; a classifier needs 2 or more")
        self.model = model
        # Beside the model, which is counted, saved and measured as it is.
        self.run: Any = model.__call__
        self.compiled = compile != "false"
        if self.compiled:
            self.run = torch.compile(model.forward, mode=None if compile == "true" else compile)
        self.optim = optim
        self.augment = augment
        freeze(model, optim)
        self.label_smoothing = label_smoothing
        weights = None if class_weights is None else _checked_weights(class_weights, num_classes)
        self.register_buffer("class_weights", weights, persistent=False)  # No part of a checkpoint: the configuration has them.
        accuracy = {f"top{k}": MulticlassAccuracy(num_classes, top_k=k, average="micro") for k in (1, 5) if k <= num_classes}
        # In groups, metrics whose counts are equal after the first batch would share them for good.
        self.val_metrics = MetricCollection(accuracy, prefix="val/", compute_groups=False)  # type: ignore[arg-type]
        self.val_metrics.add_metrics({"mean_class_accuracy": MeanClassAccuracy(num_classes)})
        self._without_number: list[int] = []
        """Videos of this evaluation, by number, whose logits are NaN or infinite."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Cross-entropy of the clips of a batch, `(B, copies, 3, T, H, W)`; all that is random follows from its draws."""
        copies = batch.clip.shape[1]
        self.model.slots.seed_noise([draw + copy for draw in batch.draws for copy in range(copies)] or None)
        if batch.draws:
            torch.manual_seed(batch.draws[0])  # Dropout and drop path: apart on each process and step, repeated by a resumed run.
        clip, label = batch.clip.flatten(0, 1), batch.label.repeat_interleave(copies)
        target = label
        if self.augment is not None:
            pixels = self.augment.pixels(clip, batch.draws)
            clip, target = self.augment(self.model.normalize(pixels), label, batch.draws)
        logits = self.run(clip)
        loss = self._loss(logits, target)
        # Of all processes: no number if it is none at one of them.
        mean = self.trainer.strategy.reduce(loss.detach().clone(), reduce_op="mean")
        self._checked = mean, loss.detach(), batch.video
        self.log("train/loss", mean, prog_bar=True, batch_size=len(batch.label))
        if target is label:  # A mixed clip is of no one class.
            self.log("train/top1", (logits.argmax(-1) == label).float().mean(), batch_size=len(batch.label), sync_dist=True)
        return loss

    def _loss(self, logits: Tensor, target: Tensor) -> Tensor:
        loss = cross_entropy(logits, target, self.class_weights, label_smoothing=self.label_smoothing)
        if self.class_weights is None or target.is_floating_point():
            return loss
        # torch divides by the weights of this process's clips; divided by those of all, two processes are the same run as one.
        own = self.class_weights[target].sum()
        return loss * (own / self.trainer.strategy.reduce(own.clone(), reduce_op="mean"))

    def on_after_backward(self) -> None:
        """Stop on a loss that is no number, before the weights follow it; names the files of the batches that gave it."""
        mean, own, videos = self._checked
        if not bool(mean.isfinite()):
            told = f"training loss is {float(mean)} at step {self.global_step}"
            self._end_naming(told, "train", [] if bool(own.isfinite()) else videos.tolist())

    def _end_naming(self, told: str, split: str, numbers: Sequence[int]) -> None:
        """End all processes, and name the videos that each found; all must call this together."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        videos = data.splits[split].videos
        paths = [str(videos[number].path) for number in chain.from_iterable(gathered(self.trainer, numbers))]
        end_all(self.trainer, TrainingError(f"{told}, of the videos {_named(paths)}"))

    def _check_weights(self) -> None:
        """Stop on weights that are no numbers; all processes must call this together."""
        parameters = dict(self.model.named_parameters())
        finite = torch.stack([parameter.detach().isfinite().all() for parameter in parameters.values()]).tolist()
        own = [name for name, good in zip(parameters, finite, strict=True) if not good]
        if names := sorted(set(chain.from_iterable(gathered(self.trainer, own)))):
            end_all(self.trainer, TrainingError(f"weights are NaN or infinite after step {self.global_step}: {_named(names)}"))

    def on_validation_start(self) -> None:
        """Check the weights, before a validation that could but name every video."""
        self._check_weights()

    def on_train_end(self) -> None:
        """Check the weights, where neither a validation nor a checkpoint follows the last step."""
        self._check_weights()

    def _check_logits(self, logits: Tensor, batch: Batch) -> None:
        """Note videos whose logits are no numbers; their guess would be class 0."""
        finite = logits.isfinite().flatten(1).all(1)
        self._without_number += batch.video[batch.valid & ~finite].tolist()

    def on_validation_epoch_end(self) -> None:
        """Stop if logits were no numbers: at the end, when all processes are there to agree."""
        numbers, self._without_number = self._without_number, []
        if any(gathered(self.trainer, bool(numbers))):
            self._end_naming("logits are NaN or infinite", "val", numbers)

    on_test_epoch_end = on_validation_epoch_end

    def view_logits(self, clip: Tensor) -> Tensor:
        """Logits of each view: `(B, V, 3, T, H, W)` -> `(B, V, num_classes)`, float32."""
        return self.run(clip.flatten(0, 1)).float().unflatten(0, clip.shape[:2])

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Selection]:
        """Accuracies of the centre clip; what each slot kept of it, for callbacks."""
        logits, kept = self.run(batch.clip[:, 0], return_selection=True)
        self._check_logits(logits, batch)
        probabilities = logits.float().softmax(-1)
        if bool(batch.valid.any()):
            self.val_metrics.update(probabilities[batch.valid], batch.label[batch.valid])
        self.log_dict(dict(self.val_metrics.items()), prog_bar=True, on_epoch=True, batch_size=len(batch.label))
        return kept

    def test_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Logits of each view, for `training.testing`."""
        logits = self.view_logits(batch.clip)
        self._check_logits(logits, batch)
        return logits

    def predict_step(self, batch: WindowBatch, batch_idx: int) -> tuple[Tensor | None, list[Selection]]:
        """Logits `(B, crops, num_classes)` of the windows that decoded, and what was kept of each crop."""
        if batch.clip is None:
            return None, []
        logits, kept = self.run(batch.clip.flatten(0, 1), return_selection=True)
        return logits.float().unflatten(0, batch.clip.shape[:2]), list(kept.values())

    def configure_optimizers(self) -> Any:
        """AdamW and its schedule a step."""
        # A fused AdamW undoes float16's scale of the loss inside of its step, too late for clipping: then it is not fused.
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        steps = int(self.trainer.estimated_stepping_batches)
        optimizer, schedule = build_optimizer(self.model, self.optim, steps, fused=not scaled)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as the trainer says. Lightning refuses a fused optimiser under bf16 too, where no scale is to be undone."""
        algorithm = GradClipAlgorithmType(gradient_clip_algorithm or GradClipAlgorithmType.NORM)
        Precision.clip_gradients(self.trainer.precision_plugin, optimizer, gradient_clip_val or 0.0, algorithm)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add how to rebuild the model, as plain values; weights that are no numbers are not written."""
        self._check_weights()
        checkpoint["model"] = dict(self.model.recipe)
