"""Peers compute the same: what is compared in speed must be equal in numbers."""

import pytest
import torch

from stts_lightning.analysis.peers import OneHot, difference, torchvision_model
from stts_lightning.backbones import BackboneError
from stts_lightning.selection.noise import Noise
from stts_lightning.selection.topk import OfficialMonteCarlo


def test_models_compared_with_torchvision_hold_the_same_weights() -> None:
    theirs, ours = torchvision_model("swin3d_t", frames=16)
    assert difference(theirs, ours, torch.randn(1, 3, 16, 224, 224)) < 1e-4
    with pytest.raises(BackboneError, match="torchvision:resnet: allowed are mvit_v1_b, swin3d_b"):
        torchvision_model("resnet")


def test_one_hot_samples_are_the_official_estimate() -> None:
    scores, sigma = torch.rand(4, 9), torch.tensor(0.1)
    noise = Noise.of([1, 2])
    torch.testing.assert_close(OneHot(200)(scores, 3, sigma, noise), OfficialMonteCarlo(200)(scores, 3, sigma, noise))
