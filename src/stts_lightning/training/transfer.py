"""Numbers from the host to the device without waiting for it."""

from collections.abc import Sequence

import torch
from torch import Tensor


def sent_to(numbers: Sequence[float], device: torch.device) -> Tensor:
    """Numbers as float32 on a device. To a GPU they come from pinned memory, whose copy waits for nothing."""
    values = torch.tensor(numbers, dtype=torch.float32)
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)
