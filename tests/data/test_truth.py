"""The truth beside a video follows its frames through sampling, crop and flip."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from stts_lightning.data.annotations import AnnotationError, Video, VideoList
from stts_lightning.data.dataset import ClipDataset, ClipSpec, collate
from stts_lightning.data.encode import write_mp4
from stts_lightning.data.transforms import EvalTransform, TrainTransform
from stts_lightning.data.truth import boxes_at, read_truth

FRAMES, HEIGHT, WIDTH = 10, 40, 60


@pytest.fixture
def video(tmp_path: Path) -> Path:
    """A white rectangle on black that moves to the right in frames 3 to 7."""
    images = np.zeros((FRAMES, HEIGHT, WIDTH, 3), np.uint8)
    boxes = []
    for frame in range(3, 8):
        left = 4 * frame
        images[frame, 12:24, left : left + 16] = 255
        boxes.append([left, 12, left + 16, 24])
    write_mp4(tmp_path / "v.mp4", images, crf=5)
    truth = {"frames": [3, 8], "size": [HEIGHT, WIDTH], "boxes": boxes}
    (tmp_path / "v.json").write_text(json.dumps(truth))
    return tmp_path / "v.mp4"


def test_boxes_of_frames_as_shares_of_the_picture(video: Path) -> None:
    boxes = boxes_at(video, np.array([2, 3, 7, 8]))
    assert boxes[[0, 3]].isnan().all()
    assert torch.allclose(boxes[1], torch.tensor([12 / 60, 12 / 40, 28 / 60, 24 / 40]))
    assert torch.allclose(boxes[2, 0], torch.tensor(28 / 60))


@pytest.mark.parametrize(
    "content", ["", "[]", '{"frames": [3, 8], "size": [4, 4], "boxes": [[0, 0, 1, 1]]}', '{"frames": [3, 8], "size": [4, 4]}']
)
def test_a_file_that_does_not_say_it_is_named(video: Path, content: str) -> None:
    video.with_suffix(".json").write_text(content)
    with pytest.raises(AnnotationError, match=r'v\.json: expected \{"frames": \[first, end\]'):
        read_truth(video)
    video.with_suffix(".json").unlink()
    with pytest.raises(AnnotationError, match=r"v\.mp4: dataset.truth=true needs v.json beside it"):
        read_truth(video)


def bright(picture: Tensor) -> tuple[float, float, float, float] | None:
    """Box of what is white in `(3, H, W)`, as shares of the picture."""
    rows, columns = (picture.float().mean(0) > 127).nonzero(as_tuple=True)
    if not len(rows):
        return None
    height, width = picture.shape[1:]
    return (
        int(columns.min()) / width,
        int(rows.min()) / height,
        (int(columns.max()) + 1) / width,
        (int(rows.max()) + 1) / height,
    )


@pytest.mark.parametrize("kind", ["train", "centre", "three crops"])
def test_boxes_lie_where_the_action_is_in_the_clip(video: Path, kind: str) -> None:
    trained = TrainTransform(32, scale=(0.5, 1.0), flip=0.5, copies=2)
    transform = trained if kind == "train" else EvalTransform(32, None, 1 if kind == "centre" else 3)
    clip = ClipSpec(8, 1, views=2)
    dataset = ClipDataset(
        VideoList([Video(video, 0)], ("a",)), clip, transform, train=kind == "train", boxes=transform.with_boxes
    )
    compared = 0
    for seed in range(6):
        torch.manual_seed(seed)
        batch = collate([dataset[0], dataset[0]])
        assert batch.truth is not None and batch.truth.shape == (2, batch.clip.shape[1], 8, 4)
        for clips, boxes in zip(batch.clip.flatten(0, 1), batch.truth.flatten(0, 1), strict=True):
            for picture, box in zip(clips.transpose(0, 1), boxes, strict=True):
                seen = bright(picture)
                assert (seen is None) == bool(box.isnan().any()) or bool((box[2:] - box[:2]).min() < 0.04), "gone alike"
                if seen is not None and not box.isnan().any():
                    assert torch.allclose(box, torch.tensor(seen), atol=0.06)
                    compared += 1
    assert compared > 20


def test_boxes_change_nothing_about_the_pixels(video: Path) -> None:
    transform = TrainTransform(32, scale=(0.5, 1.0), flip=0.5, copies=2)
    videos = VideoList([Video(video, 0)], ("a",))
    clips = []
    for boxes in (None, transform.with_boxes):
        torch.manual_seed(3)
        clips.append(ClipDataset(videos, ClipSpec(8, 1), transform, train=True, boxes=boxes)[0])
    assert torch.equal(clips[0].clip, clips[1].clip)
    assert type(clips[1].clip) is Tensor and type(clips[1].truth) is Tensor
    assert clips[0].truth is None
