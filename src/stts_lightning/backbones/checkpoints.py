"""Published weights: read a file, recognise its layout by its keys, and load it so that nothing is left unsaid."""

# torch's own types have gaps.
# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import json
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stts_lightning.backbones.layouts import LAYOUTS, OWN, PARTS, Layout
from stts_lightning.backbones.registry import Backbone
from stts_lightning.errors import UserError
from stts_lightning.selection.spec import SelectionSpec

log = logging.getLogger(__name__)

State = dict[str, Tensor]
RECIPE = "recipe"
"""Name of the metadata under which a safetensors file of ours tells how its model is built."""
WRAPPERS = ("state_dict", "model_state", "model")
"""Keys under which a file holds its weights, the first that there is."""
LONE_WRAPPERS = ("model_state_dict", "module", "network", "weights", "state_dict_ema", "model_ema")
"""Further ones, for files with no tensor beside them: what trainers and DeepSpeed write, averages (of timm) last."""
PREFIXES = ("module.", "_orig_mod.", "_forward_module.", "model.", "net.", "network.")
"""What DDP and AveragedModel, torch.compile, DeepSpeed and LightningModules put before the keys of the model in them."""


_NO_SLOTS = SelectionSpec()


class CheckpointError(UserError):
    """A checkpoint that cannot be read, or does not fit the model: says what is missing, unexpected or mismatched."""


@dataclass(frozen=True)
class Checkpoint:
    """Weights under the keys of their file, the layout those keys have, and (own files) how the model was built."""

    path: Path
    layout: Layout
    state: State
    model: Mapping[str, Any] | None = None

    @property
    def selector_keys(self) -> list[str]:
        """Keys of selectors, in the file's own words."""
        return [key for key in self.state if re.match(r"(backbone\.)?((time|space)_score_predictor|slots)\.", key)]

    @property
    def pruned(self) -> bool:
        """Whether tokens were left out of its model, by selectors with weights or others, as far as the file says."""
        stated = (self.model or {}).get("selection")
        return bool(self.selector_keys or (isinstance(stated, Mapping) and stated.get("slots")))

    @property
    def num_classes(self) -> int | None:
        """Rows of the classifier's head; None where the file has none."""
        heads = (value.shape[0] for key, value in self.state.items() if _our_key(key, self.layout, _NO_SLOTS) == "head.weight")
        return next(heads, None)

    def backbone(self) -> dict[str, Any]:
        """Constructor arguments of the backbone that this file implies; one of ours hands on what its own start settled."""
        if self.layout is OWN:
            settled = {key for layout in LAYOUTS for key in (*layout.backbone, *layout.tuned)}
            return {key: value for key, value in (self.model or {}).items() if key in settled}
        return {**self.layout.backbone, **(self.layout.tuned if self.selector_keys else {})}

    def scorer(self, asked: str) -> str:
        """The scorer of this file's selectors: the one that is asked for, if the weights may be its or there are none."""
        if not self.selector_keys:
            return asked
        if self.layout is not OWN:
            return self.layout.scorer or asked
        stated = (self.model or {}).get("selection")
        if isinstance(stated, Mapping) and "scorer" in stated:
            return str(stated["scorer"])
        # The first that fits: the official code's has the other's layers as well.
        parts = {".scorer.features.": ("official", "deviation"), ".scorer.score.0.": ("context",), "": ("paper",)}
        fits = next(names for part, names in parts.items() if any(part in key for key in self.selector_keys))
        return asked if asked in fits else fits[0]

    def translated(self, selection: SelectionSpec) -> State:
        """The weights under our keys. Keys that no rule maps keep their name, so that a load reports them."""
        state: State = {}
        parts: dict[str, dict[str, Tensor]] = {}
        for key, value in self.state.items():
            ours, _, part = _our_key(key, self.layout, selection).partition("@")
            if "/" in ours:
                taken = (one.split("/") for one in ours.split())
                state |= {one: value.chunk(len(PARTS))[PARTS.index(letter)] for one, letter in taken}
            elif part:
                parts.setdefault(ours, {})[part] = value
            elif ours:
                state[ours] = value
        for ours, found in parts.items():
            if sorted(found) == sorted(PARTS):
                state[ours] = torch.cat([found[part] for part in PARTS])
            else:  # Reported as unexpected, beside the whole that is missing.
                state |= {f"{ours}@{part}": value for part, value in found.items()}
        return state


@dataclass(frozen=True)
class LoadReport:
    """What became of a file's weights, by our keys.

    Attributes:
        layout: name of the file's layout.
        loaded: weights that now hold the file's values.
        fitted: those of them that came in another geometry and were inflated or interpolated.
        fresh: weights of the model that stay as initialised: new selectors, or a new head.
        left_out: how many of the file's entries hold nothing a model needs: what is computed, or stood there twice.
    """

    layout: str
    loaded: tuple[str, ...]
    fitted: tuple[str, ...]
    fresh: tuple[str, ...]
    left_out: int

    def __str__(self) -> str:
        parts = [f"{self.layout} layout, {len(self.loaded)} weights loaded"]
        if self.fitted:
            parts.append(f"{len(self.fitted)} of them fitted to another size ({_some(self.fitted, 1)})")
        if self.fresh:
            slots = sorted({slot for key in self.fresh if (slot := _slot_of(key))})
            new = [f"{'reducer' if slot[0] == 'r' else 'selector'} {slot}" for slot in slots]
            new += ["head"] if any(key.startswith("head.") for key in self.fresh) else []
            parts.append(f"as initialised: {', '.join(new)}")
        return "; ".join(parts)


def read_checkpoint(path: str | Path, trust: bool = False) -> Checkpoint:
    """Read a checkpoint (torch.save or safetensors) and recognise its layout.

    Args:
        path: the file.
        trust: also read files that hold Python objects, which may run any code while they are read.

    Raises:
        CheckpointError: if there is no such file, it cannot be read, it holds more than plain tensors and containers and
            is not trusted, or its keys belong to no known layout.
    """
    path = Path(path)
    if not path.is_file():
        hint = ": a folder; give a file, as in its checkpoints/last.ckpt" if Path(path).is_dir() else ": no such file"
        raise CheckpointError(f"checkpoint {path}{hint}")
    return recognised(path, *_content(path, trust))


def recognised(path: Path, content: Mapping[str, Any], model: Mapping[str, Any] | None = None) -> Checkpoint:
    """Weights that were read, with the layout of their keys; the path is to name them. Raises as `read_checkpoint`."""
    state = _bare({str(key): value for key, value in content.items() if isinstance(value, Tensor)})
    for layout in LAYOUTS:
        if (layout is OWN and model) or all(key in state for key in layout.signature):
            return Checkpoint(path, layout, state, model)
    names = ", ".join(layout.name for layout in LAYOUTS)
    raise CheckpointError(f"checkpoint {path}: its keys ({_some(content)}) belong to none of the known layouts: {names}")


def _bare(state: State) -> State:
    """Weights without the prefixes that all of them carry. An AveragedModel's count of steps is not one of them."""
    weights = {key: value for key, value in state.items() if key != "n_averaged"}
    for prefix in PREFIXES:
        if weights and all(key.startswith(prefix) for key in weights):
            return _bare({key.removeprefix(prefix): value for key, value in weights.items()})
    # A LightningModule's file may hold more than the model: a loss, metrics.
    return {key.removeprefix("model."): value for key, value in state.items()}


def _content(path: Path, trust: bool) -> tuple[Mapping[str, Any], Mapping[str, Any] | None]:
    """The mapping that holds a file's weights, and our recipe if the file has one."""
    if text := _text(path):
        raise CheckpointError(f"checkpoint {path}: is text, not weights; it begins with {text!r}")
    if _is_safetensors(path):
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
            return load_file(path), json.loads(metadata[RECIPE]) if RECIPE in metadata else None
        except Exception as error:  # safetensors' own error type derives from Exception alone.
            raise CheckpointError(f"checkpoint {path}: damaged or cut short ({error})") from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=not trust)
    except UnpicklingError as error:
        if found := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise CheckpointError(
                f"checkpoint {path}: holds a Python object ({found[1]}) besides weights; reading it could run code hidden in "
                "the file. trust=true reads it all the same: only for files whose origin you trust"
            ) from error
        raise CheckpointError(f"checkpoint {path}: neither a torch nor a safetensors file") from error
    except (RuntimeError, EOFError, KeyError, ValueError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"checkpoint {path}: damaged or cut short ({reason})") from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"checkpoint {path}: holds a {type(content).__name__}, not a state dict")
    model = content.get("model") if "state_dict" in content else None
    model = model if isinstance(model, Mapping) and "backbone" in model else None  # Else not a recipe of ours.
    return _unwrapped(path, content), model


def _unwrapped(path: Path, content: Mapping[str, Any]) -> Mapping[str, Any]:
    """The weights of a file that may hold more than one set of them: the plain ones, rather than their average."""
    wrappers = [name for name in (*WRAPPERS, *LONE_WRAPPERS) if _holds_tensors(content.get(name))]
    if not wrappers or (wrappers[0] in LONE_WRAPPERS and _holds_tensors(content)):
        return content
    if others := ", ".join(wrappers[1:]):
        log.info("checkpoint %s: takes the weights under %s; there are others under %s", path, wrappers[0], others)
    return content[wrappers[0]]


def _holds_tensors(content: Any) -> bool:
    return isinstance(content, Mapping) and any(isinstance(value, Tensor) for value in content.values())


def _text(path: Path) -> str:
    """The first line of a text file, such as a page that a download got or a pointer of Git LFS; empty for others."""
    with path.open("rb") as file:
        begin = file.read(200)
    if any(byte < 32 and byte not in b"\t\n\r" for byte in begin):
        return ""
    return begin.decode(errors="ignore").strip().partition("\n")[0][:60].strip()


def _is_safetensors(path: Path) -> bool:
    """Eight bytes of length, then a JSON header; a name proves nothing."""
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def load_checkpoint(model: nn.Module, checkpoint: Checkpoint, selection: SelectionSpec, head: str = "keep") -> LoadReport:
    """Load weights; fail unless all that is missing is new selectors (and the head, with head="reset").

    Args:
        model: a `VideoClassifier`, filled in place.
        checkpoint: from `read_checkpoint`.
        selection: the model's slots, in whose order the file numbers its selectors.
        head: "keep" loads the classifier's head; "reset" leaves the new one.

    Raises:
        CheckpointError: for a file of another family; else with every missing, unexpected and mismatched key by kind.
    """
    if head not in ("keep", "reset"):
        raise CheckpointError(f"head={head!r}: must be 'keep' or 'reset'")
    backbone = model.get_submodule("backbone")
    assert isinstance(backbone, Backbone)
    made_for = checkpoint.model or {}
    family = type(backbone).__name__
    if checkpoint.layout.family not in (None, family):
        raise CheckpointError(
            f"checkpoint {checkpoint.path} ({checkpoint.layout.name} layout): holds a {checkpoint.layout.family}; "
            f"the model is a {family}"
        )
    target = model.state_dict()
    state = checkpoint.translated(selection)
    left_out = sum(not _our_key(key, checkpoint.layout, selection) for key in checkpoint.state)
    if head == "reset":
        state = {key: value for key, value in state.items() if not key.startswith("head.")}
    fitted = []
    for key in [k for k, v in state.items() if k in target and v.shape != target[k].shape]:
        state[key], changed = _fit(backbone, key, state[key], target[key], made_for)
        fitted += [key] if changed else []
    slots = {slot for key in state if (slot := _slot_of(key))}
    fresh = [key for key in target if key not in state and _may_stay_as_initialised(key, slots, head)]
    missing = [key for key in target if key not in state and key not in fresh]
    unexpected = [key for key in state if key not in target]
    mismatched = [
        f"{key} {tuple(value.shape)} for {tuple(target[key].shape)}"
        for key, value in state.items()
        if key in target and value.shape != target[key].shape
    ]
    if missing or unexpected or mismatched:
        hint = f"; it was made as {made_for['backbone']}" if made_for.get("backbone") else ""
        if others := sorted(slots - {slot.name for slot in selection.slots}):
            hint += f"; it has selectors of {', '.join(others)}: give their ratios too, as in selection={others[0]}_0.6"
        if any(text.startswith("head.weight") for text in [*mismatched, *missing]):
            hint += "; the class count differs: head=reset leaves the new head as initialised"
        raise CheckpointError(
            f"checkpoint {checkpoint.path} ({checkpoint.layout.name} layout) does not fit the model: "
            f"{len(missing)} missing [{_some(missing)}], {len(unexpected)} unexpected [{_some(unexpected)}], "
            f"{len(mismatched)} of another shape [{_some(mismatched)}]{hint}"
        )
    model.load_state_dict(state, strict=False)
    return LoadReport(checkpoint.layout.name, tuple(state), tuple(fitted), tuple(fresh), left_out)


def save_weights(model: nn.Module, recipe: Mapping[str, Any], path: str | Path, notes: Mapping[str, str] | None = None) -> None:
    """Write a model as safetensors that `create_model(**recipe, pretrained=path)` reads back; notes become metadata."""
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    save_file(state, path, metadata={**(notes or {}), RECIPE: json.dumps(dict(recipe))})


def _slot_of(key: str) -> str:
    """Name of the selector or reducer that one of our keys belongs to; empty for none."""
    found = re.search(r"\.slots\.(?:selectors|reducers)\.(\w+)\.", key)
    return found[1] if found else ""


def _our_key(key: str, layout: Layout, selection: SelectionSpec) -> str:
    for pattern, replacement in layout.rules:
        if re.fullmatch(pattern, key):
            return _place(re.sub(pattern, replacement, key), selection)
    return key


def _place(key: str, selection: SelectionSpec) -> str:
    """Resolve "<time 0>", the n-th temporal selector in the order of blocks, to the slot of that number."""
    match = re.match(r"<(time|space) (\d+)>\.", key)
    if not match:
        return key
    names = [s.name for s in sorted(selection.slots, key=lambda slot: slot.block) if s.axis == match[1][0]]
    number = int(match[2])
    return key.replace(match[0], f"backbone.slots.selectors.{names[number]}.") if number < len(names) else key


def _fit(backbone: Backbone, key: str, value: Tensor, target: Tensor, made_for: Mapping[str, Any]) -> tuple[Tensor, bool]:
    """A weight in the target's shape where that is possible, and whether its values changed on the way."""
    # Files differ in leading axes of size 1 (a class token of (96,) or (1, 1, 96)): the same numbers.
    if [n for n in value.shape if n != 1] == [n for n in target.shape if n != 1]:
        return value.reshape(target.shape), False
    if not key.startswith("backbone."):
        return value, False
    return backbone.adapt_weight(key.removeprefix("backbone."), value, made_for), True


def _may_stay_as_initialised(key: str, slots_in_file: set[str], head: str) -> bool:
    """Weights of a slot that the file knows nothing of, and of a head that is to be new."""
    if slot := _slot_of(key):
        return slot not in slots_in_file
    return head == "reset" and key.startswith("head.")


def _some(keys: Iterable[str], limit: int = 4) -> str:
    keys = list(keys)
    return ", ".join(keys[:limit]) + (f", and {len(keys) - limit} more" if len(keys) > limit else "")
