"""Peers compute the same: what is compared in speed must be equal in numbers."""

from typing import Any

import pytest
import torch

from stts_lightning import create_model
from stts_lightning.analysis.peers import OneHot, difference, textbook, torchvision_model
from stts_lightning.backbones import BackboneError
from stts_lightning.selection.noise import Noise
from stts_lightning.selection.topk import OfficialMonteCarlo

SWIN = {"frames": 20, "size": (72, 64), "dim": 16, "depths": (2, 2, 2), "heads": (1, 1, 2), "window_policy": "official"}


@pytest.mark.parametrize(
    ("name", "selection", "arguments"),
    [
        ("mvit_tiny", None, {}),
        ("mvit_tiny", "t0_0.6_s4_0.6", {}),
        ("video_swin_b", None, SWIN),
        ("video_swin_b", "t0_0.6_s2_0.7", SWIN),
        ("video_swin_tiny", "t2_0.6", {"window_policy": "official"}),
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_the_textbook_says_the_same(name: str, selection: str | None, arguments: dict[str, Any], training: bool) -> None:
    torch.manual_seed(0)
    model = create_model(name, selection, 7, **arguments).train(training)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    written = textbook(model)
    clip = torch.randn(2, 3, *model.backbone.clip_size)
    found = []
    for one in (model, written):
        one.slots.seed_noise([3, 4])
        if training:
            logits = one(clip)
            logits.square().sum().backward()
            found.append((logits.detach(), one.head.weight.grad, one.backbone.patch_embed.weight.grad))
        else:
            with torch.inference_mode():
                found.append((one(clip),))
    for ours, theirs in zip(*found, strict=True):
        # Gradients of scores are two estimates (the textbook lacks the control variate), so what lies before differs.
        if ours.shape == theirs.shape and not (training and selection and ours.dim() == 5):
            torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=2e-4)


def test_torchvisions_model_and_ours_hold_the_same_weights() -> None:
    theirs, ours = torchvision_model("swin3d_t", frames=16)
    assert difference(theirs, ours, torch.randn(1, 3, 16, 224, 224)) < 1e-4
    with pytest.raises(BackboneError, match="torchvision:resnet: allowed are mvit_v1_b, swin3d_b"):
        torchvision_model("resnet")


def test_one_hot_samples_are_the_official_estimate() -> None:
    scores, sigma = torch.rand(4, 9), torch.tensor(0.1)
    noise = Noise.of([1, 2])
    torch.testing.assert_close(OneHot(200)(scores, 3, sigma, noise), OfficialMonteCarlo(200)(scores, 3, sigma, noise))
