"""Efficient video transformers with spatial-temporal token selection (STTS, ECCV 2022)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stts_lightning.classifier import VideoClassifier, create_model, list_models, load_model
    from stts_lightning.data.clips import read_clips
    from stts_lightning.selection.selector import Selection, Selector
    from stts_lightning.selection.slots import SlotBank
    from stts_lightning.selection.spec import SelectionSpec

__version__ = "0.2.0"
__all__ = [
    "Selection", "SelectionSpec", "Selector", "SlotBank", "VideoClassifier", "create_model", "list_models", "load_model",
    "read_clips",
]  # fmt: skip

_PLACES = {
    "Selection": "selection.selector",
    "SelectionSpec": "selection.spec",
    "Selector": "selection.selector",
    "SlotBank": "selection.slots",
    "read_clips": "data.clips",
}


def __getattr__(name: str) -> Any:
    # Lazy: a command's --help must not wait for torch.
    if name in __all__:
        return getattr(import_module(f"stts_lightning.{_PLACES.get(name, 'classifier')}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
