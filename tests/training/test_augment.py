"""Augmentation of batches: boxes in space alone, the same in all frames, and labels that say what a clip holds."""

import random
from importlib.metadata import version
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from launches import launches
from packaging.version import Version
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing

from stts_lightning.training.augment import BatchAugment, drawn_mix, erased_box

SHAPE = (8, 3, 5, 24, 32)


def clips() -> tuple[torch.Tensor, torch.Tensor]:
    """Clip i is all of value i, and of class i."""
    return torch.arange(8.0).view(-1, 1, 1, 1, 1).expand(SHAPE).clone(), torch.arange(8)


def draws(seed: int) -> list[int]:
    return [100 * seed + i for i in range(8)]


def test_cutmix_label_is_the_share_of_the_picture_and_the_box_spans_all_frames() -> None:
    areas = []
    for seed in range(30):
        clip, target = BatchAugment(8, cutmix=1.0)(*clips(), draws(seed))
        for i in range(8):
            own = (clip[i] == i)[0]  # (T, H, W)
            other = (clip[i] == i ^ 1)[0]
            assert (own | other).all()
            assert (own == own[:1]).all(), "the box is the same in all frames"
            assert target[i, i] == pytest.approx(float(own.float().mean()), abs=1e-6)
            assert target[i, i ^ 1] == pytest.approx(1 - float(own.float().mean()), abs=1e-6)
        areas += target.diagonal()[::2].tolist()
    assert len(set(areas)) > 60
    assert min(areas) < 0.3
    assert max(areas) > 0.7


def test_mixup_weighs_clips_as_labels() -> None:
    for seed in range(10):
        clip, target = BatchAugment(8, mixup=0.8)(*clips(), draws(seed))
        expected = (target * torch.arange(8.0)).sum(1)
        torch.testing.assert_close(clip[:, 0, 0, 0, 0], expected)
        assert torch.equal(clip.amin((1, 2, 3, 4)), clip.amax((1, 2, 3, 4)))
        torch.testing.assert_close(target.sum(1), torch.ones(8))


def test_mixup_and_cutmix_alternate() -> None:
    kinds = set()
    for seed in range(12):
        clip, _ = BatchAugment(8, mixup=0.8, cutmix=1.0)(*clips(), draws(seed))
        kinds.add("mixup" if bool((clip[0] != 0).all()) else "cutmix")
    assert kinds == {"mixup", "cutmix"}


def test_erasing_fills_one_box_in_all_frames_with_noise() -> None:
    erased = 0
    for seed in range(20):
        clip, label = BatchAugment(8, erasing=0.25)(*clips(), draws(seed))
        assert torch.equal(label, torch.arange(8)), "labels stay"
        changed = clip != torch.arange(8.0).view(-1, 1, 1, 1, 1)
        for one in changed.all(1):  # (T, H, W)
            assert (one == one[:1]).all()
            erased += bool(one.any())
            rows, columns = one[0].any(1).nonzero()[:, 0], one[0].any(0).nonzero()[:, 0]
            if len(rows):
                box = len(rows) * len(columns)
                assert box == int(one[0].sum()), "a box"
                assert 0.01 < box / (24 * 32) < 0.36
    assert 0.12 < erased / 160 < 0.40


def test_the_draw_follows_from_the_seed_and_leaves_the_generators() -> None:
    augment = BatchAugment(8, mixup=0.8, cutmix=1.0, erasing=0.5)
    before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state())  # type: ignore[union-attr]
    a, b, c = (augment(*clips(), draws(seed)) for seed in (1, 1, 2))
    assert torch.equal(a[0], b[0])
    assert torch.equal(a[1], b[1])
    assert not torch.equal(a[0], c[0])
    after = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state())  # type: ignore[union-attr]
    assert before[:2] == after[:2]
    assert torch.equal(before[2], after[2])


def test_the_last_of_an_odd_batch_goes_unmixed_and_odd_batches_are_refused() -> None:
    augment = BatchAugment(8, mixup=0.8)
    clip, label = clips()
    same, target = augment(clip[:3].clone(), label[:3], draws(0)[:3])
    assert torch.equal(same[2], clip[2]) and not torch.equal(same[:2], clip[:2])
    assert torch.equal(target[2], torch.eye(8)[2])
    augment.check_batch(4)
    with pytest.raises(ValueError, match="even number of videos a device; here it is 3"):
        augment.check_batch(3)


def test_what_becomes_of_a_clip_does_not_depend_on_the_batch_around_its_pair() -> None:
    augment = BatchAugment(8, mixup=0.8, cutmix=1.0, erasing=0.5)
    (clip, label), seeds = clips(), draws(3)
    whole = augment(clip.clone(), label, seeds)
    for part in (slice(0, 4), slice(4, 8)):
        for one, other in zip(whole, augment(clip[part].clone(), label[part], seeds[part]), strict=True):
            assert torch.equal(one[part], other)


def test_copies_of_a_video_meet_the_next_video_not_each_other() -> None:
    clip, target = BatchAugment(8, mixup=0.8)(*clips(), draws(1)[:4])  # Two copies each: clips 0 and 1 are of the first.
    for i in range(8):
        assert target[i].nonzero().flatten().tolist() == sorted((i, i ^ 2)), "mixed with the same copy of the neighbour"
    torch.testing.assert_close(clip[:, 0, 0, 0, 0], (target * torch.arange(8.0)).sum(1))


@pytest.mark.parametrize("values", [{"mixup": -1.0}, {"cutmix": -0.1}, {"erasing": 1.5}])
def test_values_out_of_range_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"augment.{next(iter(values))}="):
        BatchAugment(8, **values)


FULL_BOXES = Version("1.0.31")
"""Of timm: in earlier ones, boxes of odd sides are a pixel short."""


def same_distribution(ours: list[float], theirs: list[float]) -> bool:
    """Kolmogorov and Smirnov's test of two samples, at one in a thousand."""
    places = np.sort(np.concatenate([ours, theirs]))
    ranks = [np.searchsorted(np.sort(sample), places, side="right") / len(sample) for sample in (ours, theirs)]
    return bool(np.abs(ranks[0] - ranks[1]).max() < 1.95 * np.sqrt(1 / len(ours) + 1 / len(theirs)))


@pytest.mark.parametrize("alphas", [(0.8, 1.0), (0.8, 0.0), (0.0, 0.5)])
def test_mixes_are_distributed_as_timms(alphas: tuple[float, float]) -> None:
    np.random.seed(0)
    draws, size = 3000, (24, 32)
    mixing = Mixup(*alphas, label_smoothing=0.0, num_classes=2)
    theirs: dict[str, list[Any]] = {"share": [], "own": [], "kind": []}
    for _ in range(draws):
        pixels = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 1, *size).clone()
        pixels, target = mixing(pixels, torch.tensor([0, 1]))
        theirs["share"].append(float(target[0, 0]))
        theirs["own"].append(float((pixels[0] == 0).float().mean()))
        theirs["kind"].append(float(((pixels == 0) | (pixels == 1)).all()))
    mixes = [drawn_mix(Random(seed), *alphas, *size) for seed in range(draws)]
    assert same_distribution([mix.share for mix in mixes], theirs["share"])
    boxes = [mix for mix in mixes if mix.weight == 1.0]
    assert len(boxes) / draws == pytest.approx(np.mean(theirs["kind"]), abs=0.04)
    if alphas[1] and Version(version("timm")) >= FULL_BOXES:
        areas = [own for own, kind in zip(theirs["own"], theirs["kind"], strict=True) if kind]
        assert same_distribution([1 - mix.box.area / (24 * 32) for mix in boxes], areas)
        assert all(mix.share == 1 - mix.box.area / (24 * 32) for mix in boxes)


def test_erased_boxes_are_distributed_as_timms() -> None:
    random.seed(0)
    draws, height, width = 3000, 24, 32
    erase = RandomErasing(0.4, mode="const", device="cpu")
    theirs = []
    for picture in erase(torch.ones(draws, 1, height, width))[:, 0] == 0:
        if picture.any():
            rows, columns = picture.any(1).nonzero()[:, 0], picture.any(0).nonzero()[:, 0]
            theirs.append([int(rows[0]), int(columns[0]), len(rows), len(columns)])
    boxes = [box for seed in range(draws) if (box := erased_box(Random(seed), 0.4, height, width))]
    assert len(boxes) / draws == pytest.approx(len(theirs) / draws, abs=0.04)
    ours = [[box.top, box.left, box.bottom - box.top, box.right - box.left] for box in boxes]
    for one, other in zip(np.array(ours).T, np.array(theirs).T, strict=True):
        assert same_distribution(one.tolist(), other.tolist())


def test_a_batch_takes_few_launches_and_waits_for_nothing() -> None:
    """Of 16 videos with 2 clips each: one for each clip that is erased, the rest for the whole batch."""
    clip, label = torch.zeros(32, 3, 4, 24, 32), torch.arange(16).repeat_interleave(2)
    for seed in range(5):
        counts = {
            erasing: launches(lambda: BatchAugment(16, 0.8, 1.0, erasing)(clip, label, range(seed * 100, seed * 100 + 16)))  # noqa: B023
            for erasing in (0.0, 0.25)
        }
        assert counts[0.0].count <= 20
        assert counts[0.25].count <= 40, "a quarter of 32 clips is erased, give or take"
        assert not counts[0.25].waits
