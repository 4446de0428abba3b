"""The truth of a video: in which frames the action is, and where in them. It lies as JSON beside the video, of the same name.

The file holds {"frames": [first, end), "size": [height, width], "boxes": [[x0, y0, x1, y1], ...]}, a box in pixels of that size
for each of these frames; whatever else it holds is not read.
"""

import json
from pathlib import Path

import torch
from torch import Tensor

from stts_lightning.data.annotations import AnnotationError
from stts_lightning.data.sampling import Indices


def truth_file(video: Path) -> Path:
    """Where the truth of a video lies."""
    return video.with_suffix(".json")


def read_truth(video: Path) -> tuple[int, Tensor]:
    """The first frame of the action, and a box for each of its frames as shares of the picture, `(N, 4)`: x0, y0, x1, y1.

    Raises:
        AnnotationError: if there is no file, or it does not hold what it should.
    """
    file = truth_file(video)
    try:
        content = json.loads(file.read_text())
        first, end = (int(number) for number in content["frames"])
        height, width = (float(side) for side in content["size"])
        boxes = torch.tensor(content["boxes"], dtype=torch.float32).view(end - first, 4)
    except FileNotFoundError:
        raise AnnotationError(f"{video}: dataset.truth=true needs {file.name} beside it, and there is none") from None
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise AnnotationError(
            f'{file}: expected {{"frames": [first, end], "size": [height, width], "boxes": [[x0, y0, x1, y1] of each frame]}} '
            f"({type(error).__name__}: {error})"
        ) from error
    return first, boxes / torch.tensor([width, height, width, height])


def boxes_at(video: Path, indices: Indices) -> Tensor:
    """Boxes of some frames of a video, `(T, 4)` as shares of the picture; NaN where they show no action."""
    first, boxes = read_truth(video)
    at = torch.from_numpy(indices.ravel()) - first
    inside = (at >= 0) & (at < len(boxes))
    return boxes[at.clamp(0, len(boxes) - 1)].masked_fill(~inside[:, None], torch.nan)
