"""The LightningModule: loss, metrics, noise seeds; everything else is passed in."""

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from stts_lightning.classifier import VideoClassifier
from stts_lightning.data.dataset import Batch
from stts_lightning.data.windows import WindowBatch
from stts_lightning.errors import UserError
from stts_lightning.selection.selector import Selection
from stts_lightning.training.augment import BatchAugment
from stts_lightning.training.optim import OptimSpec, build_optimizer, freeze


class TrainingError(UserError):
    """A training that cannot go on: says why."""


class ClassificationModule(pl.LightningModule):
    """Trains and tests a video classifier.

    Args:
        model: backbone, selectors and head.
        optim: learning rates, decay and schedule.
        num_classes: number of classes.
        label_smoothing: of the cross-entropy.
        augment: of training batches, or None.
        compile: how the model runs, of `classifier.COMPILE`.
    """

    def __init__(
        self,
        model: VideoClassifier,
        optim: OptimSpec,
        num_classes: int,
        label_smoothing: float = 0.0,
        augment: BatchAugment | None = None,
        compile: str = "false",
    ) -> None:
        super().__init__()
        self.model = model
        # Beside the model, which is counted, saved and measured as it is.
        self.run: Any = model.__call__
        self.compiled = compile != "false"
        if self.compiled:
            self.run = torch.compile(model.forward, mode=None if compile == "true" else compile)
        self.optim = optim
        self.augment = augment
        freeze(model, optim)
        self.loss = nn.CrossEntropyLoss(label_smoothing=label_smoothing)
        accuracy = {f"top{k}": MulticlassAccuracy(num_classes, top_k=k, average="micro") for k in (1, 5) if k <= num_classes}
        self.val_metrics = MetricCollection(accuracy, prefix="val/")  # type: ignore[arg-type]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Cross-entropy of the clips of a batch, `(B, copies, 3, T, H, W)`; all that is random follows from its draws."""
        copies = batch.clip.shape[1]
        self.model.slots.seed_noise([draw + copy for draw in batch.draws for copy in range(copies)] or None)
        if batch.draws:
            torch.manual_seed(batch.draws[0])  # Dropout and drop path: apart on each process and step, repeated by a resumed run.
        clip, label = batch.clip.flatten(0, 1), batch.label.repeat_interleave(copies)
        target = label
        if self.augment is not None:
            clip, target = self.augment(self.model.normalize(clip), label, batch.draws)
        logits = self.run(clip)
        loss = self.loss(logits, target)
        self._checked = loss.detach(), batch.video
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch.label), sync_dist=True)
        if target is label:  # A mixed clip is of no one class.
            self.log("train/top1", (logits.argmax(-1) == label).float().mean(), batch_size=len(batch.label), sync_dist=True)
        return loss

    def on_after_backward(self) -> None:
        """Stop on a loss that is no number, before the weights follow it; names the files of this process's batch."""
        loss, videos = self._checked
        if not bool(torch.isfinite(loss)):
            data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
            paths = ", ".join(str(data.splits["train"].videos[number].path) for number in videos.tolist())
            raise TrainingError(f"training loss is {float(loss)} at step {self.global_step}, of the videos {paths}")

    def view_logits(self, clip: Tensor) -> Tensor:
        """Logits of each view: `(B, V, 3, T, H, W)` -> `(B, V, num_classes)`, float32."""
        return self.run(clip.flatten(0, 1)).float().unflatten(0, clip.shape[:2])

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Selection]:
        """Top-1 and top-5 of the centre clip; what each slot kept of it, for callbacks."""
        logits, kept = self.run(batch.clip[:, 0], return_selection=True)
        probabilities = logits.float().softmax(-1)
        if bool(batch.valid.any()):
            self.val_metrics.update(probabilities[batch.valid], batch.label[batch.valid])
        self.log_dict(dict(self.val_metrics.items()), prog_bar=True, on_epoch=True, batch_size=len(batch.label))
        return kept

    def test_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Logits of each view, for `training.testing`."""
        return self.view_logits(batch.clip)

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
        """Add how to rebuild the model, as plain values."""
        checkpoint["model"] = dict(self.model.recipe)
