"""Which numbers a configuration may hold, key by key. Checked when it is read: later, a wrong one looks like a bad result."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from stts_lightning.containers import leaves
from stts_lightning.errors import UserError


class RangeError(UserError):
    """A number out of its range: names key, value and range."""


@dataclass(frozen=True)
class Range:
    """Numbers that are allowed.

    Attributes:
        low, high: bounds.
        above, below: whether the bound itself is left out.
        whole: whole numbers alone.
        infinite: infinity too.
        also: further values.
        words: texts too (as "auto"), which others judge.
    """

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False
    whole: bool = False
    infinite: bool = False
    also: tuple[float, ...] = ()
    words: bool = False

    def holds(self, value: Any) -> bool:
        """Whether a value is one of them."""
        if isinstance(value, str):
            return self.words
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        if value in self.also or (self.infinite and value == math.inf):
            return True
        if not math.isfinite(value) or (self.whole and value != int(value)):
            return False
        return (value > self.low if self.above else value >= self.low) and (
            value < self.high if self.below else value <= self.high
        )

    def __str__(self) -> str:
        if math.isinf(self.high):
            bounds = f"be above {self.low:g}" if self.above else f"be {self.low:g} or more"
        else:
            bounds = f"lie in {'(' if self.above else '['}{self.low:g}, {self.high:g}{')' if self.below else ']'}"
        kind = ", a whole number" if self.whole else ""
        return f"{bounds}{kind}{''.join(f', or {value:g}' for value in self.also)}"


COUNT = Range(1, whole=True)
INDEX = Range(0, whole=True)
NOT_NEGATIVE = Range(0)
POSITIVE = Range(0, above=True)
SHARE = Range(0, 1)
RATE = Range(0, 1, below=True)
PORTION = Range(0, 1, above=True)

RANGES: dict[str, Range] = {
    "augment.mixup": NOT_NEGATIVE,
    "augment.cutmix": NOT_NEGATIVE,
    "augment.erasing": SHARE,
    "backbone.drop_path": RATE,
    "backbone.dropout": RATE,
    "backbone.frames": COUNT,
    "backbone.size*": COUNT,
    "backbone.window.*": COUNT,
    "callbacks.*.every_minutes": POSITIVE,
    "callbacks.*.every_n_steps": COUNT,
    "callbacks.*.every_n_epochs": COUNT,
    "callbacks.loading.share": SHARE,
    "callbacks.loading.steps": COUNT,
    "callbacks.panels.clips": COUNT,
    "callbacks.early_stopping.min_delta": NOT_NEGATIVE,
    "callbacks.early_stopping.patience": COUNT,
    "callbacks.sigma.sigma": NOT_NEGATIVE,
    "callbacks.sigma.until": PORTION,
    "callbacks.ratio.until": SHARE,
    "callbacks.starts.draws": COUNT,
    "callbacks.starts.clips": COUNT,
    "class_weights*": Range(0, above=True, words=True),
    "clip.decode_timeout": POSITIVE,
    "clip.short_side": Range(1, whole=True, words=True),
    "clip.test_short_side": Range(1, whole=True, words=True),
    "clip.stride": COUNT,
    "clip.test_crops": Range(1, 1, whole=True, also=(3,)),
    "clip.test_views": COUNT,
    "clip.train_transform.copies": COUNT,
    "clip.train_transform.flip": SHARE,
    "clip.train_transform.ratio.*": POSITIVE,
    "clip.train_transform.scale.*": PORTION,
    "dataset.seed": INDEX,
    "dataset.split_seed": INDEX,
    "dataset.train": Range(1, whole=True, words=True),
    "dataset.val": Range(1, whole=True, words=True),
    "dataset.val_fraction": Range(0, 1, above=True, below=True),
    "distill.temperature": POSITIVE,
    "distill.tokens": NOT_NEGATIVE,
    "distill.weight": NOT_NEGATIVE,
    "embed.copies": COUNT,
    "embed.larger": Range(1),
    "embed.longer": Range(1),
    "embed.seed": INDEX,
    "label_smoothing": RATE,
    "loader.batch_size": COUNT,
    "loader.eval_batch_size": COUNT,
    "loader.num_workers": Range(0, whole=True, words=True),
    "loader.prefetch_factor": COUNT,
    "loader.timeout": NOT_NEGATIVE,
    "optim.betas.*": RATE,
    "optim.epochs": NOT_NEGATIVE,
    "optim.final_lr": SHARE,
    "optim.lr": NOT_NEGATIVE,
    "optim.parts.*.frozen_epochs": NOT_NEGATIVE,
    "optim.parts.*.frozen_share": SHARE,
    "optim.parts.*.warmup_share": SHARE,
    "optim.parts.*.layer_decay": PORTION,
    "optim.parts.*.lr_cap": Range(0, infinite=True),
    "optim.parts.*.lr_scale": NOT_NEGATIVE,
    "optim.parts.*.warmup_epochs": NOT_NEGATIVE,
    "optim.parts.*.warmup_from": SHARE,
    "optim.weight_decay": NOT_NEGATIVE,
    "seed": Range(0, 2**32 - 1, whole=True),
    "selection.samples": Range(2, whole=True),
    "selection.sigma": NOT_NEGATIVE,
    "selection.slots.*.drop": INDEX,
    "selection.slots.*.keep": COUNT,
    "selection.slots.*.ratio": PORTION,
    "selection.slots.*.side": COUNT,
    "selection.slots.*.threshold": NOT_NEGATIVE,
    "trainer.accumulate_grad_batches": COUNT,
    "trainer.check_val_every_n_epoch": COUNT,
    "trainer.devices": Range(1, whole=True, also=(-1,), words=True),
    "trainer.gradient_clip_val": NOT_NEGATIVE,
    "trainer.limit_*_batches": POSITIVE,
    "trainer.log_every_n_steps": COUNT,
    "trainer.max_epochs": INDEX,
    "trainer.max_steps": Range(0, whole=True, also=(-1,)),
    "trainer.num_nodes": COUNT,
    "trainer.num_sanity_val_steps": Range(0, whole=True, also=(-1,)),
    # Of other commands than train.
    "batch.*": COUNT,
    "budget": POSITIVE,
    "budget_blocks.*": INDEX,
    "copies": COUNT,
    "crf": Range(0, 51, whole=True),
    "every": POSITIVE,
    "frames": COUNT,
    "jobs": COUNT,
    "keyframe_every": COUNT,
    "num_classes": COUNT,
    "overlay_windows": INDEX,
    "rounds": Range(2, whole=True),
    "seconds": NOT_NEGATIVE,
    "short_side": Range(16, whole=True),
    "size": COUNT,
    "stride": COUNT,
    "timeout": POSITIVE,
    "top": COUNT,
}
"""Allowed numbers by key; `*` stands for anything. null is always allowed here."""
ORDERED = ("clip.train_transform.ratio", "clip.train_transform.scale")


def range_of(key: str) -> Range | None:
    """The range of a key; None if it has none."""
    return RANGES.get(key) or next((allowed for pattern, allowed in RANGES.items() if fnmatchcase(key, pattern)), None)


def _at(content: Any, key: str) -> Any:
    """What containers hold under a full key; None if nothing."""
    for name in key.split("."):
        content = content.get(name) if isinstance(content, Mapping) else None
    return content


def check_ranges(content: Mapping[str, Any]) -> None:
    """Refuse a configuration with a number out of its range.

    Args:
        content: plain containers, interpolations resolved; values that are not given yet ("???") are left alone.

    Raises:
        RangeError: for the first such number.
    """
    for key in RANGES:
        if isinstance(value := _at(content, key), list | Mapping):
            raise RangeError(f"{key}={value}: must {RANGES[key]}")
    for key, value in leaves(content):
        if value is None or value == "???" or isinstance(value, Mapping | list):
            continue
        allowed = range_of(key)
        if allowed is not None and not allowed.holds(value):
            raise RangeError(f"{key}={value}: must {allowed}")
        if allowed is None and isinstance(value, float) and not math.isfinite(value):
            raise RangeError(f"{key}={value}: must be a finite number")
    values = dict(leaves(content))
    for key in ORDERED:
        low, high = values.get(f"{key}.0"), values.get(f"{key}.1")
        if low is not None and high is not None and low > high:
            raise RangeError(f"{key}=[{low},{high}]: the first must not be above the second")
