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
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torchmetrics import Metric, MetricCollection

from stts_lightning.classifier import VideoClassifier
from stts_lightning.data.dataset import Batch
from stts_lightning.data.windows import WindowBatch
from stts_lightning.errors import UserError
from stts_lightning.selection.reducer import Record
from stts_lightning.training.augment import BatchAugment
from stts_lightning.training.distillation import Teacher
from stts_lightning.training.metrics import Accuracy, Loss, MeanClassAccuracy
from stts_lightning.training.optim import OptimSpec, build_optimizer, freeze
from stts_lightning.training.processes import end_all, gathered, mean_of_all
from stts_lightning.training.step_figures import HostCopy, Known, StepFigures, StepRecord

NAMED = 10
"""How many videos or weights an error names."""


class TrainingError(UserError):
    """A training or test that cannot begin or go on: says why."""


def is_logged(trainer: pl.Trainer) -> bool:
    """Whether loggers are handed the figures of the step that is being made."""
    return trainer._logger_connector.should_update_logs


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
        teacher: whose predictions are learned beside the labels, or None.
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
        teacher: Teacher | None = None,
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
        self.teacher = teacher
        if teacher is not None:
            teacher.teach(model)
        weights = None if class_weights is None else _checked_weights(class_weights, num_classes)
        self.register_buffer("class_weights", weights, persistent=False)  # No part of a checkpoint: the configuration has them.
        accuracy: dict[str, Metric | MetricCollection] = {f"top{k}": Accuracy(k) for k in (1, 5) if k <= num_classes}
        # In groups, metrics whose counts are equal after the first batch would share them for good.
        self.val_metrics = MetricCollection(accuracy, prefix="val/", compute_groups=False)
        self.val_metrics.add_metrics({"mean_class_accuracy": MeanClassAccuracy(num_classes), "loss": Loss()})
        self.figures = StepFigures()
        self.known = Known()
        """The latest step that the host knows of: one step late on a GPU."""
        self._unread: list[StepRecord] = []
        self._batches: list[tuple[Tensor, Tensor]] = []
        self._spoilt: Tensor | None = None
        """1 from the first update on that is not finite, else 0; 0-d, float32, on the device."""
        self._evaluated: list[tuple[Tensor, Tensor]] = []
        """Of each batch of this evaluation its videos' numbers, and which of them have logits that are NaN or infinite."""

    def on_train_start(self) -> None:
        """Nothing is known of any step."""
        if self.teacher is not None:
            self.teacher.model.to(self.device)
        self.known, self._unread, self._batches, self._spoilt = Known(), [], [], None

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Cross-entropy of the clips of a batch, `(B, copies, 3, T, H, W)`; all that is random follows from its draws."""
        copies = batch.clip.shape[1]
        self.model.slots.seed_noise([draw + copy for draw in batch.draws for copy in range(copies)] or None)
        self._tell_truth(batch)
        if batch.draws:
            torch.manual_seed(batch.draws[0])  # Dropout and drop path: apart on each process and step, repeated by a resumed run.
        clip, label = batch.clip.flatten(0, 1), batch.label.repeat_interleave(copies)
        target = label
        if self.augment is not None:
            pixels = self.augment.pixels(clip, batch.draws)
            clip, target = self.augment(self.model.normalize(pixels), label, batch.draws)
        logits = self.run(clip)
        loss = self._loss(logits, target)
        if self.teacher is not None:
            loss = loss + self.teacher.loss(clip, logits, self.model)
        if (of_reducers := self.model.slots.loss()) is not None:
            loss = loss + of_reducers
        self._batches.append((loss.detach(), batch.video))
        self._labelled = target is label  # A mixed clip is of no one class.
        top1 = (logits.argmax(-1) == label).float().mean() if self._labelled and is_logged(self.trainer) else None
        return self.figures.carried_by(loss, top1)

    def _loss(self, logits: Tensor, target: Tensor) -> Tensor:
        loss = cross_entropy(logits, target, self.class_weights, label_smoothing=self.label_smoothing)
        if self.class_weights is None or target.is_floating_point():
            return loss
        # torch divides by the weights of this process's clips; divided by those of all, two processes are the same run as one.
        own = self.class_weights[target].sum()
        # A reduction of its own, before the backward pass: only where classes are weighed.
        return loss * (own / mean_of_all(self.trainer, own))

    @property
    def measured(self) -> tuple[str, ...]:
        """Names of what each validation measures, by which `best` may be chosen and a run be stopped."""
        return tuple(map(str, self.val_metrics.keys()))

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Note the step's figures, and leave out its update, on the device, if it is not finite. Nothing waits for the device.

        A loss that is NaN at any process has made the gradients NaN at all of them.
        """
        figures = self.figures.take()
        loss, top1 = figures[2], figures[3]
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self._norm = get_total_norm(gradients)
        # Scaled as float16 needs it, gradients overflow now and then: its scaler leaves such a step out and goes on.
        finite = loss.isfinite() if self._scaled else loss.isfinite() & self._norm.isfinite()
        spoilt = (~finite).float()
        # No update after it either: the weights stay those before the step that the error names.
        self._spoilt = spoilt if self._spoilt is None else torch.maximum(self._spoilt, spoilt)
        self._unread.append(StepRecord(self.global_step, HostCopy(torch.cat([figures, self._spoilt[None]])), self._batches))
        self._batches = []
        if is_logged(self.trainer) or self.trainer.is_last_batch:  # The epoch's last: a result names it.
            self.log("train/loss", loss)
            if self._labelled and is_logged(self.trainer):
                self.log("train/top1", top1)
        if optimizer.defaults["fused"]:
            optimizer.found_inf = self._spoilt  # type: ignore[attr-defined]
        else:
            self.look(wait=True)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Look at the step before this one."""
        self.look()

    def look(self, wait: bool = False) -> Known:
        """Read what has arrived on the host; stop on a loss or gradients that are no numbers, and name the files that gave them.

        All processes must call this together, and then know the same.

        Args:
            wait: for the latest step too, which a GPU may not have done yet.

        Returns:
            What is known of the latest step.
        """
        while len(self._unread) > 1 or (self._unread and (wait or not self._unread[0].figures.late)):
            record = self._unread.pop(0)
            self.known = record.known()
            if not self.known.finite:
                self._unread = []
                self._end_at(record)
        return self.known

    def _end_at(self, record: StepRecord) -> None:
        if math.isfinite(self.known.loss):
            told = f"gradients are NaN or infinite at step {record.step}, where the training loss is {self.known.loss:.4g}"
            guilty = [videos for _, videos in record.batches]
        else:
            told = f"training loss is {self.known.loss} at step {record.step}"
            guilty = [videos for loss, videos in record.batches if not bool(loss.isfinite())]
        self._end_naming(told, "train", [number for videos in guilty for number in videos.tolist()])

    def _end_naming(self, told: str, split: str, numbers: Sequence[int]) -> None:
        """End all processes, and name the videos that each found; all must call this together."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        videos = (data.tested if split == "test" else data.splits[split]).videos
        paths = [str(videos[number].path) for number in chain.from_iterable(gathered(self.trainer, numbers))]
        end_all(self.trainer, TrainingError(f"{told}, of the videos {_named(paths)}"))

    def _check_weights(self) -> None:
        """Stop on a step or weights that are no numbers; all processes must call this together."""
        self.look(wait=True)
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
        self._evaluated.append((batch.video, batch.valid & ~logits.isfinite().flatten(1).all(1)))

    def on_validation_epoch_end(self) -> None:
        """Stop if logits were no numbers: at the end, when all processes are there to agree."""
        self._end_at_odd_logits("val")

    def on_test_epoch_end(self) -> None:
        """The same of a test."""
        self._end_at_odd_logits("test")

    def _end_at_odd_logits(self, split: str) -> None:
        evaluated, self._evaluated = self._evaluated, []
        numbers: list[int] = []
        if evaluated:
            videos, odd = (torch.cat(parts).cpu() for parts in zip(*evaluated, strict=True))
            numbers = videos[odd].tolist()
        if any(gathered(self.trainer, bool(numbers))):
            self._end_naming("logits are NaN or infinite", split, numbers)

    def _tell_truth(self, batch: Batch, views: int | None = None) -> None:
        """Tell the selectors where the action is in the first views of a batch, or in all of them, if it says so."""
        self.model.slots.tell_truth(None if batch.truth is None else batch.truth[:, :views].flatten(0, 1))

    def view_logits(self, clip: Tensor) -> Tensor:
        """Logits of each view: `(B, V, 3, T, H, W)` -> `(B, V, num_classes)`, float32."""
        return self.run(clip.flatten(0, 1)).float().unflatten(0, clip.shape[:2])

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Record]:
        """Accuracies of the centre clip; what each slot kept of it, for callbacks."""
        self._tell_truth(batch, 1)
        logits, kept = self.run(batch.clip[:, 0], return_selection=True)
        self._check_logits(logits, batch)
        self.val_metrics.update(logits.float(), batch.label, batch.valid)
        self.log_dict(dict(self.val_metrics.items()), prog_bar=True, on_epoch=True, batch_size=len(batch.label))
        return kept

    def test_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Logits of each view, for `training.testing`."""
        self._tell_truth(batch)
        logits = self.view_logits(batch.clip)
        self._check_logits(logits, batch)
        return logits

    def predict_step(self, batch: WindowBatch, batch_idx: int) -> tuple[Tensor | None, list[Record]]:
        """Logits `(B, crops, num_classes)` of the windows that decoded, and what was kept of each crop."""
        if batch.clip is None:
            return None, []
        logits, kept = self.run(batch.clip.flatten(0, 1), return_selection=True)
        return logits.float().unflatten(0, batch.clip.shape[:2]), list(kept.values())

    @property
    def _scaled(self) -> bool:
        """Whether the loss is scaled, as float16 needs it."""
        return getattr(self.trainer.precision_plugin, "scaler", None) is not None

    def configure_optimizers(self) -> Any:
        """AdamW and its schedule a step."""
        # A fused AdamW undoes float16's scale of the loss inside of its step, too late for clipping: then it is not fused.
        steps = int(self.trainer.estimated_stepping_batches)
        optimizer, schedule = build_optimizer(self.model, self.optim, steps, fused=not self._scaled)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as the trainer says. Lightning refuses a fused optimiser under bf16 too, where no scale is to be undone."""
        algorithm = GradClipAlgorithmType(gradient_clip_algorithm or GradClipAlgorithmType.NORM)
        if gradient_clip_val and algorithm == GradClipAlgorithmType.NORM:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            clip_grads_with_norm_(parameters, gradient_clip_val, self._norm)
            return
        Precision.clip_gradients(self.trainer.precision_plugin, optimizer, gradient_clip_val or 0.0, algorithm)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add how to rebuild the model, as plain values; weights that are no numbers are not written."""
        self._check_weights()
        checkpoint["model"] = {**self.model.recipe, "classes": list(self.model.classes)}
