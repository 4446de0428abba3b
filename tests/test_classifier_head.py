"""The head of a classifier: features without one, other classes, and one model per command."""

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

from stts_lightning import assembly, create_model, load_model
from stts_lightning.backbones.checkpoints import CheckpointError, save_weights
from stts_lightning.classifier import VideoClassifier
from stts_lightning.configuration import conf_dir


@pytest.mark.parametrize("name", ["mvit_tiny", "video_swin_tiny"])
def test_model_without_classes_returns_the_features_before_the_head(name: str) -> None:
    torch.manual_seed(0)
    model = create_model(name, "t0_0.5", 7).eval()
    clip = torch.randn(2, 3, *model.backbone.clip_size)
    features = model.forward_features(clip)
    assert features.shape == (2, model.backbone.out_dim)
    torch.testing.assert_close(model(clip), model.head(features))
    model.reset_classifier(0)
    assert (model.num_classes, model.recipe["num_classes"]) == (0, 0)
    assert torch.equal(model(clip), features)


def test_features_of_uint8_clips_are_normalised_and_tell_what_was_kept() -> None:
    model = create_model("mvit_tiny", "t0_0.5", 0).eval()
    clip = torch.randint(256, (1, 3, *model.backbone.clip_size), dtype=torch.uint8)
    kept: list = []
    torch.testing.assert_close(model.forward_features(clip, kept), model(model.normalize(clip)))
    assert [selection.slot for selection in kept] == ["t0"]


def test_number_of_classes_is_that_of_the_checkpoint_unless_given(tmp_path: Path) -> None:
    model = create_model("mvit_tiny", None, 7)
    save_weights(model, model.recipe, tmp_path / "seven.safetensors")
    assert create_model("mvit_tiny", pretrained=tmp_path / "seven.safetensors").num_classes == 7
    assert create_model("mvit_tiny", pretrained=tmp_path / "seven.safetensors", num_classes=0).num_classes == 0
    assert create_model("mvit_tiny").num_classes == 400
    model.reset_classifier(0)
    save_weights(model, model.recipe, tmp_path / "features.safetensors")
    again = load_model(tmp_path / "features.safetensors")
    assert again.num_classes == 0
    assert torch.equal(again.backbone.norm.weight, model.backbone.norm.weight)
    with pytest.raises(CheckpointError, match="head=reset"):
        create_model("mvit_tiny", pretrained=tmp_path / "features.safetensors", num_classes=5)


def test_a_bare_state_dict_without_a_head_is_recognised(tmp_path: Path) -> None:
    model = create_model("video_swin_tiny", None, 0)
    torch.save(model.state_dict(), tmp_path / "bare.pt")
    assert create_model("video_swin_tiny", num_classes=0, pretrained=tmp_path / "bare.pt").num_classes == 0


def body(tmp_path: Path, *overrides: str) -> VideoClassifier:
    """As `train` builds it before it has seen its data."""
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        cfg = compose("train", ["backbone=mvit_tiny", "selection=none", f"pretrained={tmp_path / 'seven.pt'}", *overrides])
    return assembly.build_body(cfg)


def test_kept_head_must_have_the_classes_of_the_data(tmp_path: Path) -> None:
    torch.save(create_model("mvit_tiny", None, 7).state_dict(), tmp_path / "seven.pt")
    kept = body(tmp_path)
    weight = kept.head.weight
    assembly.fit_head(kept, 7)
    assert kept.head.weight is weight
    with pytest.raises(CheckpointError, match=r"seven\.pt .*head has 7 classes, the data set has 9; head=reset"):
        assembly.fit_head(kept, 9)
    new = body(tmp_path, "head=reset")
    assembly.fit_head(new, 9)
    assert (new.num_classes, new.recipe["num_classes"]) == (9, 9)
