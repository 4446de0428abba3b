"""What a device would be asked to do, counted on the CPU."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "unique", "equal")
"""Operators whose result the host needs: it waits for the device."""
NOTHING = ("empty", "detach", "lift_fresh", "_to_copy_view")


class Launches(TorchDispatchMode):
    """Counts operators that compute, and those that wait; views and empty tensors are neither."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.waits = 0, list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        returned = [value.alias_info for value in func._schema.returns]
        is_view = any(info is not None and not info.is_write for info in returned)
        if name in WAITS:
            self.waits.append(name)
        if not is_view and not name.startswith(NOTHING):
            self.count += 1
        return func(*args, **(kwargs or {}))


def launches(work: Any) -> Launches:
    with torch.no_grad(), Launches() as counted:
        work()
    return counted
