"""Plain containers, as a configuration is once it is read."""

from collections.abc import Iterator, Mapping
from typing import Any


def leaves(content: Any, key: str = "", lists: bool = True) -> Iterator[tuple[str, Any]]:
    """Values of nested containers by full key, as `optim.betas.0`. An empty container is a value.

    Args:
        content: mappings and lists.
        key: of the content itself.
        lists: whether lists are gone into, by number, or are values.
    """
    if isinstance(content, Mapping) and content:
        pairs = list(content.items())
    elif isinstance(content, list | tuple) and content and lists:
        pairs = list(enumerate(content))
    else:
        yield key, content
        return
    for name, value in pairs:
        yield from leaves(value, f"{key}.{name}" if key else str(name), lists)
