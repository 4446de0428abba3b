"""MViT against golden outputs of the official model and against torchvision's."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stts_lightning import create_model
from stts_lightning.kernels.cpu.depthwise import depthwise

SLOTS = {"t0": "time0", "s4": "space0", "s0": "space0"}


def official_keys(folder: Path, config: str) -> list[tuple[str, list[int]]]:
    if config != "s0_0.6174":
        content = json.loads((folder / f"state_dict_{config}.json").read_text())
        return [tuple(item[:2]) for value in content.values() if isinstance(value, list) for item in value]
    keys = official_keys(folder, "unpruned")
    shapes = {"in_conv.0": [96], "in_conv.1": [96, 96], "out_conv.0": [48, 96], "out_conv.2": [24, 48], "out_conv.4": [1, 24]}
    for name, shape in shapes.items():
        keys += [(f"space_score_predictor.0.score_network.{name}.weight", shape)]
        keys += [(f"space_score_predictor.0.score_network.{name}.bias", shape[:1])]
    return keys


@pytest.mark.usefixtures("undrawn")
@pytest.mark.reference
@pytest.mark.parametrize("config", ["unpruned", "t0_0.6_s4_0.9", "t0_0.4_s4_0.6", "s0_0.6174"])
def test_logits_match_the_official_model(
    shared: Path, load_rule: Callable[[str], ModuleType], tmp_path: Path, config: str
) -> None:
    folder, rule = shared / "golden/mvit", load_rule("mvit")
    state = {name: torch.from_numpy(rule.fill(name, shape)) for name, shape in official_keys(folder, config)}
    torch.save({"epoch": 20, "model_state": state, "cfg": ""}, tmp_path / "checkpoint.pyth")
    selection = "none" if config == "unpruned" else config
    model = create_model("mvit_b16", selection, pretrained=tmp_path / "checkpoint.pyth").eval()
    # The release's norms after pooling; without selectors the file is one of SlowFast's, whose eps is another.
    assert model.backbone.blocks[0].attn.pool_k.norm.eps == (1e-6 if config == "unpruned" else 1e-5)
    golden = np.load(folder / f"golden_{config}.npz")
    with torch.inference_mode():
        logits, kept = model(torch.from_numpy(rule.inp()), return_selection=True)
    torch.testing.assert_close(logits, torch.from_numpy(golden["logits"]), atol=1e-4, rtol=0)
    assert len(kept) == (0 if config == "unpruned" else 2 if "_s4" in config else 1)
    for name, selection_ in kept.items():
        assert np.array_equal(selection_.indices.numpy().ravel(), golden[f"{SLOTS[name]}_indices"].ravel()), name
        np.testing.assert_allclose(selection_.scores.numpy().ravel(), golden[f"{SLOTS[name]}_norm_scores"].ravel(), atol=2e-4)
    sizes = [tuple(size) for size in golden["thw_in_out"][:, 0]]
    assert sizes == model.backbone.block_sizes


@pytest.mark.reference
def test_training_step_matches_the_official_model(shared: Path, load_rule: Callable[[str], ModuleType], tmp_path: Path) -> None:
    """Soft indicators, loss and gradients with the official diagonal Jacobian and the reference's noise."""
    folder, rule, config = shared / "golden/mvit", load_rule("mvit"), "t0_0.6_s4_0.9"
    state = {name: torch.from_numpy(rule.fill(name, shape)) for name, shape in official_keys(folder, config)}
    torch.save({"model_state": state}, tmp_path / "checkpoint.pyth")
    spec = {"slots": {"t0": 0.6, "s4": 0.9}, "estimator": "official"}
    model = create_model("mvit_b16", spec, pretrained=tmp_path / "checkpoint.pyth").eval()
    model.slots.train()
    for number, name in enumerate(("t0", "s4"), 1):
        draw = np.random.Generator(np.random.PCG64(number))

        def estimate(scores: Tensor, k: int, sigma: Tensor, _: object, draw: np.random.Generator = draw) -> Tensor:
            from stts_lightning.selection.topk import perturbed_topk

            noise = torch.from_numpy(draw.standard_normal((scores.shape[0], 500, scores.shape[1])).astype(np.float32))
            return perturbed_topk(scores, k, sigma, noise, "diagonal")

        model.slots.selectors[name].soft_topk.estimate = estimate
    golden = np.load(folder / f"golden_{config}.npz")
    logits, kept = model(torch.from_numpy(rule.inp()), return_selection=True)
    torch.testing.assert_close(logits, torch.from_numpy(golden["train_logits"]), atol=5e-3, rtol=0)
    indicator = golden["train_time0_indicator_BLK"].transpose(0, 2, 1)
    np.testing.assert_allclose(kept["t0"].indicator.detach().numpy(), indicator, atol=5e-3)
    loss = nn.functional.cross_entropy(logits, torch.tensor([3, 7]))
    loss.backward()
    assert loss.item() == pytest.approx(float(golden["train_loss_ce_labels_3_7"]), abs=5e-3)
    for key, parameter in {
        "norm.weight": model.backbone.norm.weight,
        "pos_embed_temporal": model.backbone.pos_embed_temporal,
        "time_score_predictor.0.score_network.out_conv.4.weight": model.slots.selectors["t0"].scorer.score[4].weight,
    }.items():
        expected = torch.from_numpy(golden[f"train_grad/{key}"])
        cosine = nn.functional.cosine_similarity(parameter.grad.flatten(), expected.flatten(), dim=0)
        assert cosine > 0.99, (key, cosine.item())


@pytest.mark.parametrize("stride", [(1, 1, 1), (1, 2, 2), (1, 8, 8), (2, 2, 1)])
def test_depthwise_gradients_match_conv3d(stride: tuple[int, int, int]) -> None:
    x = torch.randn(2, 4, 5, 9, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 1, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    theirs = nn.functional.conv3d(x, weight, None, stride, padding=1, groups=4)
    ours = depthwise(x, weight, stride)
    torch.testing.assert_close(ours, theirs)
    upstream = torch.randn_like(theirs)
    expected = torch.autograd.grad(theirs, (x, weight), upstream)
    torch.testing.assert_close(torch.autograd.grad(ours, (x, weight), upstream), expected)


def test_logits_match_torchvision_mvit_v1_b(tmp_path: Path) -> None:
    from torchvision.models.video import mvit_v1_b

    torch.manual_seed(0)
    theirs = mvit_v1_b(weights=None).eval()
    for name, parameter in theirs.named_parameters():
        if "norm" in name or "pos" in name or "class_token" in name:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    torch.save(theirs.state_dict(), tmp_path / "tv.pth")
    ours = create_model("mvit_b16", pretrained=tmp_path / "tv.pth").eval()
    clip = torch.randn(1, 3, 16, 224, 224)
    with torch.inference_mode():
        torch.testing.assert_close(ours(clip), theirs(clip), atol=1e-4, rtol=1e-4)
