"""Each way to learn a selection does what it says, and the defaults are the paper's."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stts_lightning import create_model
from stts_lightning.selection.baselines import AnchorFeatures, DifferenceWindow
from stts_lightning.selection.noise import Noise
from stts_lightning.selection.scorer import SCORERS, ContextScorer, DeviationScorer, PaperScorer, Scorer
from stts_lightning.selection.selector import SlotContext
from stts_lightning.selection.spatial import SpatialSelector
from stts_lightning.selection.spec import CHOICES, SelectionError, SelectionSpec, SlotSpec
from stts_lightning.selection.temporal import TemporalSelector

SIZE = (4, 8, 8)
SIGMA = torch.tensor(0.3)


def spatial(**options: Any) -> SpatialSelector:
    torch.manual_seed(0)
    return SpatialSelector(SlotContext(SlotSpec("s0", side=4), SIZE, 6, SelectionSpec(**options)))


def temporal(**options: Any) -> TemporalSelector:
    torch.manual_seed(0)
    return TemporalSelector(SlotContext(SlotSpec("t0", keep=2), SIZE, 6, SelectionSpec(**options)))


@pytest.fixture
def grid() -> Tensor:
    return torch.randn(2, *SIZE, 6, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_the_paper_normalises_tokens_and_its_windows_differ_little(grid: Tensor) -> None:
    of_tokens, of_windows = (spatial(**options).window_scores(grid) for options in ({}, {"normalize": "windows"}))
    spread = of_tokens.amax(-1) - of_tokens.amin(-1)
    assert float(spread.max()) < 0.5, "means over 16 tokens of a frame are close to each other"
    assert torch.allclose(of_windows.amax(-1), torch.ones(2, 4)) and torch.equal(of_windows.amin(-1), torch.zeros(2, 4))
    assert torch.equal(of_tokens.argmax(-1), of_windows.argmax(-1)), "the best window is the same"
    official = spatial(scorer="official").window_scores(grid)
    assert float(official.amax(-1).min()) > 0.98, "the official code normalises windows"
    assert float(spatial(scorer="official", normalize="tokens").window_scores(grid).amax()) < 1


def test_over_a_clip_only_its_best_frame_has_the_score_1(grid: Tensor) -> None:
    scores = spatial(normalize="windows", scope="clip").window_scores(grid)
    assert torch.allclose(scores.flatten(1).amax(-1), torch.ones(2)) and torch.equal(scores.flatten(1).amin(-1), torch.zeros(2))
    assert int((scores.amax(-1) == 1).sum()) == 2


def test_windows_of_a_clip_are_one_and_smooth_ones_move_less(grid: Tensor) -> None:
    windows = {how: spatial(windows=how).eval()(grid, SIGMA, Noise())[1] for how in CHOICES["windows"]}
    assert all(len(row.unique(dim=0)) == 1 for row in windows["clip"].windows)
    assert windows["clip"].scores.shape == windows["frame"].scores.shape == (2, 4, 9)
    steps = {how: selection.scores.diff(dim=1).abs().mean() for how, selection in windows.items()}
    assert steps["clip"] == 0 < steps["smooth"] < steps["frame"]
    trained = spatial(windows="clip").train()(grid, SIGMA, Noise.of(range(2)))[1]
    assert torch.equal(trained.indicator, trained.indicator[:, :1].expand_as(trained.indicator)), "in training too"
    three = spatial().window_scores(grid)[:, :3].mean(1)
    assert torch.allclose(windows["smooth"].scores[:, 1], three, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("kind", [SpatialSelector, AnchorFeatures])
def test_motion_tells_windows_apart_and_what_stands_still_does_not(kind: type[SpatialSelector], grid: Tensor) -> None:
    torch.manual_seed(0)
    slot, of = SlotSpec("s0", side=4), SelectionSpec(windows="motion", scorer="official")
    selector = kind(SlotContext(slot, SIZE, 6, of)).eval()
    kept, chosen = selector(grid, SIGMA, Noise())
    assert chosen.scores.shape == (2, 4, 9) and chosen.windows.shape == (2, 4, 4)
    assert all(len(row.unique(dim=0)) == 1 for row in chosen.windows), "one window for the clip"
    scene = 5 * torch.randn(1, 1, *SIZE[1:], 6, generator=torch.Generator().manual_seed(2))
    before_it, again = selector(grid + scene, SIGMA, Noise())
    torch.testing.assert_close(again.scores, chosen.scores, atol=1e-4, rtol=0)
    windows = (chosen.scores, chosen.windows, chosen.indices)
    torch.testing.assert_close(before_it, kept + selector.take(scene.expand_as(grid), *windows)[0])
    backwards = selector(grid.flip(1), SIGMA, Noise())[1]
    torch.testing.assert_close(backwards.scores, chosen.scores, atol=1e-4, rtol=0)
    still = grid[:, :1].repeat(1, 4, 1, 1, 1)
    still[:, :, :2, :2] = grid[:, :, :2, :2]
    first, *others = selector(still, SIGMA, Noise())[1].scores[:, 0].unbind(-1)
    assert all(torch.equal(other, others[0]) for other in others), "windows in which nothing moves"
    assert ((first - others[0]).abs() > 0.9).all(), "and the one in which something does"


@torch.no_grad()
@pytest.mark.parametrize("build", [lambda of: SpatialSelector(of).eval(), DifferenceWindow])
def test_the_first_frame_may_be_left_out_of_motion_where_no_frames_are_chosen(build: Any, grid: Tensor) -> None:
    odd = torch.cat((20 * torch.rand(2, 1, *SIZE[1:], 6), grid[:, 1:]), 1)
    slot, frames = SlotSpec("s0", side=4), SlotSpec("t0", keep=2)

    def same(selection: SelectionSpec, slot: SlotSpec = slot) -> bool:
        torch.manual_seed(0)
        selector = build(SlotContext(slot, SIZE, 6, selection))
        return torch.equal(*(selector(given, SIGMA, Noise())[1].scores for given in (grid, odd)))

    assert same(SelectionSpec(windows="motion", first_frame="next", slots=(slot,)))
    assert not same(SelectionSpec(windows="motion", slots=(slot,)))
    assert not same(SelectionSpec(windows="motion", first_frame="next", slots=(frames, slot))), "any frame may be the first"
    assert not same(SelectionSpec(windows="motion", first_frame="next"), SlotSpec("s1", side=4)), "before block 0 alone"
    two = build(SlotContext(slot, (2, *SIZE[1:]), 6, SelectionSpec(windows="motion", first_frame="next", slots=(slot,))))
    assert two(grid[:, :2], SIGMA, Noise())[1].scores.std() > 0.01, "of two frames both are needed"


def test_motion_of_one_frame_is_refused_and_noise_of_one_seed_gives_one_window(grid: Tensor) -> None:
    one = SlotContext(SlotSpec("s0", side=4), (1, 8, 8), 6, SelectionSpec(windows="motion"))
    with pytest.raises(SelectionError, match=r"selection.windows=motion: needs two frames.*slot s0; .*frame or clip"):
        SpatialSelector(one)
    kept, chosen = spatial(windows="motion").train()(grid, SIGMA, Noise.of(range(2)))
    assert torch.equal(chosen.indicator, chosen.indicator[:, :1].expand_as(chosen.indicator))
    kept.square().sum().backward()


def test_a_segment_is_mixed_of_segments_in_their_order(grid: Tensor) -> None:
    """By enumeration: a frame that comes out is the mean of the frames at its place in all segments, by their weights."""
    selector = temporal(frames="segment", estimator="exact").train()
    kept, selection = selector(grid, SIGMA, Noise.of(range(2)))
    raw = selector.scorer(selector.scorer.describe_frames(grid))
    means = torch.stack([(raw[:, first] + raw[:, first + 1]) / 2 for first in range(3)], 1)
    low, high = means.amin(-1, keepdim=True), means.amax(-1, keepdim=True)
    weights = selector.soft_topk((means - low) / (high - low), 1, SIGMA, Noise.of(range(2)))[:, 0]
    expected = torch.stack([sum(weights[:, s, None, None, None] * grid[:, s + k] for s in range(3)) for k in range(2)], 1)
    torch.testing.assert_close(kept, expected)
    assert selection.indicator.shape == (2, 2, 4)
    torch.testing.assert_close(selection.indicator.sum(-1), torch.ones(2, 2))
    assert torch.equal(selection.indices, selector.eval()(grid, SIGMA, Noise())[1].indices)
    assert torch.equal(selection.indices[:, 0], means.argmax(-1))


def test_the_first_frame_may_be_scored_as_the_next(grid: Tensor) -> None:
    odd = torch.cat((20 * torch.ones_like(grid[:, :1]), grid[:, 1:]), 1)
    own, following = (temporal(first_frame=how, scorer="official").eval() for how in CHOICES["first_frame"])
    scores = [[selector(given, SIGMA, Noise())[1].scores for given in (grid, odd)] for selector in (own, following)]
    assert not torch.equal(*scores[0]) and torch.equal(*scores[1]), "what it shows has no effect"
    assert torch.equal(scores[1][0][:, 0], scores[1][0][:, 1])
    second = torch.cat((grid[:, 1:2], grid[:, 1:]), 1)
    assert torch.equal(following.raw_scores(grid), own.raw_scores(second))
    kept, chosen = following(odd, SIGMA, Noise())
    assert torch.equal(kept, odd[torch.arange(2)[:, None], chosen.indices]), "what is kept are its own tokens"
    later = TemporalSelector(SlotContext(SlotSpec("t1", keep=2), SIZE, 6, SelectionSpec(first_frame="next"))).eval()
    assert not torch.equal(*(later(given, SIGMA, Noise())[1].scores for given in (grid, odd))), "before block 0 alone"
    alone = TemporalSelector(SlotContext(SlotSpec("t0", keep=1), (1, 8, 8), 6, SelectionSpec(first_frame="next"))).eval()
    assert alone(grid[:, :1], SIGMA, Noise())[1].indices.tolist() == [[0], [0]]


@pytest.mark.parametrize("sigma_of", CHOICES["sigma_of"])
def test_a_segment_of_all_frames_is_kept_with_finite_gradients(sigma_of: str, grid: Tensor) -> None:
    whole = SlotContext(SlotSpec("t0", keep=4), SIZE, 6, SelectionSpec(frames="segment", sigma_of=sigma_of))
    selector = TemporalSelector(whole).train()
    kept, selection = selector(grid, SIGMA, Noise.of(range(2)))
    torch.testing.assert_close(kept, grid)
    assert selection.indices.tolist() == [[0, 1, 2, 3]] * 2
    kept.square().sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in selector.parameters())


def test_deviation_sees_what_stands_out_of_a_frame_and_no_place_in_time(grid: Tensor) -> None:
    described = DeviationScorer.describe_frames(grid)
    torch.testing.assert_close(described, grid.std(dim=(2, 3), correction=0))
    of_place = torch.arange(4.0).view(1, 4, 1, 1, 1) * torch.ones(6)
    torch.testing.assert_close(DeviationScorer.describe_frames(grid + of_place), described, atol=1e-4, rtol=0)
    moved = grid.clone()
    moved[:, 2, 3, 3] += 10.0
    more = DeviationScorer.describe_frames(moved) > described + 0.1
    assert more[:, 2].all() and not more[:, [0, 1, 3]].any()
    flat = torch.ones(1, 2, 1, 1, 3, requires_grad=True)
    DeviationScorer.describe_frames(flat).sum().backward()
    assert torch.equal(flat.grad, torch.zeros_like(flat)), "finite where nothing deviates"
    assert DeviationScorer.describe_frames(grid.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("stated", [True, False])
def test_a_file_of_a_deviation_scorer_is_read_as_one(stated: bool, tmp_path: Path) -> None:
    asked = {"slots": {"t0": 0.5, "s1": 0.5}, "scorer": "deviation"}
    model = create_model("mvit_tiny", asked, 3, size=64).eval()
    clip = torch.randint(0, 256, (1, 3, 16, 64, 64), dtype=torch.uint8)
    torch.save({"state_dict": model.state_dict(), "model": model.recipe} if stated else model.state_dict(), tmp_path / "file.pt")
    given = {**asked, "scorer": "paper"} if stated else asked
    assert torch.equal(create_model("mvit_tiny", given, 3, pretrained=tmp_path / "file.pt", size=64).eval()(clip), model(clip))


@pytest.mark.parametrize("make", [spatial, temporal])
def test_hard_training_sees_what_evaluation_sees_with_the_gradients_of_the_soft_one(make: Any, grid: Tensor) -> None:
    hard, soft = make(forward="hard").train(), make().train()
    kept, selection = hard(grid, SIGMA, Noise.of(range(2)))
    expected, chosen = hard.eval()(grid, SIGMA, Noise())
    torch.testing.assert_close(kept, expected)
    assert torch.equal(selection.indices, chosen.indices)
    assert not torch.allclose(soft(grid, SIGMA, Noise.of(range(2)))[0], expected)
    # A linear loss has the same gradient wherever it is taken.
    weight = torch.randn(kept.shape)
    gradients = []
    for selector in (hard.train(), soft):
        (selector(grid, SIGMA, Noise.of(range(2)))[0] * weight).sum().backward()
        gradients.append([p.grad for p in selector.scorer.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)
    assert any(g.abs().sum() > 0 for g in gradients[0])


@pytest.mark.parametrize("make", [spatial, temporal])
def test_sigma_of_the_spread_does_not_depend_on_the_scale_of_scores(make: Any) -> None:
    selector = make(sigma_of="spread")
    scores = torch.rand(3, 9, generator=torch.Generator().manual_seed(2))
    noise = Noise.of(range(3))
    one, tenth = (selector.soft_topk(factor * scores, 2, torch.tensor(1.0), noise) for factor in (1.0, 0.1))
    torch.testing.assert_close(one, tenth)
    absolute = make().soft_topk
    assert not torch.allclose(absolute(scores, 2, torch.tensor(1.0), noise), absolute(0.1 * scores, 2, torch.tensor(1.0), noise))
    by_hand = absolute(scores, 2, torch.tensor(1.0), noise)
    spread = scores.std(-1)
    assert torch.allclose(selector.soft_topk(scores / spread[:, None], 2, torch.tensor(1.0), noise), one, atol=1e-6)
    assert by_hand.shape == one.shape


def test_the_context_decides_in_the_context_scorer_and_cancels_in_the_papers() -> None:
    torch.manual_seed(0)
    row = torch.randn(1, 6, 8)
    other = torch.cat((row[:, :3], row[:, 3:] + 2), dim=1)  # The same first three candidates in other company.
    for kind, cancels in ((PaperScorer, True), (ContextScorer, False)):
        scorer = kind(8)
        differences = [scorer(x)[0, :3].diff() for x in (row, other)]
        assert torch.allclose(*differences, atol=1e-6) == cancels, kind


@pytest.mark.parametrize("scorer", list(SCORERS))
@pytest.mark.parametrize("make", [spatial, temporal])
def test_an_even_start_prefers_nothing_and_learns(make: Any, scorer: str, grid: Tensor) -> None:
    selector = make(start="even", scorer=scorer, estimator="exact").train()
    kept, selection = selector(grid, SIGMA, Noise.of(range(2)))
    assert torch.equal(selection.scores, torch.zeros_like(selection.scores))
    assert float(selection.indicator.detach().std(-1).mean()) < float(
        make(scorer=scorer, normalize="windows").train()(grid, SIGMA, Noise.of(range(2)))[1].indicator.detach().std(-1).mean()
    )
    weight = torch.randn(kept.shape, generator=torch.Generator().manual_seed(3))
    before = (kept * weight).sum()
    before.backward()
    largest = max(float(parameter.grad.abs().max()) for parameter in selector.parameters())
    assert 0 < largest < 1e3, "not stretched, so that float16 holds it"
    with torch.no_grad():
        for parameter in selector.parameters():
            parameter -= 1e-2 * parameter.grad / parameter.grad.norm().clamp_min(1e-12)
        after = (selector(grid, SIGMA, Noise.of(range(2)))[0] * weight).sum()
        scores = selector(grid, SIGMA, Noise.of(range(2)))[1].scores
    assert after < before.detach(), "one step down the gradient lowers the loss"
    assert 0 < float(scores.max() - scores.min()) < 0.1, "a small step is a small preference"


@pytest.mark.parametrize("scorer", list(SCORERS))
@pytest.mark.parametrize("make", [spatial, temporal])
def test_a_small_start_prefers_little_and_all_layers_learn_at_once(make: Any, scorer: str, grid: Tensor) -> None:
    torch.manual_seed(5)
    stretched = make(scorer=scorer, normalize="windows")
    small = make(start="small", scorer=scorer, normalize="windows", estimator="exact").train()
    small.load_state_dict(stretched.state_dict())
    scores = [selector.eval()(grid, SIGMA, Noise.of(range(2)))[1].scores for selector in (stretched, small)]
    assert torch.equal(scores[0].argsort(-1), scores[1].argsort(-1)), "the order is the same"
    ranges = [float((one.amax(-1) - one.amin(-1)).detach().max()) for one in scores]
    assert ranges[0] > 0.99 and 0 < ranges[1] < 0.5
    small.train()(grid, SIGMA, Noise.of(range(2)))[0].square().sum().backward()
    *layers, bias = (parameter.grad for parameter in small.parameters())
    assert all(float(gradient.abs().max()) > 0 for gradient in layers), "an even start holds back all layers but the last"


def test_small_frames_start_small_but_for_windows() -> None:
    clip = torch.randint(0, 256, (2, 3, 16, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(4))
    ranges: dict[str, dict[str, float]] = {}
    for start in ("random", "small", "small_frames"):
        torch.manual_seed(6)
        asked = {"slots": {"t0": 0.5, "s0": 0.25}, "scorer": "official", "start": start}
        kept = create_model("mvit_tiny", asked, 3, size=64).eval()(clip, return_selection=True)[1]
        scores = {name: selection.scores.detach() for name, selection in kept.items()}
        ranges[start] = {name: float((one.amax(-1) - one.amin(-1)).min()) for name, one in scores.items()}
    assert ranges["random"]["t0"] > 0.9 and ranges["small"]["s0"] < 0.5, "what is told apart below"
    assert ranges["small_frames"] == {"t0": ranges["small"]["t0"], "s0": ranges["random"]["s0"]}
    asked = {"slots": {"r0": 0.5}, "reducer": "topk", "start": "small_frames"}
    (scorer,) = (module for module in create_model("vit_tiny", asked, 3, size=64).modules() if isinstance(module, Scorer))
    assert scorer.least_range == 1.0, "reducers are not windows"


@pytest.mark.parametrize("scorer", list(SCORERS))
@pytest.mark.parametrize("backbone", ["mvit_tiny", "video_swin_tiny"])
def test_an_even_start_outlasts_the_backbones_own_initialisation(backbone: str, scorer: str, tmp_path: Path) -> None:
    asked = {"slots": {"t0": 0.5, "s1": 0.5}, "scorer": scorer, "start": "even"}
    clip = torch.randint(0, 256, (2, 3, 16, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(4))
    plain = create_model(backbone, None, 3, size=64)
    torch.save(plain.state_dict(), tmp_path / "plain.pt")
    for pretrained in (None, tmp_path / "plain.pt"):
        model = create_model(backbone, asked, 3, pretrained=pretrained, size=64)
        kept = model(clip, return_selection=True)[1]
        assert all(not selection.scores.any() for selection in kept.values())
    other = create_model(backbone, {**asked, "start": "random"}, 3, size=64)
    torch.save(other.state_dict(), tmp_path / "learned.pt")
    again = create_model(backbone, asked, 3, pretrained=tmp_path / "learned.pt", size=64).eval()
    assert torch.equal(again(clip), other.eval()(clip)), "what was learned is kept"


@pytest.mark.parametrize("key", list(CHOICES))
def test_unknown_ways_are_refused_and_the_first_is_the_default(key: str) -> None:
    with pytest.raises(SelectionError, match=rf"selection.{key}='none': allowed are {CHOICES[key][0]}, "):
        SelectionSpec.of({key: "none"})
    assert getattr(SelectionSpec(), key) == CHOICES[key][0]
    assert SelectionSpec.of(SelectionSpec(**{key: CHOICES[key][-1]}).to_dict()) == SelectionSpec(**{key: CHOICES[key][-1]})
