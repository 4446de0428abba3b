"""Which frames make a clip: pure index arithmetic."""

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]


def clip_span(frames: int, stride: int) -> int:
    """Number of source frames from the first to the last frame of a clip, both counted."""
    return (frames - 1) * stride + 1


def clip_at(offset: int, total: int, frames: int, stride: int) -> Indices:
    """Frames `offset, offset + stride, ...` of a video of `total` frames; past its end the last frame is held.

    Returns:
        `(frames,)` int64, each in 0..total-1.

    Raises:
        ValueError: if the video has no frames.
    """
    if total < 1:
        raise ValueError("the video has no frames")
    return np.minimum(offset + stride * np.arange(frames, dtype=np.int64), total - 1)


def train_indices(total: int, frames: int, stride: int, rng: np.random.Generator) -> Indices:
    """A clip at a uniformly random offset (paper Sec. 4.1: 16 frames at a stride of 4)."""
    room = max(total - clip_span(frames, stride), 0)
    return clip_at(int(rng.integers(room + 1)), total, frames, stride)


def view_indices(total: int, frames: int, stride: int, views: int) -> Indices:
    """Clips spread evenly over the video; one view is the centre, V views reach from its start to its end.

    Returns:
        `(views, frames)` int64.
    """
    room = max(total - clip_span(frames, stride), 0)
    offsets = [room / 2] if views == 1 else np.linspace(0, room, views)
    return np.stack([clip_at(int(offset), total, frames, stride) for offset in offsets])
