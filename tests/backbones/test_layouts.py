"""Every layout of published files: files built by the written rule from the reference's key lists, then loaded."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stts_lightning import create_model
from stts_lightning.backbones.checkpoints import read_checkpoint
from stts_lightning.backbones.layouts import LAYOUTS
from stts_lightning.selection.spec import SelectionSpec

Rule = Callable[[str], ModuleType]
MVIT = {"slowfast_head": ("STTS / SlowFast", 1e-6), "slowfast_before_mvitv2": ("before MViTv2", 1e-5)}
MVIT |= {"pytorchvideo": ("pytorchvideo", 1e-6), "torchvision": ("torchvision mvit", 1e-6)}
SWIN_TINY = {"dim": 32, "depths": (2, 2, 2, 2), "heads": (1, 2, 4, 8), "num_classes": 12}


def mvit_file(shared: Path, rule: ModuleType, layout: str) -> dict[str, Tensor]:
    """Weights of the rule under a layout's keys, by the reference's own map from the official names."""
    state = {}
    for official, entry in json.loads((shared / "golden/mvit/key_mapping.json").read_text()).items():
        value = torch.from_numpy(rule.fill(official, entry["shape"]))
        targets = entry[layout]
        stacked = layout != "torchvision" and len(targets) == 3 and ".q." in targets[0][0]
        for (key, shape), part in zip(targets, value.chunk(3) if stacked else [value] * len(targets), strict=True):
            state[key] = part.reshape(shape).clone()
    return state


@pytest.mark.usefixtures("undrawn")
@pytest.mark.reference
@pytest.mark.parametrize("layout", MVIT)
def test_mvit_layouts_give_the_golden_logits(shared: Path, load_rule: Rule, tmp_path: Path, layout: str) -> None:
    rule = load_rule("mvit")
    torch.save({"epoch": 200, "model_state": mvit_file(shared, rule, layout), "cfg": ""}, tmp_path / "file")
    name, eps = MVIT[layout]
    assert name in read_checkpoint(tmp_path / "file").layout.name
    model = create_model("mvit_b16", pretrained=tmp_path / "file").eval()
    assert model.backbone.blocks[0].attn.pool_k.norm.eps == eps
    golden = np.load(shared / "golden/mvit/golden_unpruned.npz")
    with torch.inference_mode():
        logits = model(torch.from_numpy(rule.inp()))
    torch.testing.assert_close(logits, torch.from_numpy(golden["logits"]), atol=1e-4, rtol=0)


# file of keys, selection, arguments, name of the layout
LISTS: dict[str, tuple[str, str | dict[str, Any], dict[str, Any], str]] = {
    "mvit/state_dict_t0_0.6_s4_0.9": ("mvit_b16", "t0_0.6_s4_0.9", {}, "official STTS"),
    "mvit/layout_stts_official_t0_0.4_s4_0.6": ("mvit_b16", "t0_0.4_s4_0.6", {}, "official STTS"),
    "mvit/layout_slowfast_head": ("mvit_b16", "none", {}, "SlowFast"),
    "mvit/layout_slowfast_before_mvitv2": ("mvit_b16", "none", {}, "SlowFast MViT before"),
    "mvit/layout_pytorchvideo_hub": ("mvit_b16", "none", {}, "pytorchvideo"),
    "mvit/layout_torchvision_mvit_v1_b": ("mvit_b16", "none", {}, "torchvision mvit"),
    "video_swin/state_dict_t0_0.625": ("video_swin_b", {"slots": {"t0": {"keep": 10}}}, {}, "mmaction"),
    "video_swin/state_dict_ssv2_window1677_t0_0.625": (
        "video_swin_b",
        {"slots": {"t0": {"keep": 10}}},
        {"window": (16, 7, 7), "num_classes": 174},
        "mmaction",
    ),
    "video_swin/state_dict_original_videoswin": ("video_swin_b", "none", {}, "mmaction"),
    "video_swin/state_dict_original_videoswin_ssv2_window1677": (
        "video_swin_b",
        "none",
        {"window": (16, 7, 7), "num_classes": 174},
        "mmaction",
    ),
    "video_swin/state_dict_torchvision_swin3d_b": ("video_swin_b", "none", {}, "torchvision swin3d"),
    "video_swin/state_dict_swin2d_base_1k": ("video_swin_b", "none", {"num_classes": 1000}, "ImageNet Swin"),
    "video_swin/state_dict_swin2d_base_22k": ("video_swin_b", "none", {"num_classes": 21841}, "ImageNet Swin"),
    "video_swin/state_dict_timm_swin_base_1k": ("video_swin_b", "none", {"num_classes": 1000}, "timm"),
}


# Families that another list stands for in the normal run.
MORE = {
    "mvit/state_dict_t0_0.6_s4_0.9",
    "mvit/layout_slowfast_head",
    "video_swin/state_dict_t0_0.625",
    "video_swin/state_dict_original_videoswin",
    "video_swin/state_dict_original_videoswin_ssv2_window1677",
    "video_swin/state_dict_swin2d_base_22k",
}


def listed(shared: Path, name: str) -> list[tuple[str, tuple[int, ...]]]:
    content = json.loads((shared / "golden" / f"{name}.json").read_text())
    entries = content.get("keys") or content.get("entries") or content["layout"]
    return [(entry[0], tuple(entry[1])) for entry in entries]


def random_values(entries: list[tuple[str, tuple[int, ...]]]) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {key: torch.randn(shape, generator=draw) for key, shape in entries}


@pytest.mark.usefixtures("undrawn")
@pytest.mark.reference
@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) if name in MORE else name for name in LISTS])
def test_a_listed_file_loads_whole_and_comes_back_bit_equal(shared: Path, tmp_path: Path, name: str) -> None:
    backbone, selection, arguments, layout = LISTS[name]
    theirs = random_values(listed(shared, name))
    torch.save(theirs, tmp_path / "a.mp4")  # A name proves nothing.
    model = create_model(backbone, selection, pretrained=tmp_path / "a.mp4", **arguments)
    checkpoint = read_checkpoint(tmp_path / "a.mp4")
    assert layout in checkpoint.layout.name
    ours = model.state_dict()
    sources: dict[str, list[str]] = {}
    for key in theirs:  # Which of our weights each of theirs went to: asked one at a time.
        for target in translated_alone(checkpoint, key, model.slots.selection):
            sources.setdefault(target.partition("@")[0], []).append(key)
    assert set(sources) == set(ours), "each of our weights comes from the file"
    computed = [key for key in theirs if not any(key in found for found in sources.values())]
    assert all("relative_position_index" in k or "attn_mask" in k or "_attention_pool_" in k for k in computed)
    for target, keys in sources.items():
        whole = torch.cat([theirs[key] for key in keys])
        if whole.numel() != ours[target].numel():
            # The rest is inflation: back again it is the sum over the frames, or any one of them.
            back = ours[target].sum(2) if target.endswith("patch_embed.weight") else ours[target].view(15, 169, -1)[3]
            torch.testing.assert_close(back, whole, atol=1e-7, rtol=1e-6)
        else:
            assert torch.equal(whole.flatten(), ours[target].flatten()), target
    again = create_model(**{**model.recipe, "pretrained": saved_own(model, tmp_path)})
    assert all(torch.equal(a, b) for a, b in zip(ours.values(), again.state_dict().values(), strict=True))


def translated_alone(checkpoint: Any, key: str, selection: SelectionSpec) -> list[str]:
    alone = type(checkpoint)(checkpoint.path, checkpoint.layout, {key: checkpoint.state[key]})
    return list(alone.translated(selection))


def saved_own(model: torch.nn.Module, folder: Path) -> Path:
    torch.save({"state_dict": model.state_dict(), "model": dict(model.recipe)}, folder / "own.ckpt")
    return folder / "own.ckpt"


@pytest.mark.usefixtures("undrawn")
@pytest.mark.reference
def test_torchvision_keys_of_swin_follow_the_references_map(shared: Path, load_rule: Rule, tmp_path: Path) -> None:
    """An independent map: each weight arrives where the official name of the same weight arrives."""
    pairs = json.loads((shared / "golden/video_swin/key_map_official_torchvision.json").read_text())["pairs"]
    shapes = dict(listed(shared, "video_swin/state_dict_unpruned"))
    rule = load_rule("video_swin")
    for number, name in enumerate(("official", "torchvision")):
        values = {pair[number]: torch.from_numpy(rule.fill(pair[0], shapes[pair[0]])) for pair in pairs}
        torch.save({"state_dict": values}, tmp_path / name)
    a, b = (create_model("video_swin_b", pretrained=tmp_path / name).state_dict() for name in ("official", "torchvision"))
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.reference
@pytest.mark.parametrize(("case", "side"), [("inflate_w7", 7), ("inflate_w12", 12)])
def test_imagenet_weights_inflated_give_the_golden_logits(
    shared: Path, load_rule: Rule, tmp_path: Path, case: str, side: int
) -> None:
    rule, golden = load_rule("video_swin"), np.load(shared / "golden/video_swin/golden_tiny.npz")
    layout = json.loads((shared / "golden/video_swin/golden_tiny.json").read_text())["cases"]["inflate_w7"]["layout2d"]
    state = {}
    for key, shape, *_, kind in layout:
        if kind == "param":
            shape = [(2 * side - 1) ** 2, shape[1]] if key.endswith("bias_table") else shape
            state[key] = torch.from_numpy(rule.fill(key, shape, 0.5))
    torch.save({"model": state}, tmp_path / "swin.pth")
    selection = {"slots": {"t0": {"keep": 6}}, "scorer": "official"}
    model = create_model("video_swin_b", selection, pretrained=tmp_path / "swin.pth", head="reset", **SWIN_TINY).eval()
    assert "fitted to another size" in model.weights
    assert "as initialised: selector t0, head" in model.weights
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".slots." in name:
                rest = name.partition(".scorer.")[2].replace("features", "in_conv").replace("score.", "out_conv.")
                name = f"backbone.time_score_predictor.0.score_network.{rest}"
            elif name.startswith("head."):
                name = f"cls_head.fc_cls.{name.removeprefix('head.')}"
            else:
                continue
            parameter.copy_(torch.from_numpy(rule.fill(name, parameter.shape, 0.5)))
    backbone = model.state_dict()
    for ours, theirs in {
        "backbone.patch_embed.weight": "backbone.patch_embed.proj.weight",
        "backbone.stages.2.blocks.1.attn.relative_position_bias_table": (
            "backbone.layers.2.blocks.1.attn.relative_position_bias_table"
        ),
    }.items():
        torch.testing.assert_close(backbone[ours], torch.from_numpy(golden[f"{case}/{theirs}"]), atol=1e-6, rtol=1e-6)
    with torch.inference_mode():
        logits = model(torch.from_numpy(rule.inp((2, 3, 32, 224, 224))))
    torch.testing.assert_close(logits, torch.from_numpy(golden[f"{case}/logits"]), atol=5e-5, rtol=0)


def test_signatures_tell_layouts_apart() -> None:
    for layout in LAYOUTS:
        assert [other.name for other in LAYOUTS if set(other.signature) <= set(layout.signature)] == [layout.name]


def test_windows_and_positions_of_another_size(tmp_path: Path) -> None:
    small = {"num_classes": 5, "dim": 16, "depths": (2, 2), "heads": (1, 2)}
    made = create_model("video_swin_tiny", window=(2, 4, 4), **small)
    torch.nn.init.normal_(made.backbone.stages[0].blocks[0].attn.relative_position_bias_table)
    torch.save(made.state_dict(), tmp_path / "m.pt")
    model = create_model("video_swin_tiny", window=(4, 4, 4), pretrained=tmp_path / "m.pt", **small)
    before, after = (m.backbone.stages[0].blocks[0].attn.relative_position_bias_table.view(-1, 7, 7) for m in (made, model))
    torch.testing.assert_close(after[3], before[1], msg="the middle offset in time stays")
    torch.testing.assert_close(after[0], before[0])
    # Another side is told from the recipe that an own file holds.
    torch.save({"state_dict": made.state_dict(), "model": dict(made.recipe)}, tmp_path / "own.ckpt")
    model = create_model("video_swin_tiny", window=(2, 3, 5), pretrained=tmp_path / "own.ckpt", **small)
    assert "fitted to another size" in model.weights

    made = create_model("mvit_tiny", num_classes=5, size=64)
    torch.save(made.state_dict(), tmp_path / "m.pt")
    model = create_model("mvit_tiny", num_classes=5, size=(64, 96), frames=8, pretrained=tmp_path / "m.pt")
    assert model.backbone.pos_embed_spatial.shape == (1, 16 * 24, 32)
    # The mean over height of a map stretched in width only: still a stretched map.
    torch.testing.assert_close(
        model.backbone.pos_embed_spatial.mean(), made.backbone.pos_embed_spatial.mean(), atol=1e-3, rtol=0.05
    )
    assert model.backbone.pos_embed_temporal.shape == (1, 4, 32)
    temporal = made.backbone.pos_embed_temporal.view(4, 2, 32).mean(1)
    torch.testing.assert_close(model.backbone.pos_embed_temporal[0], temporal)
