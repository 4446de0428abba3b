import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stts_lightning.selection.noise import Noise
from stts_lightning.selection.scorer import OfficialScorer, PaperScorer, Scorer
from stts_lightning.selection.selector import Selection, SlotContext
from stts_lightning.selection.spatial import SpatialSelector, _WeightedWindows
from stts_lightning.selection.spec import SelectionSpec, SlotSpec
from stts_lightning.selection.temporal import TemporalSelector
from stts_lightning.selection.topk import perturbed_topk

SIGMA = torch.tensor(0.1)


class FixedNoise:
    """An estimator with the noise of the reference, and its Jacobian."""

    def __init__(self, noise: Tensor) -> None:
        self.noise = noise

    def __call__(self, scores: Tensor, k: int, sigma: Tensor, noise: object) -> Tensor:
        return perturbed_topk(scores, k, sigma, self.noise, "diagonal")


@pytest.mark.reference
@pytest.mark.parametrize("case", ["time_a", "time_b", "space_a", "space_b", "space_c", "space_d"])
def test_selectors_match_the_official_code(shared: Path, load_rule: Callable[[str], ModuleType], case: str) -> None:
    rule = load_rule("mvit")
    golden = np.load(shared / "golden/mvit/golden_selectors.npz")
    info = json.loads((shared / "golden/mvit/golden_selectors.json").read_text())[case]
    get = lambda name: torch.from_numpy(golden[f"{case}/{name}"])  # noqa: E731
    frames, side, dim = info["T"], round(info["N"] ** 0.5), info["C"]
    spec = SelectionSpec(scorer="official", sigma=info["sigma"])
    if info["kind"] == "time":
        selector = TemporalSelector(SlotContext(SlotSpec("t0", keep=info["k"]), (frames, side, side), dim, spec))
    else:
        selector = SpatialSelector(SlotContext(SlotSpec("s0", side=info["anchor"]), (frames, side, side), dim, spec))
        assert len(selector.corners) == info["G"]
        assert selector.strides == (info["stride"],) * 2
    names = {"features": "score_network.in_conv", "score": "score_network.out_conv"}
    official = {name: f"{names[name.split('.')[0]]}.{name.split('.', 1)[1]}" for name, _ in selector.scorer.named_parameters()}
    for name, parameter in selector.scorer.named_parameters():
        parameter.data = torch.from_numpy(rule.fill(f"{case}.{official[name]}", parameter.shape))

    grid = get("x").unflatten(1, (frames, side, side))
    sigma = torch.tensor(info["sigma"])
    kept, selection = selector.eval()(grid, sigma, Noise())
    torch.testing.assert_close(kept.flatten(1, 3), get("eval_out"), atol=0, rtol=0)
    assert torch.equal(selection.indices.flatten(), get("indices").flatten())
    torch.testing.assert_close(selection.scores.flatten(), get("norm_scores").flatten(), atol=1e-4, rtol=0)

    selector.train().soft_topk.estimate = FixedNoise(get("noise"))
    grid = grid.requires_grad_()
    kept, selection = selector(grid, sigma, Noise())
    indicator = get("train_indicator_BLK").transpose(1, 2)
    torch.testing.assert_close(selection.indicator.reshape(indicator.shape), indicator, atol=1e-6, rtol=0)
    torch.testing.assert_close(kept.flatten(1, 3), get("train_out"), atol=1e-5, rtol=1e-5)
    kept.flatten(1, 3).backward(get("grad_out"))
    torch.testing.assert_close(grid.grad.flatten(1, 3), get("train_grad_x"), atol=2e-3, rtol=1e-3)
    for name, parameter in selector.scorer.named_parameters():
        torch.testing.assert_close(parameter.grad, get(f"train_grad/{official[name]}"), atol=2e-3, rtol=1e-3)


def temporal(keep: int = 3, **spec: object) -> TemporalSelector:
    return TemporalSelector(SlotContext(SlotSpec("t0", keep=keep), (6, 5, 4), 8, SelectionSpec(**spec)))  # type: ignore[arg-type]


def spatial(side: int = 3, **spec: object) -> SpatialSelector:
    return SpatialSelector(SlotContext(SlotSpec("s0", side=side), (6, 5, 4), 8, SelectionSpec(**spec)))  # type: ignore[arg-type]


def test_what_mixes_frames_otherwise_gets_its_own_gradients() -> None:
    class Otherwise(TemporalSelector):
        def mix(self, grid: torch.Tensor, scores: torch.Tensor, indicator: torch.Tensor) -> tuple[torch.Tensor, Selection]:
            kept, selection = super().mix(grid + extra, scores, indicator)
            return kept + grid.sum(1, keepdim=True), selection

    grid = torch.randn(2, 6, 5, 4, 8, requires_grad=True)
    extra = torch.zeros_like(grid, requires_grad=True)
    selector = Otherwise(SlotContext(SlotSpec("t0", keep=3), (6, 5, 4), 8, SelectionSpec())).train()
    kept, selection = selector(grid, SIGMA, Noise.of([0, 1]))
    above = torch.randn_like(kept)
    expected = torch.einsum("bkt,bkhwc->bthwc", selection.indicator, above)
    (found,) = torch.autograd.grad(kept, extra, above)
    torch.testing.assert_close(found, expected)


def test_a_layer_in_the_place_of_the_scorers_last_one_is_used() -> None:
    scorer = PaperScorer(8)
    candidates = torch.randn(2, 5, 8)
    expected = scorer(candidates)
    torch.testing.assert_close(scorer.score(torch.cat(parts(scorer, candidates), -1)).squeeze(-1), expected)
    scorer.score = nn.Sequential(scorer.score)
    torch.testing.assert_close(scorer(candidates), expected)


def parts(scorer: PaperScorer, candidates: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    local = scorer.activation(scorer.local(candidates))
    return local, local.mean(1, keepdim=True).expand_as(local)


def test_frames_keep_their_order_and_their_values() -> None:
    grid = torch.randn(4, 6, 5, 4, 8)
    kept, selection = temporal().eval()(grid, SIGMA, Noise())
    assert (selection.indices.diff(dim=1) > 0).all()
    for b in range(4):
        assert torch.equal(kept[b], grid[b, selection.indices[b]])
        best = selection.scores[b].topk(3).indices.sort().values
        assert torch.equal(best, selection.indices[b])


def test_windows_are_slices_of_the_best_anchor() -> None:
    grid = torch.randn(3, 6, 5, 4, 8)
    selector = spatial().eval()
    kept, selection = selector(grid, SIGMA, Noise())
    for b in range(3):
        for t in range(6):
            top, left, h, w = selection.windows[b, t].tolist()
            assert selector.corners[selection.indices[b, t]] == (top, left)
            assert torch.equal(kept[b, t], grid[b, t, top : top + h, left : left + w])


def test_weighted_windows_equal_the_sum_over_an_unfolded_grid() -> None:
    corners = tuple((i, j) for i in range(3) for j in range(2))
    grid = torch.randn(2, 3, 5, 4, 6, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(2, 3, 6, dtype=torch.float64, requires_grad=True)
    unfolded = torch.stack([grid[:, :, i : i + 3, j : j + 3] for i, j in corners], 2)
    expected = (unfolded * weights[..., None, None, None]).sum(2)
    torch.testing.assert_close(_WeightedWindows.apply(grid, weights, corners, (3, 3)), expected)
    assert torch.autograd.gradcheck(lambda g, w: _WeightedWindows.apply(g, w, corners, (3, 3)), (grid, weights))


@pytest.mark.parametrize("make", [temporal, spatial])
@pytest.mark.parametrize("scorer", ["paper", "official"])
@pytest.mark.parametrize("sigma", [0.0, 0.1])
def test_constant_input_gives_finite_outputs_and_gradients(
    make: Callable[..., torch.nn.Module], scorer: str, sigma: float
) -> None:
    selector = make(scorer=scorer).train()
    grid = torch.ones(2, 6, 5, 4, 8, requires_grad=True)
    kept, _ = selector(grid, torch.tensor(sigma), Noise())
    (kept * torch.randn_like(kept)).sum().backward()
    assert torch.isfinite(kept).all()
    for name, parameter in [*selector.named_parameters(), ("grid", grid)]:
        assert parameter.grad is not None, f"{name} dropped out of the graph"
        assert torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("make", [temporal, spatial])
def test_soft_selection_becomes_hard_as_sigma_falls(make: Callable[..., torch.nn.Module]) -> None:
    selector = make()
    grid = torch.randn(2, 6, 5, 4, 8)
    hard, _ = selector.eval()(grid, SIGMA, Noise())
    soft, _ = selector.train()(grid, torch.tensor(1e-9), Noise())
    torch.testing.assert_close(soft, hard)


def test_paper_scorer_is_equations_2_and_3() -> None:
    scorer = PaperScorer(8)
    q = torch.randn(2, 5, 8)
    local = torch.nn.functional.gelu(q @ scorer.local.weight.T + scorer.local.bias)
    f = torch.cat([local, local.mean(1, keepdim=True).expand(2, 5, 4)], -1)
    raw = (f @ scorer.score.weight.T + scorer.score.bias)[..., 0]
    torch.testing.assert_close(scorer(q), raw)
    normalized = scorer.normalize(raw)
    torch.testing.assert_close(normalized, (raw - raw.min(1, keepdim=True)[0]) / (raw.max(1)[0] - raw.min(1)[0])[:, None])


@pytest.mark.parametrize(("dim", "parameters"), [(192, 60_673), (96, 15_361), (384, 241_153)])
def test_official_scorer_has_the_published_size(dim: int, parameters: int) -> None:
    assert sum(p.numel() for p in OfficialScorer(dim).parameters()) == parameters


@pytest.mark.parametrize("family", [PaperScorer, OfficialScorer])
def test_normalized_scores_lie_between_0_and_1(family: type[Scorer]) -> None:
    scores = family(8).normalize(torch.randn(50, 9) * 10)
    assert scores.min() >= 0
    assert scores.max() <= 1
