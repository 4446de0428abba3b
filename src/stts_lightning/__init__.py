"""Efficient video transformers with spatial-temporal token selection (STTS, ECCV 2022)."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stts_lightning.classifier import VideoClassifier, create_model, load_model

__version__ = "0.1.0"
__all__ = ["VideoClassifier", "create_model", "load_model"]


def __getattr__(name: str) -> Any:
    # Lazy: a command's --help must not wait for torch.
    if name in __all__:
        from stts_lightning import classifier

        return getattr(classifier, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
