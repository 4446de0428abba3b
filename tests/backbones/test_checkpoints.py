import json
from pathlib import Path

import pytest
import torch

from stts_lightning import create_model
from stts_lightning.backbones import CheckpointError

TINY = {"num_classes": 5, "size": 64}


def saved(model: torch.nn.Module, path: Path, **extra: torch.Tensor) -> Path:
    torch.save({**model.state_dict(), **extra}, path)
    return path


def test_own_checkpoint_round_trip(tmp_path: Path) -> None:
    model = create_model("mvit_tiny", "t0_0.5_s2_0.6", **TINY).eval()
    again = create_model("mvit_tiny", "t0_0.5_s2_0.6", pretrained=saved(model, tmp_path / "m.pt"), **TINY).eval()
    clip = torch.randn(1, 3, 16, 64, 64)
    with torch.inference_mode():
        assert torch.equal(model(clip), again(clip))


def test_new_selectors_may_be_missing_and_nothing_else(tmp_path: Path) -> None:
    plain = create_model("mvit_tiny", **TINY)
    path = saved(plain, tmp_path / "m.pt")
    create_model("mvit_tiny", "t0_0.5", pretrained=path, **TINY)
    state = plain.state_dict()
    del state["backbone.blocks.3.attn.qkv.weight"]
    torch.save(state, path)
    with pytest.raises(CheckpointError, match=r"1 missing \[backbone.blocks.3.attn.qkv.weight\]"):
        create_model("mvit_tiny", "t0_0.5", pretrained=path, **TINY)


def test_class_count_needs_head_reset(tmp_path: Path) -> None:
    path = saved(create_model("mvit_tiny", **TINY), tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=r"head.weight \(5, 128\) for \(9, 128\).*head=reset"):
        create_model("mvit_tiny", pretrained=path, num_classes=9, size=64)
    create_model("mvit_tiny", pretrained=path, num_classes=9, size=64, head="reset")


def test_scorer_is_recognised(tmp_path: Path) -> None:
    official = create_model("mvit_tiny", {"slots": {"t0": 0.5}, "scorer": "official"}, **TINY)
    model = create_model("mvit_tiny", "t0_0.5", pretrained=saved(official, tmp_path / "m.pt"), **TINY)
    assert model.slots.selection.scorer == "official"


def test_recipe_rebuilds_what_was_settled(tmp_path: Path) -> None:
    official = create_model("mvit_tiny", {"slots": {"t0": 0.5}, "scorer": "official"}, pool_norm_eps=1e-5, **TINY).eval()
    path = saved(official, tmp_path / "m.pt")
    model = create_model("mvit_tiny", {"slots": {"t0": {"keep": 4}}, "sigma": 0.3}, pretrained=path, pool_norm_eps=1e-5, **TINY)
    recipe = json.loads(json.dumps(model.recipe))
    assert recipe["selection"]["scorer"] == "official"
    again = create_model(**recipe, pretrained=path).eval()
    assert again.slots.selection == model.slots.selection
    clip = torch.randn(1, 3, 16, 64, 64)
    with torch.inference_mode():
        assert torch.equal(official(clip), again(clip))


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        create_model("mvit_tiny", pretrained=tmp_path / "none.pt")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    with pytest.raises(CheckpointError, match="not a readable file of plain weights"):
        create_model("mvit_tiny", pretrained=tmp_path / "text.pt")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=r"its keys \(a\) belong to none of the known layouts"):
        create_model("mvit_tiny", pretrained=tmp_path / "other.pt")
    torch.save({"cfg": pytest.raises}, tmp_path / "code.pt")
    with pytest.raises(CheckpointError, match="not a readable file of plain weights"):
        create_model("mvit_tiny", pretrained=tmp_path / "code.pt")
