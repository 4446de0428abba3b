"""The plain ViT against VideoMAE's published model, transformers' and timm's."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from stts_lightning import create_model
from stts_lightning.backbones.checkpoints import read_checkpoint, save_weights
from stts_lightning.backbones.vit import resampled, sinusoid
from stts_lightning.selection.spec import SelectionSpec

# First five logits, and the largest, of the official code (MCG-NJU/VideoMAE@14ef8d8) with weights and clip by the golden rule.
OFFICIAL = {
    "vit_s": ((0.14177, 1.17746, 0.01062, -0.48664, -0.34506), 320),
    "vit_b": ((-0.09299, 1.13296, -0.18847, -0.03454, 1.30156), 128),
}
SMALL: dict[str, Any] = {"dim": 64, "depth": 3, "heads": 2}


def official_shapes(name: str, classes: int) -> dict[str, torch.Size]:
    """Keys and shapes of a file of VideoMAE."""
    with torch.device("meta"):
        state = create_model(name, num_classes=classes).state_dict()
    renamed = {key.removeprefix("backbone.").replace("patch_embed.", "patch_embed.proj."): value for key, value in state.items()}
    return {f"fc_{key}" if key.startswith("norm.") else key: value.shape for key, value in renamed.items()}


@pytest.mark.usefixtures("undrawn")
@pytest.mark.reference
@pytest.mark.parametrize("name", ["vit_s", "vit_b"])
@pytest.mark.parametrize("wrapper", ["module", "model"])
def test_logits_match_the_official_model(
    shared: Path, load_rule: Callable[[str], ModuleType], tmp_path: Path, name: str, wrapper: str
) -> None:
    if (name, wrapper) == ("vit_b", "model"):
        pytest.skip("one file of this size will do")
    rule, (first, largest) = load_rule("mvit"), OFFICIAL[name]
    state = {key: torch.from_numpy(rule.fill(key, shape)) for key, shape in official_shapes(name, 400).items()}
    assert len(state) == 162
    torch.save({wrapper: state, "epoch": 3}, tmp_path / "checkpoint.pth")  # "module" is DeepSpeed's.
    model = create_model(name, pretrained=tmp_path / "checkpoint.pth").eval()
    with torch.inference_mode():
        logits = model(torch.from_numpy(rule.inp()[:1]))[0]
    torch.testing.assert_close(logits[:5], torch.tensor(first), atol=1e-5, rtol=0)
    assert int(logits.argmax()) == largest


def noisy(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights in which no bias is 0 and no norm 1."""
    generator = torch.Generator().manual_seed(0)
    return {key: value + 0.1 * torch.randn(value.shape, generator=generator) for key, value in state.items()}


LARGE: dict[str, Any] = {"dim": 1024, "depth": 2, "heads": 16}
"""ViT-L's width."""


@pytest.mark.parametrize(("old_names", "shape"), [(False, SMALL), (True, SMALL), (False, LARGE)])
def test_hugging_faces_files_give_hugging_faces_logits(tmp_path: Path, old_names: bool, shape: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    dim, depth, heads = shape["dim"], shape["depth"], shape["heads"]
    config = transformers.VideoMAEConfig(
        hidden_size=dim, num_hidden_layers=depth, num_attention_heads=heads, intermediate_size=4 * dim, num_labels=7,
        layer_norm_eps=1e-6,
    )  # fmt: skip
    theirs = transformers.VideoMAEForVideoClassification(config).eval()
    theirs.load_state_dict(noisy(theirs.state_dict()))
    theirs.fc_norm.eps = 1e-6  # VideoMAE's; no option of theirs.
    state = {key: value.clone() for key, value in theirs.state_dict().items()}
    if old_names:  # As on the hub.
        for part in ("query", "value"):
            state = {key.replace(f"attention.{part}.bias", f"attention.{part[0]}_bias"): value for key, value in state.items()}
    torch.save(state, tmp_path / "pytorch_model.bin")
    ours = create_model("vit_b", pretrained=tmp_path / "pytorch_model.bin", **shape).eval()
    weights = ours.state_dict()
    for key, value in read_checkpoint(tmp_path / "pytorch_model.bin").translated(SelectionSpec()).items():
        assert torch.equal(weights[key], value), "bit for bit"
    clip = torch.randn(2, 3, 16, 224, 224, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        wanted = theirs(clip.transpose(1, 2)).logits
        found = ours(clip)
    assert found.shape == (2, 7) and float(wanted.std()) > 0.1
    # A norm of another eps (1e-5) moves them by more.
    torch.testing.assert_close(found, wanted, atol=4e-6 * max(float(wanted.abs().max()), 1), rtol=0)


def test_every_weight_of_a_file_is_in_the_model_bit_for_bit(tmp_path: Path) -> None:
    shapes = official_shapes("vit_tiny", 5)
    state = noisy({key: torch.zeros(shape) for key, shape in shapes.items()})
    torch.save(state, tmp_path / "file.pth")
    model = create_model("vit_tiny", "t1_0.5", pretrained=tmp_path / "file.pth")
    checkpoint = read_checkpoint(tmp_path / "file.pth")
    assert checkpoint.layout.name == "VideoMAE ViT"
    ours = model.state_dict()
    translated = checkpoint.translated(SelectionSpec())
    assert len(translated) == len(state) and all(torch.equal(ours[key], value) for key, value in translated.items())


@pytest.mark.parametrize("size", [(16, 224), (8, 224), (16, 160)])
def test_a_still_clip_gives_what_the_image_model_gives(tmp_path: Path, size: tuple[int, int]) -> None:
    frames, side = size
    image_model = timm.create_model("vit_tiny_patch16_224", num_classes=6, depth=3, pretrained=False, img_size=side).eval()
    image_model.load_state_dict(noisy(image_model.state_dict()))
    torch.save(image_model.state_dict(), tmp_path / "image.pth")
    arguments = {"dim": 192, "depth": 3, "heads": 3, "frames": frames, "size": side}
    model = create_model("vit_s", pretrained=tmp_path / "image.pth", **arguments).eval()
    assert model.backbone.mean == (0.5, 0.5, 0.5) and isinstance(model.backbone.pos_embed, torch.nn.Parameter)
    image = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        # Without its class token, which a mean over all tokens has no use for.
        tokens = image_model.patch_embed(image) + image_model.pos_embed[:, 1:]
        wanted = image_model.norm(image_model.blocks(tokens).mean(1))
        found = model.forward_features(image[:, :, None].expand(-1, -1, frames, -1, -1))
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_a_larger_picture_resamples_the_positions(tmp_path: Path) -> None:
    made = create_model("vit_tiny", num_classes=4, positions="learned", size=64, frames=16)
    save_weights(made, made.recipe, tmp_path / "made.safetensors")
    larger = create_model("vit_tiny", num_classes=4, pretrained=tmp_path / "made.safetensors", size=96, frames=8)
    assert larger.backbone.pos_embed.shape == (1, 4 * 12 * 12, 96)
    again = create_model("vit_tiny", num_classes=4, pretrained=tmp_path / "made.safetensors")
    assert torch.equal(again.backbone.pos_embed, made.backbone.pos_embed)


def test_fixed_positions() -> None:
    """One sinusoid over the number of the token: not one each for time, height and width."""
    table = sinusoid(1568, 8)[0]
    assert table[3, 0] == torch.tensor(3.0).sin() and table[3, 1] == torch.tensor(3.0).cos()
    assert float(table[1000, 6]) == pytest.approx(torch.tensor(1000 / 10000**0.75).sin().item(), abs=1e-5)
    half = resampled(table[None], (8, 14, 14), (4, 14, 14))[0].unflatten(0, (4, 14, 14))
    torch.testing.assert_close(half[0], (table[:196] + table[196:392]).view(14, 14, 8) / 2)
