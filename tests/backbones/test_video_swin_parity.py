"""VideoSwin against golden outputs of the official model and against torchvision's."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from stts_lightning import create_model
from stts_lightning.backbones.video_swin import WindowAttention, WindowPlan, windows
from stts_lightning.selection.topk import perturbed_topk

TINY = {"dim": 32, "depths": (2, 2, 2, 2), "heads": (1, 2, 4, 8)}
CASES: dict[str, dict[str, Any]] = {  # name: slots by block (the official code counts stages), and other arguments
    "unpruned": {},
    **{f"t0_{k / 16:g}": {"slots": {"t0": {"keep": k}}} for k in (6, 8, 9, 10, 12, 14)},
    "w16_unpruned": {"window": (16, 7, 7)},
    "w16_t0_0.625": {"window": (16, 7, 7), "slots": {"t0": {"keep": 10}}},
    "t0_0.75_t2_0.5": {"slots": {"t0": {"keep": 12}, "t4": {"keep": 6}}},
    "t2_0.5": {"slots": {"t4": {"keep": 8}}},
    "small112_16f": {"frames": 16, "size": 112},
    "odd_30f_200x184_unpruned": {"frames": 30, "size": (200, 184)},
    "odd_30f_200x200_k10": {"frames": 30, "size": 200, "slots": {"t0": {"keep": 10}}},
}


def official_state(model: torch.nn.Module, rule: ModuleType, table: float) -> dict[str, torch.Tensor]:
    """Weights of the written rule under the official names of a model's parameters."""
    state, numbers = {}, {}
    for name, parameter in model.named_parameters():
        official = name.replace("backbone.stages.", "backbone.layers.").replace(".merge.", ".downsample.")
        official = official.replace("backbone.patch_embed.", "backbone.patch_embed.proj.")
        official = official.replace("backbone.patch_norm.", "backbone.patch_embed.norm.")
        if official.startswith("head."):
            official = "cls_head.fc_cls." + official.removeprefix("head.")
        if ".slots.selectors." in official:
            slot, rest = official.removeprefix("backbone.slots.selectors.").split(".scorer.")
            number = numbers.setdefault(slot, len(numbers))
            rest = rest.replace("features", "in_conv").replace("score.", "out_conv.")
            official = f"backbone.time_score_predictor.{number}.score_network.{rest}"
        state[official] = torch.from_numpy(rule.fill(official, parameter.shape, table))
    return state


def golden_model(rule: ModuleType, folder: Path, table: float, **arguments: Any) -> torch.nn.Module:
    slots = arguments.pop("slots", {})
    arguments = {"selection": {"slots": slots, "scorer": "official"}, "window_policy": "official", **arguments}
    state = official_state(create_model("video_swin_b", **arguments), rule, table)
    torch.save({"meta": {}, "state_dict": state, "optimizer": {}}, folder / "checkpoint.pth")
    if slots:  # A file with the official code's selectors was tuned with its windows.
        del arguments["window_policy"]
    model = create_model("video_swin_b", **arguments, pretrained=folder / "checkpoint.pth").eval()
    assert model.backbone.variant() == {"window_policy": "official"}
    return model


@pytest.mark.reference
@pytest.mark.parametrize("case", CASES)
def test_tiny_logits_match_the_official_model(
    shared: Path, load_rule: Callable[[str], ModuleType], tmp_path: Path, case: str
) -> None:
    folder, rule = shared / "golden/video_swin", load_rule("video_swin")
    info = json.loads((folder / "golden_tiny.json").read_text())["cases"][case]
    golden = np.load(folder / "golden_tiny.npz")
    model = golden_model(rule, tmp_path, 0.5, num_classes=12, **TINY, **CASES[case])
    assert sum(p.numel() for p in model.parameters()) == info["n_params"]
    with torch.inference_mode():
        logits, kept = model(torch.from_numpy(rule.inp(tuple(info["input_shape"]))), return_selection=True)
    torch.testing.assert_close(logits, torch.from_numpy(golden[f"{case}/logits"]), atol=5e-5, rtol=0)
    for number, selection in enumerate(kept.values()):
        assert np.array_equal(selection.indices.numpy(), golden[f"{case}/indices{number}"])


@pytest.mark.usefixtures("undrawn")
@pytest.mark.reference
@pytest.mark.parametrize(("case", "slots"), [("unpruned", {}), ("t0_0.625", {"t0": {"keep": 10}})])
def test_full_size_logits_match_the_official_model(
    shared: Path, load_rule: Callable[[str], ModuleType], tmp_path: Path, case: str, slots: dict[str, Any]
) -> None:
    rule, golden = load_rule("video_swin"), np.load(shared / f"golden/video_swin/golden_{case}.npz")
    model = golden_model(rule, tmp_path, 0.02, slots=slots)
    with torch.inference_mode():
        logits, kept = model(torch.from_numpy(rule.inp()), return_selection=True)
    torch.testing.assert_close(logits, torch.from_numpy(golden["logits"]), atol=5e-5, rtol=0)
    if slots:
        assert np.array_equal(kept["t0"].indices.numpy(), golden["indices"])


@pytest.mark.reference
@pytest.mark.parametrize(("case", "keep", "sigma"), [("t0_0.625_sigma0.1", 10, 0.1), ("t0_0.375_sigma0.05", 6, 0.05)])
def test_training_step_matches_the_official_model(
    shared: Path, load_rule: Callable[[str], ModuleType], tmp_path: Path, case: str, keep: int, sigma: float
) -> None:
    """Soft indicators, loss and gradients with the official diagonal Jacobian and the reference's noise."""
    rule, golden = load_rule("video_swin"), np.load(shared / "golden/video_swin/golden_tiny.npz")
    model = golden_model(rule, tmp_path, 0.5, num_classes=12, **TINY, slots={"t0": {"keep": keep}})
    model.slots.train()
    model.slots.sigma.fill_(sigma)
    noise = torch.from_numpy(np.random.Generator(np.random.PCG64(1)).standard_normal((2, 500, 16)).astype(np.float32))
    selector = model.slots.selectors["t0"]
    selector.soft_topk.estimate = lambda scores, k, sigma, _: perturbed_topk(scores, k, sigma, noise, "diagonal")
    logits, kept = model(torch.from_numpy(rule.inp((2, 3, 32, 224, 224))), return_selection=True)
    case = f"train_{case}"
    np.testing.assert_allclose(kept["t0"].scores.detach().numpy(), golden[f"{case}/scores"], atol=1e-4)
    np.testing.assert_allclose(kept["t0"].indicator.detach().numpy(), golden[f"{case}/indicator_b_k_T"], atol=5e-3)
    torch.testing.assert_close(logits, torch.from_numpy(golden[f"{case}/logits"]), atol=5e-3, rtol=0)
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor([3, 7]))
    loss.backward()
    assert loss.item() == pytest.approx(float(golden[f"{case}/loss"]), abs=2e-3)
    prefix = f"{case}/grad/backbone.time_score_predictor.0.score_network"
    for ours, theirs in {
        "features.0.weight": "in_conv.0.weight",
        "features.1.weight": "in_conv.1.weight",
        "score.0.weight": "out_conv.0.weight",
        "score.4.weight": "out_conv.4.weight",
    }.items():
        expected = torch.from_numpy(golden[f"{prefix}.{theirs}"]).flatten()
        found = selector.scorer.get_parameter(ours).grad.flatten()
        assert torch.nn.functional.cosine_similarity(found, expected, dim=0) > 0.99, ours
        assert float(found.norm()) == pytest.approx(float(expected.norm()), rel=0.05), ours


@pytest.mark.parametrize("name", ["swin3d_t", "swin3d_b"])
def test_logits_match_torchvision(tmp_path: Path, name: str) -> None:
    from torchvision.models import video

    torch.manual_seed(0)
    theirs = getattr(video, name)(weights=None).eval()
    for key, parameter in theirs.named_parameters():
        if "norm" in key or "bias" in key:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    torch.save(theirs.state_dict(), tmp_path / "tv.pth")
    frames = 32 if name == "swin3d_t" else 16
    ours = create_model(f"video_swin_{name[-1]}", pretrained=tmp_path / "tv.pth", frames=frames).eval()
    clip = torch.randn(1, 3, frames, 224, 224)
    with torch.inference_mode():
        torch.testing.assert_close(ours(clip), theirs(clip), atol=1e-4, rtol=1e-4)


def test_balanced_windows_share_the_frames() -> None:
    assert windows((10, 56, 56), (8, 7, 7), True, "official") == ((8, 7, 7), (4, 3, 3))
    assert windows((10, 56, 56), (8, 7, 7), True, "balanced") == ((5, 7, 7), (2, 3, 3))
    assert windows((8, 7, 7), (8, 7, 7), True, "balanced") == ((8, 7, 7), (0, 0, 0))


LIMIT = (4, 4, 4)


def brute_force(attention: WindowAttention, grid: torch.Tensor, shifted: bool) -> torch.Tensor:
    """Token by token: who shares a window after the roll and stands as far from me there as it truly does is seen."""
    size = grid.shape[1:4]
    window, shift = windows(size, LIMIT, shifted, "balanced")
    at = torch.cartesian_prod(*(torch.arange(n) for n in size))
    full = torch.tensor([-(-n // w) * w for n, w in zip(size, window, strict=True)])
    rolled = (at - torch.tensor(shift)) % full
    offset = at[:, None] - at[None]
    seen = (rolled[:, None] // torch.tensor(window) == rolled[None] // torch.tensor(window)).all(-1)
    seen &= (rolled[:, None] - rolled[None] == offset).all(-1)
    table = attention.relative_position_bias_table.view(*(2 * n - 1 for n in LIMIT), -1)
    row = [(offset[..., i] + n - 1).clamp(0, 2 * n - 2) for i, n in enumerate(LIMIT)]
    bias = table[row[0], row[1], row[2]].permute(2, 0, 1).masked_fill(~seen, -torch.inf)
    q, k, v = attention.qkv(grid.flatten(1, 3)).unflatten(-1, (3, attention.heads, -1)).permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + bias).softmax(-1)
    return attention.proj((weights @ v).transpose(1, 2).flatten(2)).view_as(grid)


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("size", [(9, 8, 7), (5, 5, 3), (10, 9, 11), (3, 4, 13)])
def test_balanced_attention_hides_padding_and_has_the_right_bias(size: tuple[int, int, int], shifted: bool) -> None:
    torch.manual_seed(0)
    attention = WindowAttention(8, 2, LIMIT, WindowPlan(size, LIMIT, shifted, "balanced")).eval()
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    grid = torch.randn(3, *size, 8)
    torch.testing.assert_close(attention(grid), brute_force(attention, grid, shifted), atol=1e-5, rtol=1e-4)
