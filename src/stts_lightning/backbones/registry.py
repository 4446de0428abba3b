"""Backbones by name: one decorated factory each."""

from collections.abc import Callable
from typing import Any

from torch import nn

Factory = Callable[..., nn.Module]
_FACTORIES: dict[str, Factory] = {}


def register_backbone(factory: Factory) -> Factory:
    """Register a factory under its own name. Raises ValueError if the name is taken."""
    if factory.__name__ in _FACTORIES:
        raise ValueError(f"backbone {factory.__name__!r} is registered twice")
    _FACTORIES[factory.__name__] = factory
    return factory


def list_backbones() -> list[str]:
    """Names of all registered backbones."""
    return sorted(_FACTORIES)


def create_backbone(name: str, **kwargs: Any) -> nn.Module:
    """Build a backbone by name.

    Raises:
        ValueError: for an unknown name (lists the known ones), or an argument the backbone does not take.
    """
    if name not in _FACTORIES:
        raise ValueError(f"backbone {name!r} is unknown; known are {', '.join(list_backbones())}")
    try:
        return _FACTORIES[name](**kwargs)
    except TypeError as error:
        raise ValueError(f"backbone {name}: {error}") from error
