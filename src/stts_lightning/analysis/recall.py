"""How well a temporal selector finds the frames in which something happens, where the truth is known."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from stts_lightning.classifier import VideoClassifier
from stts_lightning.data.annotations import VideoList
from stts_lightning.data.dataset import ClipDataset, ClipSpec
from stts_lightning.data.transforms import EvalTransform


class Recall(NamedTuple):
    """Share of the action's grid frames that a slot kept, the same for a random choice, and the top-1 beside it."""

    selector: float
    random: float
    top1: float


def temporal_recall(model: VideoClassifier, videos: VideoList, slot: str, stride: int, short_side: int | None) -> Recall:
    """Recall of a temporal slot before block 0 over the centre clips of videos with a truth file beside each (`demo`).

    A grid frame belongs to the action if one of the two source frames it covers does. Where the action fills more grid
    frames than may be kept, keeping only such frames counts as 1.
    """
    frames, *size = model.backbone.clip_size
    dataset = ClipDataset(videos, ClipSpec(frames, stride), EvalTransform(size, short_side), train=False)
    found, chance, right = [], [], 0
    model.eval()
    for item, video in zip((dataset[i] for i in range(len(dataset))), videos.videos, strict=True):
        truth = json.loads(Path(video.path).with_suffix(".json").read_text())
        # The clip that evaluation cuts, and which of its pairs of frames (the stem's temporal stride is 2) show the action.
        indices = dataset.sampling.views(truth["length"], 1)[0].reshape(-1, 2)
        action = ((indices >= truth["frames"][0]) & (indices < truth["frames"][1])).any(1)
        with torch.inference_mode():
            logits, kept = model(item.clip, return_selection=True)
        chosen = kept[slot].indices[0].numpy()
        possible = min(int(action.sum()), len(chosen))
        found.append(action[chosen].sum() / possible)
        # Expected hits of a random choice of K of M: K * |action| / M.
        chance.append(len(chosen) * action.mean() / possible)
        right += int(logits.argmax()) == video.label
    return Recall(float(np.mean(found)), float(np.mean(chance)), right / len(videos))
