"""A backbone and a head: clip in, logits out. `create_model` is the way in for every command and for users."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, NamedTuple, overload

import torch
import yaml
from torch import Tensor, nn

from stts_lightning.backbones.checkpoints import Checkpoint, CheckpointError, load_checkpoint, read_checkpoint
from stts_lightning.backbones.registry import Backbone, create_backbone, find_backbone, list_backbones
from stts_lightning.data.clips import ClipRule, read_clips
from stts_lightning.data.labels import kinetics_names
from stts_lightning.kernels import kernels_for
from stts_lightning.run_folders import CONFIG, run_checkpoint, run_classes
from stts_lightning.selection.reducer import Record
from stts_lightning.selection.slots import SlotBank
from stts_lightning.selection.spec import SelectionSpec
from stts_lightning.trusted import check_stored

log = logging.getLogger(__name__)

COMPILE = ("false", "true", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
"""Ways to run a model: as it is, by torch.compile, and by torch.compile in one of its modes (reduce-overhead: CUDA graphs)."""


HEAD_SPREAD = 0.02
"""Standard deviation of a new head's weights."""
DEFAULT_CLASSES = 400
"""Of Kinetics-400, for a model that nothing else says the number of."""


class Prediction(NamedTuple):
    """A class that a video may show, with its probability."""

    name: str
    probability: float
    label: int


class VideoClassifier(nn.Module):
    """Backbone, dropout and one linear layer. Always logits.

    Args:
        backbone: any registered backbone.
        num_classes: number of classes; 0 for no head: the features before it are the output.
        dropout: rate before the linear layer.
        kernels: "auto", or "none" to run every module as it is written; see `stts_lightning.kernels`.

    Attributes:
        recipe: plain arguments of `create_model` that build it again, weights aside; empty where it was built by hand.
        weights: where its weights come from, in words.
        fresh: names of the weights that its checkpoint did not give; None where it has none.
        new_head: whether its last layer has learned nothing.
        clips: which clips of a video it is tested on.
    """

    scale: Tensor
    shift: Tensor
    recipe: Mapping[str, Any]
    weights: str
    fresh: tuple[str, ...] | None
    new_head: bool
    clips: ClipRule

    def __init__(self, backbone: Backbone, num_classes: int, dropout: float = 0.0, kernels: str = "auto") -> None:
        super().__init__()
        backbone.kernels = kernels_for(backbone, kernels)
        backbone.slots.start_scorers()
        self.recipe = {}
        self.weights = "random"
        self.fresh = None
        self.clips = ClipRule(**backbone.reading)
        self.backbone = backbone
        self.dropout = nn.Dropout(dropout)
        self.reset_classifier(num_classes)
        mean, std = (torch.tensor(values, dtype=torch.float64).view(1, 3, 1, 1, 1) for values in (backbone.mean, backbone.std))
        self.register_buffer("scale", (1 / (255 * std)).float(), persistent=False)
        self.register_buffer("shift", (-mean / std).float(), persistent=False)

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 without a head."""
        return self.head.out_features if isinstance(self.head, nn.Linear) else 0

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the head by a new, untrained one for another number of classes; 0 removes it. Raises ValueError below 0."""
        if not isinstance(num_classes, int) or num_classes < 0:
            raise ValueError(f"num_classes={num_classes!r}: must be a whole number, 0 for no head")
        self.head: nn.Module = nn.Linear(self.backbone.out_dim, num_classes) if num_classes else nn.Identity()
        if isinstance(self.head, nn.Linear):
            nn.init.trunc_normal_(self.head.weight, std=HEAD_SPREAD)
            nn.init.zeros_(self.head.bias)
        self.new_head = True
        self._classes: tuple[str, ...] | None = None
        if self.recipe:
            self.recipe = {**self.recipe, "num_classes": num_classes}

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, by label; their numbers where nobody said them."""
        return tuple(map(str, range(self.num_classes))) if self._classes is None else self._classes

    @classes.setter
    def classes(self, names: Sequence[str]) -> None:
        if len(names) != self.num_classes:
            raise ValueError(f"{len(names)} names for {self.num_classes} classes")
        self._classes = tuple(names)

    @property
    def tells_nothing(self) -> str:
        """Why its answers say nothing of a clip before it is trained, in words; empty if they do."""
        if self.fresh is None:
            return "it starts with new weights"
        return "its head is new" if self.new_head else ""

    @property
    def slots(self) -> SlotBank:
        """The selectors."""
        return self.backbone.slots

    def normalize(self, clip: Tensor) -> Tensor:
        """uint8 `(B, 3, T, H, W)` -> float, by the backbone's mean and standard deviation."""
        return torch.addcmul(self.shift, clip.to(self.scale.dtype), self.scale)  # One pass over the pixels, not three.

    @property
    def weight_dtype(self) -> torch.dtype:
        """What the weights are held in: float32, unless `cast_weights` changed it."""
        return next(self.backbone.parameters()).dtype

    def cast_weights(self, dtype: torch.dtype) -> "VideoClassifier":
        """Hold the weights in another type, for evaluation: bfloat16 saves the casts of autocast, half of all launches on a GPU.

        Constants (those of normalisation, sigma) stay float32, which `model.to(torch.bfloat16)` would round. Returns the model.
        """
        for parameter in self.parameters():
            parameter.data = parameter.data.to(dtype)
        return self

    def forward_features(self, clip: Tensor, kept: list[Record] | None = None) -> Tensor:
        """Features of clips, as the head gets them.

        Args:
            clip: as in `forward`.
            kept: a list that gets what each slot kept, a `Selection` of each selector and a `Reduction` of each reducer.

        Returns:
            `(B, backbone.out_dim)`: the class token of an MViT, the mean over all tokens of a VideoSwin.
        """
        clip = self.normalize(clip) if clip.dtype == torch.uint8 else clip
        return self.backbone(clip.to(self.weight_dtype), kept)

    @overload
    def forward(self, clip: Tensor, return_selection: Literal[False] = False) -> Tensor: ...
    @overload
    def forward(self, clip: Tensor, return_selection: Literal[True]) -> tuple[Tensor, dict[str, Record]]: ...
    def forward(self, clip: Tensor, return_selection: bool = False) -> Tensor | tuple[Tensor, dict[str, Record]]:
        """Classify clips.

        Args:
            clip: `(B, 3, T, H, W)`, uint8, or float and already normalised by the backbone's mean and deviation.
            return_selection: also tell what each slot kept.

        Returns:
            logits `(B, num_classes)`, or features `(B, backbone.out_dim)` without a head; with `return_selection` also a
            `Selection` or `Reduction` for each slot by name.
        """
        kept: list[Record] = []
        logits = self.head(self.dropout(self.forward_features(clip, kept)))
        return (logits, {selection.slot: selection for selection in kept}) if return_selection else logits

    @torch.inference_mode()
    def predict(self, path: str | Path, top: int = 5, **clips: Any) -> list[Prediction]:
        """Classify a video file, by the mean of the probabilities of its clips.

        For many or long videos, and labels over time, there is the command `predict`.

        Args:
            path: a file, or a folder with a picture for each frame.
            top: how many classes.
            **clips: what is to differ from `clips`: views, crops, stride, sampling or short_side.

        Returns:
            The likeliest classes, the likeliest first.

        Raises:
            DecodeError: if the video does not decode: names it.
            ValueError: for a number of classes, views or the like that there is not, or a model without a head.
        """
        rule = self.clips.changed(**clips)
        if not self.num_classes:
            raise ValueError("this model has no head (num_classes=0): it gives features, no classes")
        if top < 1:
            raise ValueError(f"top={top}: must be 1 or more")
        pixels = read_clips(path, self.backbone.clip_size, **asdict(rule)).to(self.scale.device)
        training = self.training
        self.eval()
        try:
            chances = self(pixels).float().softmax(-1).mean(0)
        finally:
            self.train(training)
        values, labels = chances.topk(min(top, len(chances)))
        names = self.classes
        return [Prediction(names[label], value, label) for value, label in zip(values.tolist(), labels.tolist(), strict=True)]


def list_models() -> list[str]:
    """Names that `create_model` takes."""
    return list_backbones()


def create_model(
    backbone: str,
    selection: SelectionSpec | str | Mapping[str, Any] | None = None,
    num_classes: int | None = None,
    pretrained: str | Path | None = None,
    head: str = "keep",
    trust: bool = False,
    dropout: float = 0.0,
    kernels: str = "auto",
    classes: Sequence[str] | None = None,
    **backbone_kwargs: Any,
) -> VideoClassifier:
    """Build a model, with token selection and published weights if wanted.

    A file that holds selectors settles their scorer, whatever the selection says: the official code's is `official`. One of this
    project's files may also be all there is: `load_model`.

    Args:
        backbone: a registered name, as "mvit_b16", or the dotted path of a factory.
        selection: "t0_0.6_s4_0.9", None or "none" for the unpruned model, or a mapping (see `SelectionSpec.of`).
        num_classes: number of classes; 0 for no head (features); None for those of the checkpoint's head, else 400.
        pretrained: a checkpoint in any known layout, or None.
        head: "keep", or "reset" to leave the file's classifier head aside.
        trust: also read a file that holds Python objects, which may run any code while they are read.
        dropout: rate before the head.
        kernels: "auto", or "none" to run every module as it is written; see `stts_lightning.kernels`.
        classes: names of the classes, by label; None: as the file says, where its head is kept. Published files of 400 classes
            are of Kinetics-400.
        **backbone_kwargs: go to the backbone's constructor; None leaves the choice to the file or the constructor.

    Raises:
        SelectionError: a selection that cannot be honoured.
        CheckpointError: a file that cannot be read or does not fit.
        BackboneError: an unknown backbone or argument.
    """
    if head not in ("keep", "reset"):
        raise CheckpointError(f"head={head}: allowed are keep, reset")
    spec = SelectionSpec.of(selection)
    backbone_kwargs = {key: value for key, value in backbone_kwargs.items() if value is not None}
    find_backbone(backbone)  # Its file may register a layout of checkpoints.
    checkpoint = read_checkpoint(pretrained, trust) if pretrained else None
    if checkpoint:
        spec = spec.with_scorer(checkpoint.scorer(spec.scorer))
        backbone_kwargs = {**checkpoint.backbone(), **backbone_kwargs}
    if num_classes is None:
        num_classes = (checkpoint.num_classes if checkpoint else None) or DEFAULT_CLASSES
    model = VideoClassifier(create_backbone(backbone, selection=spec, **backbone_kwargs), num_classes, dropout, kernels)
    for slot in model.slots.without_effect():
        log.warning("selection %s keeps everything: its grid is too small for this ratio", slot)
    # What was decided, not what was asked: a file may have settled the scorer or an epsilon.
    settled = {"selection": spec.to_dict(), "num_classes": num_classes, "dropout": dropout}
    model.recipe = {"backbone": backbone, **settled, **backbone_kwargs}
    if checkpoint:
        report = load_checkpoint(model, checkpoint, spec, head if num_classes else "reset")
        model.weights, model.fresh = f"{checkpoint.path} ({report})", report.fresh
        model.new_head = not any(key.startswith("head.") for key in report.loaded)
        log.info("checkpoint %s: %s", checkpoint.path, report)
        if classes is None and head == "keep":
            classes = _names(checkpoint, model.num_classes)
    if classes is not None:
        model.classes = classes
    return model


def _names(checkpoint: Checkpoint, count: int) -> Sequence[str] | None:
    """Names of the classes of a file's head, if they are known."""
    if checkpoint.model:
        return checkpoint.model.get("classes")
    return kinetics_names() if count == len(kinetics_names()) else None


def load_model(path: str | Path, which: str = "last", **changes: Any) -> VideoClassifier:
    """Build the model of a run, or of one of this project's files: a training checkpoint or a converted safetensors file.

    Args:
        path: the run's folder, or the file.
        which: of a run's checkpoints: "last", or "best" by its validation.
        **changes: arguments of `create_model` that are to differ from what the file says.

    Raises:
        RunError: if the folder has no such checkpoint: says what is there.
        CheckpointError: if the file does not say how its model is built; and as `create_model`.
        TrustError: if it names a selector's class of another package, and trust=True is not given.
    """
    path = Path(path)
    if path.is_dir():
        path = run_checkpoint(path, which)
    trust = bool(changes.get("trust"))
    recipe = read_checkpoint(path, trust).model
    if not recipe:
        raise CheckpointError(f"checkpoint {path}: does not say how its model is built; name the backbone and selection")
    if not trust:
        check_stored(recipe, f"checkpoint {path}", changes)
    model = create_model(**{**recipe, "pretrained": path, **changes})
    _know_run(model, path)
    return model


def _know_run(model: VideoClassifier, checkpoint: Path) -> None:
    """Tell a model the clips of its run's test, and the names of its classes where its checkpoint does not say them."""
    if checkpoint.parent.name == "checkpoints" and (file := checkpoint.parent.parent / CONFIG).is_file():
        model.clips = ClipRule.of(yaml.safe_load(file.read_text(encoding="utf-8"))["clip"])
    names = run_classes(checkpoint)
    if names and len(names) == model.num_classes and model.classes == tuple(map(str, range(model.num_classes))):
        model.classes = names
