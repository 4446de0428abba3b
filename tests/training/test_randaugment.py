"""RandAugment on batches: timm's draws, PIL's pictures, one draw for all frames, and nothing that depends on the batch."""

import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from launches import launches
from PIL import Image
from timm.data.auto_augment import NAME_TO_OP, rand_augment_transform
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

from stts_lightning import assembly
from stts_lightning.configuration import conf_dir
from stts_lightning.data.transforms import ClipRandAugment
from stts_lightning.run_config import ConfigError
from stts_lightning.training.randaugment import AFFINE, KINDS, BatchRandAugment, RandAugmentDraws, Step, rounds

POLICY = "rand-m7-n4-mstd0.5-inc1"
VALUES: dict[str, tuple[float, ...]] = {
    "Rotate": (-21.3, 30.0), "ShearX": (0.21, -0.3), "ShearY": (-0.21, 0.1), "TranslateXRel": (0.3, -0.111),
    "TranslateYRel": (-0.05, 0.4), "Posterize": (1, 3), "PosterizeIncreasing": (4, 8), "Solarize": (0, 180),
    "SolarizeIncreasing": (256, 77), "SolarizeAdd": (0, 128), "Desaturate": (0.6, 0.9), "GaussianBlur": (0.1, 2.0),
}  # fmt: skip
BOUNDS = {
    # torchvision stretches in float32, PIL in float64: what falls between two levels may fall to the other one.
    "AutoContrast": 0.01,
    # PIL blurs by three boxes, not by a Gaussian.
    "GaussianBlur": 0.3,
    # PIL's bicubic is the cubic of -1, torch's of -0.75: a little less sharp.
    **dict.fromkeys(AFFINE, 0.6),
}
"""Mean difference in grey levels; all others are equal."""


def clips(count: int = 2, height: int = 48, width: int = 64) -> Tensor:
    """Pictures with structure at all scales, as real ones, and a little noise: `(count, 3, 3, H, W)`."""
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randn(3 * count, 3, height, width, generator=generator)
    for size in (4, 8, 16):
        coarse = torch.randn(3 * count, 3, height // size, width // size, generator=generator)
        pictures += size * F.interpolate(coarse, size=(height, width), mode="bicubic")
    pictures = pictures / pictures.std() * 50 + 120
    return pictures.clamp(0, 255).to(torch.uint8).view(count, 3, 3, height, width).transpose(1, 2).contiguous()


@pytest.mark.parametrize("name", sorted(KINDS))
def test_each_operation_makes_pils_picture(name: str) -> None:
    plain = name in ("AutoContrast", "Equalize", "Invert")
    values = VALUES.get(name, (0.37, 1.63))
    steps = [(Step(name, () if plain else (value,)),) for value in values]
    pixels = clips()
    ((operation, _, numbers),) = rounds(steps, 48, 64)
    out = operation(pixels, torch.tensor(numbers, dtype=torch.float32).view(2, -1))
    differences = []
    for clip, (step,), done in zip(pixels, steps, out, strict=True):
        for frame in range(3):
            picture, options = to_pil_image(clip[:, frame]), {"fillcolor": (128,) * 3, "resample": Image.Resampling.BICUBIC}
            expected = pil_to_tensor(NAME_TO_OP[name](picture, *step.values, **options))
            differences.append((done[:, frame].int() - expected.int()).abs())
    different = torch.stack(differences).float()
    assert different.mean() <= BOUNDS.get(name, 0)
    assert different.max() <= (12 if name in AFFINE else 4 if name == "GaussianBlur" else 1)


def noted_by_timm(policy: str, seed: int) -> list[tuple[str, tuple[float, ...]]]:
    """What timm's own transform does to a picture: its operations are watched, not replaced in the class under test."""
    transform = rand_augment_transform(policy, {"interpolation": Image.Resampling.BICUBIC})
    done: list[tuple[str, tuple[float, ...]]] = []
    for operation in transform.ops:

        def watch(picture, *values, name=operation.name, **options):  # type: ignore[no-untyped-def]
            done.append((name, values))
            return picture  # PIL refuses to keep 0 bits, which timm asks for at the highest level: then all is black here.

        operation.aug_fn = watch
    random.seed(seed)
    np.random.seed([seed % 2**32, seed // 2**32 % 2**32])
    transform(Image.new("RGB", (8, 8)))
    return done


@pytest.mark.parametrize("policy", [POLICY, "rand-m9-n2-mstd101-p0.8", "rand-m5-n3-inc1-tweights", "rand-m4-n3-t3a"])
def test_draws_are_timms(policy: str) -> None:
    drawn = RandAugmentDraws(policy)(range(100))
    for seed, steps in enumerate(drawn):
        assert [tuple(step) for step in steps] == noted_by_timm(policy, seed)


def test_operations_are_even_over_thousands_of_draws_with_chance_and_signs_of_a_half() -> None:
    drawn = RandAugmentDraws(POLICY)(range(10**15, 10**15 + 6000))
    steps = [step for clip in drawn for step in clip]
    assert len(steps) / (4 * 6000) == pytest.approx(0.5, abs=0.012)
    counts = Counter(step.name for step in steps)
    assert len(counts) == 15
    assert all(count / len(steps) == pytest.approx(1 / 15, abs=0.012) for count in counts.values())
    shears = torch.tensor([step.values[0] for step in steps if step.name == "ShearX"])
    assert float((shears > 0).float().mean()) == pytest.approx(0.5, abs=0.06)
    levels = shears.abs() / 0.3 * 10
    assert float(levels.mean()) == pytest.approx(7, abs=0.08)
    assert float(levels.std()) == pytest.approx(0.5, abs=0.06)


def test_a_clip_follows_from_its_seed_alone_and_its_frames_share_the_draw() -> None:
    augment, seeds = BatchRandAugment(POLICY), [2**62 + 7 * i for i in range(6)]
    pixels = clips(6)
    before, states = pixels.clone(), (random.getstate(), np.random.get_state()[1].tolist())  # type: ignore[union-attr]
    whole = augment(pixels, seeds)
    assert torch.equal(pixels, before), "the batch itself stays"
    assert states == (random.getstate(), np.random.get_state()[1].tolist())  # type: ignore[union-attr]
    assert not torch.equal(whole, before)
    for one in range(6):
        assert torch.equal(augment(pixels[one : one + 1], seeds[one : one + 1])[0], whole[one])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(augment(pixels, seeds), whole)
    still = pixels[:, :, :1].expand(-1, -1, 3, -1, -1)
    out = augment(still, seeds)
    assert torch.equal(out, out[:, :, :1].expand_as(out))


def test_nothing_waits_for_the_device() -> None:
    pixels = clips(32, 24, 32)
    counted = launches(lambda: BatchRandAugment(POLICY)(pixels, range(32)))
    assert not counted.waits
    assert counted.count <= 350, "no more for the batch than timm's operations one by one for a few clips"


@pytest.mark.parametrize("policy", ["m7", "rand-q7", "7"])
def test_an_unknown_policy_is_refused(policy: str) -> None:
    with pytest.raises(ValueError, match=f"augment.randaugment='{policy}': expected as in rand-m7"):
        BatchRandAugment(policy)


def test_the_device_does_it_and_on_a_cpu_the_workers(tmp_path: Path) -> None:
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        for accelerator, in_workers in (("cpu", True), ("gpu", False)):
            small = ["backbone=mvit_tiny", "recipe=paper", f"trainer.accelerator={accelerator}", f"run_dir={tmp_path}"]
            cfg = compose("train", small)
            data = assembly.build_data(cfg, (4, 32, 32))
            module = assembly.build_module(cfg, assembly.build_model(cfg, 4))
            assert isinstance(data._train_transform.colours, ClipRandAugment) is in_workers
            assert module.augment is not None and (module.augment.randaugment is None) is in_workers
            twice = compose("train", [*small, f"clip.train_transform.randaugment={POLICY}"])
            with pytest.raises(ConfigError, match="does it already, in the workers; set one of them to null"):
                assembly.build_data(twice, (4, 32, 32))
