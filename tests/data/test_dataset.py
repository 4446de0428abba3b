import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

from stts_lightning.data.annotations import Video, VideoList
from stts_lightning.data.dataset import ClipDataset, ClipSpec, Reading, collate
from stts_lightning.data.decode import DecodeError
from stts_lightning.data.encode import write_mp4
from stts_lightning.data.transforms import ClipRandAugment, EvalTransform, TrainTransform


@pytest.fixture
def videos(tmp_path: Path) -> VideoList:
    write_mp4(tmp_path / "good.mp4", (np.full((48, 64, 3), 8 * i, np.uint8) for i in range(24)))
    (tmp_path / "bad.mp4").write_text("no video")
    return VideoList((Video(tmp_path / "good.mp4", 1), Video(tmp_path / "bad.mp4", 0)), ("a", "b"))


def test_training_replaces_and_reports(videos: VideoList) -> None:
    torch.manual_seed(0)
    dataset = ClipDataset(videos, ClipSpec(8, 2), TrainTransform(32), train=True)
    item = dataset[1]
    assert int(item.video) == 0
    assert int(item.label) == 1
    assert len(item.failures) >= 1
    assert {Path(f.path).name for f in item.failures} == {"bad.mp4"}
    batch = collate([dataset[0], item])
    assert batch.clip.shape == (2, 1, 3, 8, 32, 32)
    assert batch.clip.dtype == torch.uint8
    assert batch.failures == item.failures


def test_evaluation_raises_unless_allowed(videos: VideoList) -> None:
    with pytest.raises(DecodeError, match=r"bad.mp4: cannot be decoded"):
        ClipDataset(videos, ClipSpec(8, 2), EvalTransform(32), train=False)[1]
    item = ClipDataset(videos, ClipSpec(8, 2, 3), EvalTransform(32), train=False, reading=Reading(on_error="skip"))[1]
    assert not bool(item.valid)
    assert item.clip.shape == (3, 3, 8, 32, 32)


def test_all_files_broken_is_an_error(videos: VideoList) -> None:
    broken = VideoList(videos.videos[1:], videos.classes)
    with pytest.raises(DecodeError, match="20 training files in a row cannot be decoded; the last: .*bad.mp4"):
        ClipDataset(broken, ClipSpec(8, 2), TrainTransform(32), train=True)[0]


def test_one_draw_for_all_frames_of_a_clip() -> None:
    frame = torch.randint(0, 256, (1, 3, 60, 80), dtype=torch.uint8)
    for transform in (TrainTransform(32), TrainTransform(32, randaugment="rand-m7-n4-mstd0.5-inc1", copies=2)):
        drawn = []
        for _ in range(4):
            out = transform(frame.expand(8, -1, -1, -1))
            assert out.shape == (transform.copies, 8, 3, 32, 32)
            assert (out == out[:, :1]).all()
            drawn += list(out[:, 0])
        assert not any(torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i]), "copies and clips differ"


def test_randaugment_of_a_clip_is_timms_of_each_frame() -> None:
    policy = "rand-m7-n4-mstd0.5-inc1"
    frames = torch.randint(0, 256, (3, 3, 40, 50), dtype=torch.uint8)
    plain = rand_augment_transform(policy, {"translate_const": int(0.45 * 40), "interpolation": Image.Resampling.BICUBIC})
    for seed in range(8):
        torch.manual_seed(seed)
        out = ClipRandAugment(policy, (40, 50))(frames)
        torch.manual_seed(seed)
        drawn = int(torch.randint(2**31, ()))
        for frame, expected in zip(frames, out, strict=True):
            random.seed(drawn)
            np.random.seed(drawn)
            assert torch.equal(pil_to_tensor(plain(to_pil_image(frame))), expected)


@pytest.mark.parametrize("policy", ["m7", "rand-q7", "7"])
def test_an_unknown_policy_is_refused(policy: str) -> None:
    with pytest.raises(ValueError, match=f"randaugment='{policy}': expected as in rand-m7"):
        TrainTransform(32, randaugment=policy)


def test_copies_of_a_clip_stay_together(videos: VideoList) -> None:
    with pytest.raises(ValueError, match="copies=0: must be 1 or more"):
        TrainTransform(32, copies=0)
    item = ClipDataset(videos, ClipSpec(8, 2), TrainTransform(32, copies=3), train=True)[0]
    assert item.clip.shape == (3, 3, 8, 32, 32)
    assert collate([item, item]).clip.shape == (2, 3, 3, 8, 32, 32)


def test_evaluation_resizes_the_short_side_and_crops_the_centre() -> None:
    frame = torch.zeros(1, 3, 256, 340, dtype=torch.uint8)
    frame[:, :, :, 160:180] = 255
    out = EvalTransform(224)(frame)
    assert out.shape == (1, 1, 3, 224, 224)
    assert out[0, 0, 0, 100].float().argmax() == pytest.approx(102, abs=1)
    with pytest.raises(ValueError, match="short_side=100: must be at least the crop, 224 px, or 'crop', or null"):
        EvalTransform(224, 100)


@pytest.mark.parametrize("size", [(224, 340), (340, 224), (224, 224)])
def test_three_crops_along_the_longer_side(size: tuple[int, int]) -> None:
    frame = torch.arange(size[0] * size[1]).view(1, 1, *size).expand(2, 3, -1, -1) % 251
    crops = EvalTransform(224, 224, crops=3)(frame.to(torch.uint8))
    assert crops.shape == (3, 2, 3, 224, 224)
    down, right = (n - 224 for n in size)
    corners = [(down * i // 2, right * i // 2) for i in range(3)]
    for crop, (top, left) in zip(crops, corners, strict=True):
        assert torch.equal(crop, frame[:, :, top : top + 224, left : left + 224].to(torch.uint8))
    with pytest.raises(ValueError, match="test_crops=2: allowed are 1 and 3"):
        EvalTransform(224, crops=2)


def test_views_are_each_crop_of_each_clip(videos: VideoList) -> None:
    item = ClipDataset(videos, ClipSpec(8, 1, 2, "parts"), EvalTransform(32, 32, 3), train=False)[0]
    assert item.clip.shape == (6, 3, 8, 32, 32)
    brightness = item.clip.float().mean((1, 2, 3, 4))
    assert torch.equal(brightness[:3], brightness[:1].expand(3)), "three crops of one clip"
    assert brightness[3] > brightness[2], "then the later clip"


@pytest.mark.parametrize("picture", [(120, 180), (128, 190), (200, 100), (64, 96)])
def test_a_wide_crop_shows_as_much_as_it_can(picture: tuple[int, int]) -> None:
    frame = torch.zeros(1, 3, *picture, dtype=torch.uint8)
    frame[..., 1:-1, 1:-1] = 200  # a dark rim
    whole = EvalTransform((32, 48), "crop")(frame)
    assert whole.shape == (1, 1, 3, 32, 48)
    rim = whole[0, 0, 0].float()
    rows, columns = rim[[0, -1]].mean(), rim[:, [0, -1]].mean()
    assert min(rows, columns) < 198, "one pair of sides is seen to the rim"
    assert EvalTransform((32, 48))(frame).float().mean() > whole.float().mean(), "and not with the usual margin"
    assert EvalTransform((32, 48), "crop", crops=3)(frame).shape == (3, 1, 3, 32, 48)
