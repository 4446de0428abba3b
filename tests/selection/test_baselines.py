"""Baselines, ablations and choices without training: each keeps what its learned sibling keeps, by its own rule."""

import itertools

import pytest
import torch

from stts_lightning import create_model
from stts_lightning.selection.baselines import SELECTORS, GumbelFrames, find_selector
from stts_lightning.selection.noise import Noise
from stts_lightning.selection.selector import SlotContext
from stts_lightning.selection.spec import SelectionError, SelectionSpec, SlotSpec

SIZE = (6, 8, 10)
EACH = [(axis, name) for axis, names in SELECTORS.items() for name in names]


def build(axis: str, name: str, options: dict[str, str] | None = None, **slot: object) -> torch.nn.Module:
    spec = SlotSpec(f"{axis}1", selector=name, **({"ratio": 0.5} | slot))  # type: ignore[arg-type]
    selection = SelectionSpec((spec,), **(options or {}))  # type: ignore[arg-type]
    torch.manual_seed(0)
    return find_selector(spec, selection)(SlotContext(spec, SIZE, 16, selection, ""))


def grid_of(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, *SIZE, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("axis", "name"), EACH)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{}, {"frames": "segment", "windows": "clip"}])
def test_sizes_are_those_of_the_learned_one(axis: str, name: str, training: bool, options: dict[str, str]) -> None:
    selector = build(axis, name, options).train(training)
    grid = grid_of().requires_grad_()
    kept, selection = selector(grid, torch.tensor(0.1), Noise.of([0, 1]), torch.rand(2, *SIZE))
    assert kept.shape == (2, *build(axis, "learned").out_size, 16) == (2, *selector.out_size, 16)
    kept.square().sum().backward()
    for key, parameter in selector.named_parameters():
        assert parameter.grad is None or torch.isfinite(parameter.grad).all(), key
    if training:
        assert all(p.grad is not None for p in selector.parameters()), "no parameter drops out of the graph"
    if axis == "t":
        assert (selection.indices.diff(dim=1) > 0).all(), "frames keep their order"
    if not training:  # what comes out are tokens that went in
        assert torch.isin(kept, grid).all()


@pytest.mark.parametrize(("axis", "name"), EACH)
def test_evaluation_repeats(axis: str, name: str) -> None:
    selector, attention = build(axis, name).eval(), torch.rand(2, *SIZE)
    a, b = (selector(grid_of(), torch.tensor(0.1), Noise(), attention)[0] for _ in range(2))
    assert torch.equal(a, b)


def test_random_differs_from_step_to_step_and_follows_its_noise() -> None:
    for axis in "ts":
        selector = build(axis, "random").train()
        draws = [selector(grid_of(), torch.tensor(0.1), Noise.of([s, 7]))[1].indices for s in (1, 1, 2)]
        assert torch.equal(draws[0], draws[1])
        assert not torch.equal(draws[0], draws[2])


def test_random_in_evaluation_depends_on_slot_and_clip_alone() -> None:
    grid = grid_of(12)
    for axis in "ts":
        selector = build(axis, "random").eval()
        together = selector(grid, torch.tensor(0.1), Noise())[1].indices
        alone = torch.cat([selector(one[None], torch.tensor(0.1), Noise())[1].indices for one in grid])
        assert torch.equal(together, alone)
        assert len(together.unique(dim=0)) > 4, "clips differ"


def test_uniform_and_centre() -> None:
    indices = build("t", "uniform", ratio=None, keep=3)(grid_of(), torch.tensor(0.1), Noise())[1].indices
    assert indices.tolist() == [[1, 3, 5]] * 2
    grid = grid_of()
    for keep, middle in ((4, [1, 2, 3, 4]), (3, [1, 2, 3]), (6, [0, 1, 2, 3, 4, 5])):
        kept, selection = build("t", "centre", ratio=None, keep=keep)(grid, torch.tensor(0.1), Noise())
        assert selection.indices.tolist() == [middle] * 2
        assert torch.equal(kept, grid[:, middle])
    kept, selection = build("s", "centre", ratio=None, side=4)(grid, torch.tensor(0.1), Noise())
    assert torch.equal(kept, grid[:, :, 2:6, 3:7])
    assert selection.windows.tolist() == [[[2, 3, 4, 4]] * 6] * 2


@pytest.mark.parametrize("name", ["learned", "random", "norm", "difference", "attention", "gumbel", "centre", "oracle"])
@pytest.mark.parametrize("training", [True, False])
def test_a_segment_is_frames_that_follow_one_another(name: str, training: bool) -> None:
    selector = build("t", name, {"frames": "segment"}, ratio=None, keep=3).train(training)
    grid, attention = grid_of(8), torch.rand(8, *SIZE)
    kept, selection = selector(grid, torch.tensor(0.1), Noise.of(range(8)), attention)
    assert (selection.indices.diff(dim=1) == 1).all()
    assert selection.scores.shape == (8, 6)
    if not training:
        assert torch.equal(kept, grid[torch.arange(8)[:, None], selection.indices])


def test_the_segment_has_the_highest_mean_though_it_may_lack_the_best_frame() -> None:
    grid = torch.zeros(1, *SIZE, 16)
    for frame, size in enumerate((5.0, 0.0, 3.5, 4.0, 3.0, 0.0)):
        grid[0, frame] = size
    assert build("t", "norm", ratio=None, keep=3)(grid, torch.tensor(0.1), Noise())[1].indices.tolist() == [[0, 2, 3]]
    segment = build("t", "norm", {"frames": "segment"}, ratio=None, keep=3)
    assert segment(grid, torch.tensor(0.1), Noise())[1].indices.tolist() == [[2, 3, 4]]


@pytest.mark.parametrize("name", ["norm", "difference"])
def test_a_first_frame_that_is_like_no_other_may_be_left_out_of_the_judgement(name: str) -> None:
    grid = torch.zeros(1, *SIZE, 16)
    grid[0, 0] = 50.0  # What the zeros before a clip do to its first frame.
    grid[0, 2], grid[0, 4] = 1.0, 3.0
    found = {}
    for how in ("own", "next"):
        spec = SlotSpec("t0", keep=2, selector=name)
        selection = SelectionSpec((spec,), first_frame=how)
        selector = find_selector(spec, selection)(SlotContext(spec, SIZE, 16, selection, ""))
        found[how] = selector(grid, torch.tensor(0.1), Noise())[1].indices[0].tolist()
    assert 0 in found["own"]
    assert 4 in found["next"] and 0 not in found["next"]


def test_of_equal_scores_the_earlier_frame_is_kept() -> None:
    spec = SlotSpec("t0", keep=1, selector="norm")
    selection = SelectionSpec((spec,), first_frame="next")
    selector = find_selector(spec, selection)(SlotContext(spec, SIZE, 16, selection))
    grid = torch.zeros(4, *SIZE, 16)
    grid[:, 1] = 1.0
    assert selector(grid, torch.tensor(0.1), Noise())[1].indices.tolist() == [[0]] * 4


def test_random_segments_begin_anywhere_equally_often() -> None:
    selector = build("t", "random", {"frames": "segment"}, ratio=None, keep=3).train()
    _, selection = selector(grid_of(1).expand(2000, *SIZE, 16), torch.tensor(0.1), Noise.of(range(2000)))
    counts = selection.indices[:, 0].bincount(minlength=4) / 2000
    torch.testing.assert_close(counts, torch.full((4,), 0.25), atol=0.04, rtol=0)


def test_hard_choices_may_have_one_window_for_the_clip() -> None:
    for name in ("random", "norm", "difference", "attention"):
        windows = build("s", name, {"windows": "clip"})(grid_of(8), torch.tensor(0.1), Noise(), torch.rand(8, *SIZE))[1].windows
        assert (windows == windows[:, :1]).all(), name
        assert len(windows[:, 0].unique(dim=0)) > 1, "clips differ"


def test_norm_difference_and_attention_find_what_they_look_for() -> None:
    grid, attention = torch.zeros(1, *SIZE, 16), torch.zeros(1, *SIZE)
    grid[0, 4, 5:, 6:] = 3.0  # one frame, one corner
    attention[0, 4, 5:, 6:] = 1.0
    for name in ("norm", "difference", "attention"):
        _, frames = build("t", name, ratio=None, keep=2)(grid, torch.tensor(0.1), Noise(), attention)
        assert 4 in frames.indices[0], name
        _, found = build("s", name, ratio=None, side=4)(grid, torch.tensor(0.1), Noise(), attention)
        assert found.windows[0, 4].tolist() == [4, 6, 4, 4], name


def test_gumbel_draws_without_replacement_as_the_gumbel_top_k_does() -> None:
    selector = build("t", "gumbel", ratio=None, keep=2).train()
    assert isinstance(selector, GumbelFrames)
    grid = grid_of(1)
    raw = selector.scorer(selector.scorer.describe_frames(grid)).detach()[0].double()
    chances = raw.softmax(-1)
    expected = torch.zeros(6, dtype=torch.float64)  # of being among two draws without replacement
    for i, j in itertools.permutations(range(6), 2):
        expected[[i, j]] += chances[i] * chances[j] / (1 - chances[i])
    counts = torch.zeros(6, dtype=torch.float64)
    for seed in range(1500):
        _, selection = selector(grid, torch.tensor(0.1), Noise.of([seed]))
        counts[selection.indices[0]] += 1
        assert torch.allclose(selection.indicator.sum(-1), torch.ones(1, 2), atol=1e-4)
    torch.testing.assert_close(counts / 1500, expected, atol=0.05, rtol=0)


def test_tokens_keeps_the_best_in_order() -> None:
    selector = build("s", "tokens", ratio=None, side=3).eval()
    kept, selection = selector(grid_of(), torch.tensor(0.1), Noise())
    assert selection.indices.shape == (2, 6, 9)
    assert (selection.indices.diff(dim=-1) > 0).all()
    assert torch.equal(selection.indices, selection.scores.topk(9, dim=-1).indices.sort(-1).values)
    assert kept.shape == (2, 6, 3, 3, 16)
    assert selector.extra_repr() == "9 of 80 tokens of each frame"


@pytest.mark.parametrize(
    ("backbone", "selection", "message"),
    [
        (
            "mvit_tiny",
            {"slots": {"t0": 0.5}, "selector": "attention"},
            "slots.t0: .* no self-attention .* before block 0",
        ),
        ("video_swin_tiny", {"slots": {"t2": 0.5}, "selector": "attention"}, "slots.t2: .* this backbone has no class token"),
        (
            "mvit_tiny",
            {"slots": {"s2": {"ratio": 0.5, "selector": "gumbel"}}},
            "s2.selector='gumbel': allowed are learned.*down",
        ),
        ("mvit_tiny", {"slots": {"s2": 0.5}, "selector": "best"}, "selection.selector, at slot s2='best': allowed are learned"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(backbone: str, selection: dict[str, object], message: str) -> None:
    with pytest.raises(SelectionError, match=message):
        create_model(backbone, selection, 5)


@pytest.mark.parametrize("selection", ["t2_0.5_s2_0.5", "t1_0.5", "s4_0.6"])
def test_attention_is_the_class_tokens_own(selection: str) -> None:
    """The map that a slot receives, against attention written out for the block before."""
    spec = SelectionSpec.of(selection).to_dict() | {"selector": "attention"}
    model = create_model("mvit_tiny", spec, 5, size=64).eval()
    block = model.backbone.blocks[SelectionSpec.of(selection).slots[0].block - 1]
    seen = {}
    block.register_forward_hook(lambda _, args, out: seen.update(args=args, out=out))
    for pool in ("pool_q", "pool_k"):
        if getattr(block.attn, pool) is not None:
            getattr(block.attn, pool).register_forward_hook(
                lambda _, __, out, pool=pool: seen.setdefault(pool, []).append(out)  # In evaluation, a clip at a time.
            )
    with torch.inference_mode():
        model(torch.randn(2, 3, 16, 64, 64))
        told = seen["out"][1]
        q = block.attn.qkv(block.norm1(seen["args"][0][:, :1])).unflatten(-1, (3, block.attn.heads, -1))[:, :, 0].transpose(1, 2)
        q = torch.cat(seen["pool_q"])[:, :, :1] if block.attn.pool_q is not None else q
        weights = (q @ torch.cat(seen["pool_k"]).transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1).mean(1)[:, 0, 1:]
    assert told.shape[1:] == block.out_size
    torch.testing.assert_close(told.mean((1, 2, 3)), weights.mean(-1), atol=1e-6, rtol=1e-5)
    if told[0].numel() >= weights[0].numel():  # else several keys are averaged
        for one, expected in zip(told.flatten(1), weights, strict=True):
            nearest = (one[:, None] - expected).abs()
            assert nearest.amin(1).max() < 1e-6, "each token has the value of a pooled key"
            assert nearest.amin(0).max() < 1e-6, "and each key stands for a token"
