"""Reducers: each against its definition, and all of them in a ViT."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stts_lightning import create_model, load_model
from stts_lightning.analysis.flops import count_gflops
from stts_lightning.analysis.kept import trace
from stts_lightning.analysis.overlay import merged
from stts_lightning.backbones.vit import Block
from stts_lightning.classifier import VideoClassifier
from stts_lightning.selection.noise import Noise
from stts_lightning.selection.reducer import Given, Reducer, ReducerContext, Reduction, Tokens
from stts_lightning.selection.reducers import REDUCERS, find_reducer
from stts_lightning.selection.spec import SelectionError, SelectionSpec
from stts_lightning.selection.truth import found

DIM = 8
SIGMA = torch.tensor(0.1)


def build(kind: str, tokens: int, slot: dict[str, Any], block: int = 0, grid: tuple[int, int, int] | None = None) -> Reducer:
    """A reducer for `tokens` tokens of 8 channels."""
    selection = SelectionSpec.of({"reducer": kind, "slots": {f"r{block}": slot}})
    grid = grid or (1, 1, tokens)
    clip_size = (2 * grid[0], 4 * grid[1], 4 * grid[2])
    slot_spec = selection.slots[0]
    context = ReducerContext(f"r{block}", slot_spec, block, tokens, grid, clip_size, (0.229, 0.224, 0.225), DIM, selection)
    return find_reducer(slot_spec, selection)(context)


def draw(batch: int, tokens: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, tokens, DIM, generator=torch.Generator().manual_seed(seed))


def test_tome_merges_the_most_similar_pairs_as_written_out_in_loops() -> None:
    tokens, remove = 11, 3
    reducer = build("tome", tokens, {"drop": remove})
    x, keys = draw(2, tokens), draw(2, tokens, 1)
    sizes = torch.randint(1, 5, (2, tokens), generator=torch.Generator().manual_seed(2)).float()
    out, where = reducer(Tokens(x, sizes), Given(keys=keys), SIGMA, Noise())
    for row in range(2):
        unit = (keys[row] / keys[row].norm(dim=-1, keepdim=True)).numpy()
        first, second = list(range(0, tokens, 2)), list(range(1, tokens, 2))
        best = {a: max(second, key=lambda b: float(unit[a] @ unit[b])) for a in first}
        order = sorted(first, key=lambda a: -float(unit[a] @ unit[best[a]]))
        groups = [[a] for a in order[remove:]] + [[b, *(a for a in order[:remove] if best[a] == b)] for b in second]
        for number, group in enumerate(groups):
            weight = sizes[row, group]
            torch.testing.assert_close(out.x[row, number], (x[row, group] * weight[:, None]).sum(0) / weight.sum())
            assert out.sizes is not None and out.sizes[row, number] == weight.sum()
            assert (where[row, group] == number).all()


def test_tome_takes_at_most_half_and_loses_no_token() -> None:
    model = create_model("vit_tiny", "r0-5_200", 5).eval()
    clip = torch.randn(2, 3, 16, 64, 64)
    assert [reducer.out_tokens for reducer in model.slots.reducers.values()] == [312, 156, 78, 39, 20, 10]
    _, kept = model(clip, return_selection=True)
    where = None
    for record in kept.values():
        assert isinstance(record, Reduction)
        where = record.after(where)
    assert where is not None and where.shape == (2, 512)
    assert all(set(row.tolist()) == set(range(10)) for row in where)


def test_doubled_tokens_merged_change_nothing_if_sizes_count_in_attention_and_in_the_mean() -> None:
    torch.manual_seed(0)
    blocks = [Block(DIM, 2, 0.0).eval() for _ in range(3)]
    for parameter in (p for block in blocks for p in block.parameters()):
        torch.nn.init.normal_(parameter, std=0.5)
    distinct = draw(2, 20)
    # A token and its double stand in different halves; 6 of the 20 have one.
    doubled = torch.cat((distinct[:, :6].repeat_interleave(2, 1), distinct[:, 6:]), 1)
    reducer = build("tome", 26, {"drop": 6})

    def run(merge: bool, attention: bool, pooling: bool) -> Tensor:
        tokens = Tokens(doubled)
        for number, block in enumerate(blocks):
            reducing = (lambda t, g: reducer(t, g, SIGMA, Noise())) if merge and number == 0 else None
            if reducing is not None:
                reducing.needs = reducer.needs  # type: ignore[attr-defined]
            tokens, _, _ = block(tokens.x, tokens, tokens.bias(attention), reducing)
        assert tokens.x.shape[1] == (20 if merge else 26)
        return tokens.mean(pooling)

    expected = run(merge=False, attention=True, pooling=True)
    torch.testing.assert_close(run(True, True, True), expected, atol=2e-5, rtol=1e-4)
    for attention, pooling in ((True, False), (False, True)):
        assert (run(True, attention, pooling) - expected).abs().max() > 1e-2


def test_attention_received_ranks_tokens_and_evit_adds_the_sum_of_the_others() -> None:
    torch.manual_seed(0)
    block = Block(DIM, 2, 0.0).eval()
    x = draw(2, 10)
    _, given = block.attn(block.norm1(x), None, {"received"})
    q, k, _ = torch.nn.functional.linear(block.norm1(x), block.attn.qkv.weight).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
    q = q + block.attn.q_bias.view(2, 1, -1)
    weights = (q @ k.mT / math.sqrt(DIM / 2)).softmax(-1)  # (B, D, N, N)
    torch.testing.assert_close(given.received, weights.mean((1, 2)))
    for kind, ratio, left in (("received", 0.55, 6), ("evit", 0.55, 7)):
        reducer = build(kind, 10, {"ratio": ratio})
        out, where = reducer(Tokens(x), given, SIGMA, Noise())
        assert out.x.shape[1] == reducer.out_tokens == left
        for row in range(2):
            order = given.received[row].argsort(descending=True)
            torch.testing.assert_close(out.x[row, :6], x[row, order[:6]])
            assert where[row, order[:6]].tolist() == list(range(6)) and (where[row, order[6:]] == -1).all()
            if kind == "evit":
                rest = order[6:]
                torch.testing.assert_close(out.x[row, 6], (given.received[row, rest, None] * x[row, rest]).sum(0))


def change_in_loops(clip: np.ndarray, patch: int) -> np.ndarray:
    """Clip `(3, T, H, W)` divided by ImageNet's deviation -> change `(T / 2, h, w)`."""
    _, frames, height, width = clip.shape
    change = np.full((frames // 2, height // patch, width // patch), np.inf)
    for t in range(1, frames // 2):
        for h in range(height // patch):
            for w in range(width // patch):
                place = np.s_[:, h * patch : (h + 1) * patch, w * patch : (w + 1) * patch]
                change[t, h, w] = np.abs(clip[:, 2 * t + 1][place] - clip[:, 2 * t - 2][place]).mean()
    return change


def test_run_length_keeps_what_changed_by_threshold_and_by_budget() -> None:
    clip = torch.randn(2, 3, 8, 12, 16, generator=torch.Generator().manual_seed(0))
    clip[1, :, 4:] = clip[1, :, 3:4]
    expected = np.stack([change_in_loops(one.numpy(), 4) for one in clip]).reshape(2, -1)
    x = draw(2, 48)
    by_threshold = build("rlt", 48, {"threshold": 1.1}, grid=(4, 3, 4))
    out, where = by_threshold(Tokens(x), Given(clip=clip), SIGMA, Noise())
    assert out.real is not None
    for row in range(2):
        kept = np.flatnonzero(expected[row] > 1.1)
        assert np.flatnonzero(where[row].numpy() >= 0).tolist() == kept.tolist()
        assert int(out.real[row].sum()) == len(kept)
        torch.testing.assert_close(out.x[row, : len(kept)], x[row, kept])
    by_budget = build("rlt", 48, {"ratio": 0.5}, grid=(4, 3, 4))
    out, where = by_budget(Tokens(x), Given(clip=clip), SIGMA, Noise())
    assert out.x.shape[1] == 24 and out.real is None
    for row in range(2):
        assert set(np.flatnonzero(where[row].numpy() >= 0)) == set(np.argsort(-expected[row], kind="stable")[:24])


@pytest.mark.parametrize("slot", [{"threshold": 1.1}, {"ratio": 0.5}])
def test_run_lengths_are_told_to_the_tokens_that_are_kept(slot: dict[str, float]) -> None:
    clip = torch.randn(2, 3, 8, 12, 16, generator=torch.Generator().manual_seed(0))
    clip[1, :, 4:] = clip[1, :, 3:4]
    x = draw(2, 48)
    plain, kept_plain = build("rlt", 48, slot, grid=(4, 3, 4))(Tokens(x), Given(clip=clip), SIGMA, Noise())
    reducer = build("rlt_lengths", 48, slot, grid=(4, 3, 4))
    out, where = reducer(Tokens(x), Given(clip=clip), SIGMA, Noise())
    assert torch.equal(where, kept_plain)
    seen = set()
    for row in range(2):
        kept = where[row].view(4, 12)
        for t, place in (kept >= 0).nonzero().tolist():
            length = next((later - t for later in range(t + 1, 4) if kept[later, place] >= 0), 4 - t)
            added = reducer.of_length[length - 2] if length > 1 else torch.zeros(DIM)
            torch.testing.assert_close(out.x[row, kept[t, place]], plain.x[row, kept[t, place]] + added)
            seen.add(length)
    assert seen == {1, 2, 3, 4}


def test_run_length_scales_pixels_of_another_normalisation() -> None:
    usual = create_model("vit_tiny", {"reducer": "rlt", "slots": {"r0": {"threshold": 0.1}}}, 5)
    other = create_model(
        "vit_tiny", {"reducer": "rlt", "slots": {"r0": {"threshold": 0.1}}}, 5, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
    )
    clip = torch.randint(0, 256, (1, 3, 16, 64, 64), dtype=torch.uint8)
    found = [model.slots.reducers["r0"].change(model.normalize(clip)) for model in (usual, other)]
    torch.testing.assert_close(found[0], found[1])


def test_clips_of_different_lengths_in_a_batch_are_as_if_alone() -> None:
    model = create_model("vit_tiny", {"reducer": "rlt", "slots": {"r0": {"threshold": 0.1}}}, 5).eval()
    clip = torch.randint(0, 256, (3, 3, 16, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    clip[1, :, 6:], clip[2, :, 2:] = clip[1, :, 5:6], clip[2, :, 1:2]
    with torch.inference_mode():
        together, kept = model(clip, return_selection=True)
        lengths = [int((row >= 0).sum()) for row in kept["r0"].where]
        assert lengths == [512, 256, 128]
        torch.testing.assert_close(together, torch.cat([model(one[None]) for one in clip]), atol=1e-5, rtol=1e-4)
        # The mean is of real tokens, whether sizes count or not.
        model.slots.selection.__dict__["proportional_pooling"] = False
        torch.testing.assert_close(together, model(clip), atol=1e-5, rtol=1e-4)


def test_random_tokens_follow_from_the_clip_in_evaluation_and_differ_in_training() -> None:
    reducer = build("random", 40, {"ratio": 0.5}).eval()
    x = draw(3, 40)
    _, where = reducer(Tokens(x), Given(), SIGMA, Noise())
    _, again = reducer(Tokens(x[1:]), Given(), SIGMA, Noise())
    assert torch.equal(where[1:], again) and not torch.equal(where[0], where[1])
    reducer.train()
    first, second = (reducer(Tokens(x), Given(), SIGMA, Noise.of([seed] * 3))[1] for seed in (1, 2))
    assert not torch.equal(first, second)


def test_joint_topk_trains_its_scorer_and_is_hard_where_there_is_no_noise() -> None:
    reducer = build("topk", 30, {"ratio": 0.4})
    x = draw(2, 30)
    hard, where = reducer.eval()(Tokens(x), Given(), SIGMA, Noise())
    reducer.train()
    soft, _ = reducer(Tokens(x), Given(), torch.tensor(0.0), Noise.of([1, 2]))
    torch.testing.assert_close(soft.x, hard.x)
    for row in range(2):
        kept = (where[row] >= 0).nonzero().flatten()
        torch.testing.assert_close(hard.x[row], x[row, kept])
    mixed, _ = reducer(Tokens(x), Given(), SIGMA, Noise.of([1, 2]))
    mixed.x.square().sum().backward()
    assert reducer.scorer.local.weight.grad.abs().sum() > 0


def test_a_token_that_dynamic_vit_drops_in_training_is_as_if_it_were_not_there() -> None:
    torch.manual_seed(0)
    model = create_model("vit_tiny", {"reducer": "dynamic_vit", "slots": {"r2": 0.5}}, 5).train()
    clip = torch.randn(1, 3, 16, 64, 64)
    model.slots.seed_noise([3])
    logits, kept = model(clip, return_selection=True)
    alive = (kept["r2"].where[0] >= 0).nonzero().flatten()
    assert 100 < len(alive) < 412
    share_loss = model.slots.loss()
    torch.testing.assert_close(share_loss, torch.tensor(2.0 * (len(alive) / 512 - 0.5) ** 2), atol=1e-6, rtol=1e-4)
    assert model.slots.loss() is None, "a loss is of one forward pass"
    backbone = model.backbone
    x = backbone.patch_embed(clip).flatten(2).transpose(1, 2) + backbone.pos_embed
    for number, block in enumerate(backbone.blocks):
        x = x[:, alive] if number == 2 else x
        x = block(x, Tokens(x))[0].x
    torch.testing.assert_close(logits, model.head(backbone.norm(x.mean(1))), atol=1e-4, rtol=1e-3)
    (logits.square().sum() + share_loss).backward()
    for name, parameter in model.slots.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_dynamic_vit_never_wakes_a_token() -> None:
    model = create_model("vit_tiny", {"reducer": "dynamic_vit", "slots": {"r1": 0.7, "r3": 0.7}}, 5).train()
    model.slots.seed_noise([3, 4])
    _, kept = model(torch.randn(2, 3, 16, 64, 64), return_selection=True)
    first, second = (record.where >= 0 for record in kept.values())
    assert (first | ~second).all() and second.sum() < first.sum()
    model.eval()
    assert [reducer.out_tokens for reducer in model.slots.reducers.values()] == [358, 251]


ALL = {
    "tome": "r0-5_40",
    "random": "r1_0.7_r3_0.7",
    "evit": "r1_0.7_r3_0.7",
    "received": "r1_0.7_r3_0.7",
    "rlt": "r0_0.6",
    "rlt_lengths": "r0_0.6",
    "topk": "r0_0.7_r2_0.7",
    "dynamic_vit": "r1_0.7_r3_0.7",
}


def spec_of(kind: str, notation: str) -> dict[str, Any]:
    return {**SelectionSpec.of(notation).to_dict(), "reducer": kind}


def vit(kind: str, notation: str | None = None) -> VideoClassifier:
    torch.manual_seed(0)
    return create_model("vit_tiny", spec_of(kind, notation or ALL[kind]), 5)


def test_all_reducers_are_tried_here() -> None:
    assert sorted(ALL) == sorted(REDUCERS)


@pytest.mark.parametrize("kind", sorted(ALL))
def test_reducer_in_a_vit(kind: str) -> None:
    model = vit(kind)
    clip = torch.randn(3, 3, 16, 64, 64, generator=torch.Generator().manual_seed(0))
    model.train()
    model.slots.seed_noise([1, 2, 3])
    loss = model(clip).square().sum()
    (loss + (model.slots.loss() or 0.0)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        if not name.endswith(("scorer.score.bias", "scorer.local.bias")):  # See the contract of backbones.
            assert parameter.grad.abs().sum() > 0, name
    model.eval()
    with torch.inference_mode():
        together, kept = model(clip, return_selection=True)
        assert torch.equal(together, model(clip))
        torch.testing.assert_close(together, torch.cat([model(one[None]) for one in clip]), atol=1e-5, rtol=1e-4)
    assert list(kept) == list(model.slots.reducers)
    for name, record in kept.items():
        reducer = model.slots.reducers[name]
        assert isinstance(reducer, Reducer) and isinstance(record, Reduction)
        assert record.where.shape == (3, reducer.in_tokens)
        numbers = [set(row[row >= 0].tolist()) for row in record.where]
        left = reducer.out_tokens - (kind == "evit")  # The fused token is none of them.
        assert numbers == [set(range(left))] * 3
    again = create_model(**model.recipe)
    again.load_state_dict(model.state_dict())
    with torch.inference_mode():
        assert torch.equal(again.eval()(clip), together)


@pytest.mark.parametrize("kind", sorted(ALL))
def test_keeping_all_is_the_plain_model(kind: str) -> None:
    model = vit(kind, "_".join(f"{slot.name}_1.0" for slot in SelectionSpec.of(ALL[kind]).slots)).eval()
    plain = create_model("vit_tiny", None, 5).eval()
    plain.load_state_dict(model.state_dict(), strict=False)
    clip = torch.randn(2, 3, 16, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(model(clip), plain(clip), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", sorted(ALL))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reducers_under_autocast(kind: str, dtype: torch.dtype) -> None:
    model = vit(kind).train()
    with torch.autocast("cpu", dtype):
        loss = model(torch.randn(2, 3, 16, 64, 64)).float().square().sum()
        loss = loss + (model.slots.loss() or 0.0)
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("kind", sorted(ALL))
def test_activation_checkpointing_gives_the_same_gradients(kind: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = vit(kind).train()
        model.backbone.checkpointing = checkpointing
        model.slots.seed_noise([1, 2])
        clip = torch.randn(2, 3, 16, 64, 64, generator=torch.Generator().manual_seed(1))
        model(clip).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        if gradient is not None:
            torch.testing.assert_close(gradient, gradients[1][name], atol=1e-6, rtol=1e-4)


# GFLOPs of ViT-B and ViT-L, 16x224x224, without those of similarities, attention received and scorers.
PUBLISHED = [
    ("vit_b", "tome", "r0-11_20", 164.0, 1328),
    ("vit_b", "tome", "r0-11_65", 129.0, 788),
    ("vit_b", "tome", "r0-11_150", 74.1, 28),
    ("vit_l", "tome", "r0-23_65", 280.6, 37),
    ("vit_b", "evit", "r3_0.7_r6_0.7_r9_0.7", 113.2, 541),
    ("vit_b", "dynamic_vit", "r3_0.7_r6_0.7_r9_0.7", 107.2, 538),
    ("vit_b", "rlt", "r0_0.5", 78.9, 784),
]


@pytest.mark.parametrize(("name", "kind", "notation", "gflops", "left"), PUBLISHED)
def test_cost_of_full_models(name: str, kind: str, notation: str, gflops: float, left: int) -> None:
    with torch.device("meta"):
        model = create_model(name, spec_of(kind, notation), 400)
    *_, last = model.slots.reducers.values()
    assert isinstance(last, Reducer) and last.out_tokens == left
    assert gflops < count_gflops(model) < 1.035 * gflops


def test_slots_first_then_reducers() -> None:
    model = create_model("vit_tiny", "t0_0.5_r2_0.5", 5).eval()
    logits, kept = model(torch.randn(2, 3, 16, 64, 64), return_selection=True)
    assert logits.shape == (2, 5) and list(kept) == ["t0", "r2"]
    assert model.slots.share == 0.25
    assert model.slots.describe() == {"t0": "4 of 8 frames", "r2": "128 of 256 tokens (tome)"}
    traced = trace(list(kept.values()), model.slots.sizes, 0)
    assert traced.share == 0.25
    assert traced.mask.sum() == 256, "merged tokens are not lost"


def test_what_was_dropped_is_dark_in_pictures() -> None:
    model = vit("received", "r1_0.5_r3_0.5").eval()
    _, kept = model(torch.randn(2, 3, 16, 64, 64), return_selection=True)
    traced = trace(list(kept.values()), model.slots.sizes, 1)
    assert traced.mask.sum() == 128 and traced.share == 0.25
    (row,) = traced.slots
    assert row.slot == "r1-3" and sum(row.scores) == pytest.approx(128 / 64)
    after = kept["r3"].after(kept["r1"].where)[1]
    assert np.array_equal(traced.mask.ravel(), (after >= 0).numpy())


def test_merged_tokens_have_the_mean_colour_of_all_that_became_one() -> None:
    pictures = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    # A frame of 2x2 tokens: the first two became one, the third is alone, the last was dropped.
    drawn = merged(pictures, np.array([[[0, 0], [1, -1]]]))
    both = pictures[:, :2].reshape(-1, 3).mean(0).round()
    assert (drawn[:, :2] == both).all() and np.array_equal(drawn[:, 2:], pictures[:, 2:])
    assert merged(pictures, None) is pictures


def test_share_of_the_action_that_is_left() -> None:
    # The action is in the left upper quarter of all frames; of its 2x2 tokens of 4x4, one is dropped in the first of two frames.
    truth = torch.tensor([0.0, 0.0, 0.5, 0.5]).expand(1, 4, 4)
    where = torch.arange(32)[None].clone()
    where[0, 5] = -1
    records = [Reduction("r0", where), Reduction("r1", torch.where(where == 2, -1, where))]
    shares = found(truth, records, {"r0": (2, 4, 4), "r1": (2, 4, 4)})
    assert shares["r0"].item() == pytest.approx(7 / 8) and shares["r1"].item() == 1.0


REFUSED: list[tuple[Callable[[], Any], str]] = [
    (lambda: create_model("mvit_tiny", "r0_0.5"), "this backbone has no place for a reducer"),
    (lambda: create_model("video_swin_tiny", "r2_0.5"), "this backbone has no place for a reducer"),
    (lambda: create_model("vit_tiny", "r2_0.5_t3_0.5"), "slots.t3: needs a grid, of which the reducer r2"),
    (lambda: create_model("vit_tiny", "r4-7_0.5"), "no block 7; this backbone has 0 to 5"),
    (lambda: create_model("vit_tiny", "r4-2_0.5"), "slots.r4-2: a slot is called"),
    (lambda: create_model("vit_tiny", "r0-3_0.5_r2_0.5"), "r2 named twice"),
    (lambda: create_model("vit_tiny", {"slots": {"r1": {"keep": 3}}}), "slots r take ratio, drop or threshold"),
    (lambda: create_model("vit_tiny", {"slots": {"t1": {"drop": 3}}}), "slots t take ratio or keep"),
    (lambda: create_model("vit_tiny", {"slots": {"r1": {"threshold": 0.1}}}), "only rlt and rlt_lengths take a threshold"),
    (lambda: create_model("vit_tiny", {"slots": {"r1": 0.5}, "reducer": "tomme"}), "'tomme', at slot r1: allowed are tome, rlt"),
    (lambda: create_model("vit_tiny", {"slots": {"r1": {"drop": 600}}, "reducer": "random"}), "would keep -88 of the 512"),
    (lambda: create_model("vit_tiny", {"slots": {"r1": 0.5}, "reducer": "rlt"}), "before block 0"),
    (lambda: create_model("vit_tiny", {"slots": {"t0": 0.5, "r0": 0.5}, "reducer": "rlt"}), "with no slot before it"),
    (lambda: create_model("vit_tiny", {"slots": {"r0": 0.05}, "reducer": "rlt"}), "keeps all 64 of the first frame"),
    (lambda: create_model("vit_tiny", {"slots": {"r0": 0.5}, "reducer": "rlt"}, frames=2), "a clip of 2 frames has none"),
    (lambda: create_model("vit_tiny", "r3_0.3"), "r3.ratio=0.3: the reducer tome merges tokens in pairs and keeps half"),
    (lambda: create_model("vit_tiny", {"slots": {"r1": {"ratio": 0.5, "place": "before"}}}), "this reducer acts inside a block"),
    (lambda: create_model("vit_tiny", {"slots": {"t1": {"ratio": 0.5, "place": "before"}}}), "of slots r alone"),
    (
        lambda: create_model("vit_tiny", {"slots": {"r1": {"ratio": 0.5, "selector": "dynamic_vit"}, "r3": 0.5}}),
        "cannot be combined",
    ),
    (
        lambda: create_model(
            "vit_tiny", {"slots": {"r1": 0.5}, "reducer": "dynamic_vit", "proportional_attention": False}
        ),
        "proportional_attention and",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("build_it", "message"), REFUSED)
def test_what_cannot_be_done_is_refused_by_name(build_it: Callable[[], Any], message: str) -> None:
    with pytest.raises(SelectionError, match=message):
        build_it()


def test_a_selector_by_attention_may_stand_before_reducers() -> None:
    clip = torch.randint(0, 256, (2, 3, 16, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    attention = {"ratio": 0.5, "selector": "attention"}
    for slots in ({"t2": attention, "r4": 0.5}, {"s2": attention, "r2": 0.7}):
        torch.manual_seed(0)
        model = create_model("vit_tiny", {"slots": slots, "reducer": "received"}, 5).eval()
        torch.manual_seed(0)
        alone = create_model("vit_tiny", {"slots": {key: slot for key, slot in slots.items() if key[0] != "r"}}, 5).eval()
        alone.load_state_dict(model.state_dict())
        with torch.inference_mode():
            (_, kept), (_, expected) = model(clip, return_selection=True), alone(clip, return_selection=True)
        first = next(iter(slots))
        assert torch.equal(kept[first].indices, expected[first].indices) and list(kept)[1] == list(slots)[1]


def test_tokens_taken_away_count_the_fused_one() -> None:
    assert build("evit", 40, {"drop": 1}).out_tokens == 39 and build("received", 40, {"drop": 1}).out_tokens == 39
    out, where = build("evit", 40, {"drop": 1})(
        Tokens(draw(2, 40)), Given(received=torch.rand(2, 40, generator=torch.Generator().manual_seed(1))), SIGMA, Noise()
    )
    assert out.x.shape[1] == 39 and (where >= 0).sum(1).tolist() == [38, 38]


def test_a_range_of_blocks_weighs_its_share_as_single_blocks_do() -> None:
    models = [create_model("vit_tiny", {"slots": slots, "reducer": "dynamic_vit"}, 5) for slots in (
        {"r1-3": 0.8}, {"r1": 0.8, "r2": 0.8, "r3": 0.8},
    )]  # fmt: skip
    weights = [[reducer.weight for reducer in model.slots.reducers.values()] for model in models]
    assert weights[0] == weights[1] == [pytest.approx(2 / 3)] * 3


def test_notation_of_reducers() -> None:
    spec = SelectionSpec.of("t0_0.5_r3-5_0.7_r7_65")
    assert [(slot.name, slot.ratio, slot.drop) for slot in spec.slots] == [
        ("t0", 0.5, None),
        ("r3-5", 0.7, None),
        ("r7", None, 65),
    ]
    assert str(spec) == "t0_0.5_r3-5_0.7_r7_65"
    assert SelectionSpec.of(spec.to_dict()) == spec


@pytest.mark.parametrize("kind", ["topk", "dynamic_vit"])
def test_learned_reducers_begin_with_an_unpruned_checkpoint(kind: str, tmp_path: Path) -> None:
    plain = create_model("vit_tiny", None, 5)
    torch.save({"state_dict": plain.state_dict(), "model": dict(plain.recipe)}, tmp_path / "plain.ckpt")
    model = create_model("vit_tiny", spec_of(kind, "r2_0.5"), pretrained=tmp_path / "plain.ckpt")
    assert torch.equal(model.head.weight, plain.head.weight) and "as initialised: reducer r2" in model.weights
    torch.save({"state_dict": model.state_dict(), "model": dict(model.recipe)}, tmp_path / "reduced.ckpt")
    again = load_model(tmp_path / "reduced.ckpt")
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
