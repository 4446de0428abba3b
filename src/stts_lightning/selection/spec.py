"""What to select and where: the paper's notation (T_R^L, S_R^L) as plain data, and what a ratio means as an integer.

Beside `t` and `s`, a slot `r` stands for a reducer (see `reducer`): `r3_0.7` keeps 0.7 of the tokens of block 3, and `r0-11_65`
takes 65 tokens away in each of the blocks 0 to 11.
"""

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace
from importlib import import_module
from typing import Any, Self, TypeVar

from stts_lightning.errors import UserError

T = TypeVar("T")

_SLOT_NAME = re.compile(r"[ts]\d+|r\d+(-\d+)?")
_NOTATION = re.compile(r"([ts]\d+|r\d+(?:-\d+)?)_(\d+(?:\.\d+)?)(?:_(?=[tsr])|$)")

PAPER_SELECTIONS = (
    "none", "t0_0.4", "t0_0.5", "t0_0.6", "t0_0.7", "t0_0.8", "t0_0.9", "t4_0.3", "s0_0.5", "s0_0.6", "s4_0.3",
    "t0_0.4_s4_0.6", "t0_0.5_s4_0.7", "t0_0.6_s4_0.9", "t0_0.8_s4_0.9", "t0_0.9_s4_0.9", "t0_0.8_s0_0.7",
    "t4_0.6_s4_0.7_t8_0.4_s8_0.7", "t0_0.9_s0_0.9_t4_0.7_s4_0.7", "t0_0.9_s0_0.9_t4_0.9_s4_0.9_t8_0.7_s8_0.8",
)  # fmt: skip
"""The unpruned model and every selection of the paper's Tables 1 to 8."""

CHOICES = {
    "normalize": ("scorer", "tokens", "windows"),
    "scope": ("frame", "clip"),
    "frames": ("each", "segment"),
    "first_frame": ("own", "next"),
    "windows": ("frame", "clip", "smooth", "motion"),
    "forward": ("soft", "hard"),
    "sigma_of": ("scores", "spread"),
    "start": ("random", "small", "small_frames", "even"),
}
"""Ways to learn a selection, each apart from the others. The first of each is the paper's, or torch's where it says nothing."""


class SelectionError(UserError):
    """A selection that cannot be honoured: names the key, the value found and what is allowed."""


def frames_kept(frames: int, ratio: float) -> int:
    """Number of frames that a temporal ratio keeps: round(M * ratio), Sec. 4.1; `round` sends halves to even."""
    return round(frames * ratio)


def side_kept(side: int, ratio: float) -> int:
    """Side of the window that a spatial ratio (a share of the tokens) keeps: round(H * sqrt(ratio))."""
    return round(side * math.sqrt(ratio))


AMOUNTS = {"t": ("ratio", "keep"), "s": ("ratio", "side"), "r": ("ratio", "drop", "threshold")}
"""Ways to say how much the slots of an axis keep."""


@dataclass(frozen=True)
class SlotSpec:
    """One selector or reducer at one place.

    Attributes:
        name: `t` (temporal), `s` (spatial) or `r` (reducer) and the self-attention block, from 0, before or in which it acts:
            `t0`, `s4`, `r3`; a reducer may act in a range of blocks, `r0-11`.
        ratio: share of the frames (t), of the tokens of a frame (s) or of the tokens (r) to keep, in (0, 1].
        keep: number of frames to keep, instead of what the ratio says (t only).
        side: side of the window to keep, in tokens, instead of what the ratio says (s only).
        drop: number of tokens to take away, instead of what the ratio says (r only).
        threshold: keep tokens that changed by more (r only; the reducers `rlt` and `rlt_lengths`).
        place: where in the block a reducer acts, "inside" it or "before" it; None is its usual place (r only).
        selector: which, by name (see `SELECTORS`, `REDUCERS`) or by the dotted path of a class; None is the selection's.
    """

    name: str
    ratio: float | None = None
    keep: int | None = None
    side: int | None = None
    drop: int | None = None
    threshold: float | None = None
    place: str | None = None
    selector: str | None = None

    def __post_init__(self) -> None:
        if not _SLOT_NAME.fullmatch(self.name) or not self.blocks:
            raise SelectionError(
                f"selection.slots.{self.name}: a slot is called t<block>, s<block>, r<block> or r<first>-<last>, as in t0"
            )
        allowed = AMOUNTS[self.axis]
        given = {
            key: value for key in ("ratio", "keep", "side", "drop", "threshold") if (value := getattr(self, key)) is not None
        }
        for key, value in given.items():
            if key not in allowed:
                raise SelectionError(f"selection.slots.{self.name}.{key}={value}: slots {self.axis} take {_either(allowed)}")
        if not given:
            raise SelectionError(f"selection.slots.{self.name}: give {_either(allowed)}")
        if self.ratio is not None and not 0 < self.ratio <= 1:
            # 05, 5 or 50 for a half.
            share = self.ratio / (10 if self.ratio < 10 else 100)
            whole = 1 < self.ratio < 100 and self.ratio % 1 == 0
            hint = f"; did you mean {share:g}, as in {self.name}_{share:g}?" if whole else ""
            raise SelectionError(f"selection.slots.{self.name}.ratio={self.ratio}: must lie in (0, 1]{hint}")
        if self.place is not None and (self.axis != "r" or self.place not in ("inside", "before")):
            raise SelectionError(f"selection.slots.{self.name}.place={self.place}: inside or before, of slots r alone")
        if self.drop is not None and self.drop < 0:
            raise SelectionError(f"selection.slots.{self.name}.drop={self.drop}: must be 0 or more")

    @property
    def axis(self) -> str:
        """`t`, `s` or `r`."""
        return self.name[0]

    @property
    def blocks(self) -> range:
        """Numbers of the self-attention blocks before or in which the slot acts."""
        first, _, last = self.name[1:].partition("-")
        return range(int(first), int(last or first) + 1)

    @property
    def block(self) -> int:
        """The first of them."""
        return self.blocks[0]

    @property
    def given(self) -> str:
        """How much it keeps, as in "ratio=0.7"."""
        return next(f"{key}={value}" for key in AMOUNTS[self.axis][::-1] if (value := getattr(self, key)) is not None)

    def to_dict(self) -> dict[str, Any]:
        """What was given, as plain values."""
        return {
            field.name: value
            for field in fields(self)
            if field.name != "name" and (value := getattr(self, field.name)) is not None
        }

    def _check(self, key: str, value: int, limit: int, what: str) -> int:
        if not 1 <= value <= limit:
            given = f"ratio={self.ratio} (that is {value} {what})" if getattr(self, key) is None else f"{key}={value}"
            raise SelectionError(f"selection.slots.{self.name}.{given}: must keep 1 to {limit} {what} at this place")
        return value

    def frames(self, available: int) -> int:
        """Frames kept of those available. Raises SelectionError where that is impossible."""
        value = self.keep if self.keep is not None else frames_kept(available, float(self.ratio or 0))
        return self._check("keep", value, available, "frames")

    def tokens(self, available: int) -> int:
        """Tokens that a reducer keeps of those available; all of them where a threshold decides."""
        if self.drop is not None:
            return available - self.drop
        return available if self.ratio is None else round(available * self.ratio)

    def window(self, height: int, width: int) -> tuple[int, int]:
        """Height and width, in tokens, of the window kept of a frame. Raises SelectionError where that is impossible."""
        if self.side is not None:
            side = self._check("side", self.side, min(height, width), "tokens a side")
            return side, side
        ratio = float(self.ratio or 0)
        return (
            self._check("side", side_kept(height, ratio), height, "tokens a side"),
            self._check("side", side_kept(width, ratio), width, "tokens a side"),
        )


@dataclass(frozen=True)
class SelectionSpec:
    """All slots of a model, and the operator they share.

    Attributes:
        slots: the slots; an empty tuple is the unpruned model.
        sigma: standard deviation of the noise of Eq. 7, on scores that lie in [0, 1].
        scorer: `paper` (Eq. 2-3), `official` (the released code's, which published checkpoints hold), `context` or `deviation`
            (see `SCORERS`).
        estimator: `monte_carlo` (Eq. 7-8), `exact` (the expectation that it estimates) or `official` (Eq. 7 with only the
            diagonal of the Jacobian of Eq. 8).
        samples: number n of noise samples; `exact` needs none.
        selector: of the slots that name none: `learned` (the paper's), or one of its siblings (see `SELECTORS`).
        normalize: spatial: bring scores to [0, 1] as `tokens`, before they are averaged in windows, or as `windows`, after
            that; `scorer`: as its family does (the paper: tokens, the official code: windows).
        scope: spatial: scores are brought to [0, 1] in each `frame`, or over all frames of a `clip`.
        frames: temporal: the best frames, `each` for itself, or the `segment` of consecutive frames with the highest mean score.
            `random` draws a segment; `uniform` and `centre` do not follow it.
        first_frame: temporal, before block 0: the first frame is scored by its `own` tokens, or as the `next` one. In an
            MViT they have seen the zeros that its patch embedding pads a clip with, and look like no others, whatever is shown.
            Where no temporal slot stands there, windows by `motion` and by `difference` leave it out as well, of more than two.
        windows: spatial: a window of each `frame`, one window of the `clip` (scores are averaged over time), windows that move
            little from frame to frame (`smooth`: averaged over three frames), or one window of the clip of which `motion` is
            scored: the standard deviation over time of the tokens at each place. Then what stands still has no effect: the
            scene, and the place itself, which position embeddings tell. Selectors that learn nothing take it as `clip`;
            `tokens` and `random_tokens` keep no windows, and take no notice of any of these.
        forward: what the network sees in training: `soft`, the weighted sum of Eq. 9, or `hard`, the best frames or windows
            as in evaluation, with the gradients of the weighted sum (straight-through).
        reducer: of the slots `r` that name none (see `REDUCERS`).
        proportional_attention: reducers that merge: a token that stands for n others receives as much attention as n would.
        proportional_pooling: reducers that merge: in the mean of all tokens it counts n times.
        start: new scorers begin with `random` weights, as any layer, whose scores are stretched to [0, 1] and may avoid the
            action; `small`: with random weights, but ranges below 1 are not stretched, so that nearly all candidates are mixed at
            first; `small_frames`: the same of temporal slots and reducers, while spatial slots begin as with `random`; or
            `even`: as `small`, and all scores are equal (the last layer is 0).
        sigma_of: sigma is given on `scores` in [0, 1], or as a multiple of their `spread`, the standard deviation of a row.
    """

    slots: tuple[SlotSpec, ...] = ()
    sigma: float = 0.1
    scorer: str = "paper"
    estimator: str = "monte_carlo"
    samples: int = 500
    selector: str = "learned"
    normalize: str = "scorer"
    scope: str = "frame"
    frames: str = "each"
    first_frame: str = "own"
    windows: str = "frame"
    forward: str = "soft"
    sigma_of: str = "scores"
    start: str = "random"
    reducer: str = "tome"
    proportional_attention: bool = True
    proportional_pooling: bool = True

    def __post_init__(self) -> None:
        for key, allowed in CHOICES.items():
            if (value := getattr(self, key)) not in allowed:
                raise SelectionError(f"selection.{key}={value!r}: allowed are {', '.join(allowed)}")
        if self.sigma < 0:
            raise SelectionError(f"selection.sigma={self.sigma}: must be 0 or more")
        if self.samples < 2:
            raise SelectionError(f"selection.samples={self.samples}: must be 2 or more")
        names = [slot.name for slot in self.slots]
        names += [f"r{block}" for slot in self.slots if len(slot.blocks) > 1 for block in slot.blocks]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise SelectionError(f"selection.slots: {', '.join(twice)} named twice; a place has one slot an axis")

    def with_scorer(self, scorer: str) -> Self:
        """Return the same selection with another scorer."""
        return replace(self, scorer=scorer)

    @classmethod
    def of(cls, selection: "SelectionSpec | str | Mapping[str, Any] | None") -> "SelectionSpec":
        """Read a selection given as the paper's notation, as a mapping (`selection` of a configuration), or as itself.

        Args:
            selection: "none" or None; "t0_0.6_s4_0.9"; or {"slots": {"t0": {"ratio": 0.6}}, "sigma": 0.1, ...}.

        Raises:
            SelectionError: on unknown keys, unreadable notation or values out of range.
        """
        if isinstance(selection, SelectionSpec):
            return selection
        if selection is None or isinstance(selection, str):
            return cls(slots=_parse(selection or "none"))
        return cls._of_mapping(selection)

    @classmethod
    def _of_mapping(cls, selection: Mapping[str, Any]) -> "SelectionSpec":
        values = {key: value for key, value in selection.items() if key != "name"}
        allowed = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - allowed):
            raise SelectionError(f"selection.{unknown[0]}: unknown key; allowed are {', '.join(sorted(allowed))}")
        slots: Mapping[str, Any] = values.pop("slots", None) or {}
        return cls(slots=tuple(_slot(name, slot) for name, slot in slots.items()), **values)

    def to_dict(self) -> dict[str, Any]:
        """The mapping that `of` reads back as this selection: plain containers, for files."""
        shared = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "slots"}
        return {**shared, "slots": {slot.name: slot.to_dict() for slot in self.slots}}

    def ways(self, keys: Collection[str] = tuple(CHOICES)) -> str:
        """What is done otherwise than in the paper, of some keys, as in "normalize=windows, windows=clip"; empty for nothing."""
        changed = (key for key, values in CHOICES.items() if key in keys and getattr(self, key) != values[0])
        return ", ".join(f"{key}={getattr(self, key)}" for key in changed)

    def __str__(self) -> str:
        # A number of frames or tokens is no ratio: t0=5, s0=45x45.
        forms = {"keep": "={0}", "side": "={0}x{0}", "threshold": "_over{0}"}
        parts: list[str] = []
        for slot in self.slots:
            key, _, amount = slot.given.partition("=")
            parts.append(slot.name + forms.get(key, "_{0}").format(amount))
        return "_".join(parts) or "none"


def _slot(name: str, values: Mapping[str, Any] | float | int) -> SlotSpec:
    if isinstance(values, int | float):
        return _noted(name, float(values))
    values = dict(values)
    values["selector"] = values.pop("_target_", None) or values.pop("selector", None)
    allowed = [field.name for field in fields(SlotSpec) if field.name != "name"]
    if unknown := sorted(set(values) - set(allowed)):
        raise SelectionError(f"selection.slots.{name}.{unknown[0]}: unknown key; allowed are {', '.join(allowed)}")
    if values["selector"] and "." in values["selector"]:
        selector_class(values["selector"])  # Refused now, not when the model is built.
    return SlotSpec(name, **values)


def selector_class(path: str) -> type:
    """The class that a dotted path names. Raises SelectionError if there is none."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise SelectionError(f"selection: no selector class {path!r} ({error})") from error


def subclass_at(path: str, base: type[T], key: str) -> type[T]:
    """The class that a dotted path names, given by a key. Raises SelectionError if it is no subclass of a base."""
    chosen = selector_class(path)
    if not (isinstance(chosen, type) and issubclass(chosen, base)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise SelectionError(f"{key}={path!r}: not a subclass of {base.__name__}")
    return chosen


def is_notation(text: str) -> bool:
    """Whether a text is slots in the paper's notation, as in t0_0.6_s4_0.9, possible or not."""
    return bool(text) and "".join(match.group(0) for match in _NOTATION.finditer(text)) == text


def _parse(text: str) -> tuple[SlotSpec, ...]:
    if text == "none":
        return ()
    if not is_notation(text):
        raise SelectionError(f"selection={text!r}: expected none, or slots as in t0_0.6_s4_0.9 (axis, block, ratio)")
    return tuple(_noted(name, float(amount)) for name, amount in _NOTATION.findall(text))


def _noted(name: str, amount: float) -> SlotSpec:
    """A slot as the notation has it: for a reducer, whole numbers above 1 are tokens to take away."""
    if name[0] == "r" and amount > 1 and amount.is_integer():
        return SlotSpec(name, drop=int(amount))
    return SlotSpec(name, ratio=amount)


def _either(keys: tuple[str, ...]) -> str:
    return f"{', '.join(keys[:-1])} or {keys[-1]}"
