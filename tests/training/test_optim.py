from dataclasses import replace

import pytest
import torch

from stts_lightning import create_model
from stts_lightning.training.callbacks import annealed_sigma
from stts_lightning.training.optim import OptimSpec, PartSpec, build_optimizer, freeze, layers, lr_factor, parameter_groups

PAPER = OptimSpec(
    lr=1e-4,
    weight_decay=0.05,
    epochs=20,
    parts={
        "selectors": PartSpec(warmup_epochs=3),
        "backbone": PartSpec(lr_scale=0.01, warmup_epochs=3),
        "head": PartSpec(lr_scale=0.01, warmup_epochs=3),
    },
)
OFFICIAL = OptimSpec(
    lr=1e-4,
    weight_decay=0.05,
    epochs=20,
    final_lr=0.01,
    parts={
        "selectors": PartSpec(decay_all=True),
        "backbone": PartSpec(lr_cap=0.1, frozen_epochs=3, decay_embeddings=True),
        "head": PartSpec(lr_cap=0.1, frozen_epochs=3),
    },
)


def named(model: torch.nn.Module, spec: OptimSpec) -> dict[str, list[str]]:
    names = {id(p): n for n, p in model.named_parameters()}
    return {str(g["name"]): [names[id(p)] for p in g["params"]] for g in parameter_groups(model, spec)}  # type: ignore[arg-type]


@pytest.mark.parametrize("spec", [PAPER, OFFICIAL])
@pytest.mark.parametrize("selection", ["none", "t0_0.6_s4_0.9"])
def test_each_parameter_lies_in_exactly_one_group(spec: OptimSpec, selection: str) -> None:
    model = create_model("mvit_tiny", selection, 5, size=64)
    listed = [name for names in named(model, spec).values() for name in names]
    assert sorted(listed) == sorted(name for name, _ in model.named_parameters())


def test_decay_spares_norms_biases_and_embeddings() -> None:
    groups = named(create_model("mvit_tiny", "t0_0.6", 5, size=64), PAPER)
    assert all(
        n.endswith("weight") and "norm" not in n for part in ("selectors", "backbone", "head") for n in groups[f"{part}/decay"]
    )
    assert {"backbone.cls_token", "backbone.pos_embed_spatial"} <= set(groups["backbone/no_decay"])
    assert all(".slots." in n for kind in ("decay", "no_decay") for n in groups[f"selectors/{kind}"])
    vit = named(create_model("vit_tiny", "none", 5), PAPER)
    assert {"backbone.blocks.0.attn.q_bias", "backbone.blocks.0.attn.v_bias"} <= set(vit["backbone/no_decay"])
    v2 = named(create_model("mvit_v2_tiny", "none", 5), PAPER)
    tables = {name for name in v2["backbone/decay"] if ".rel_pos_" in name or name == "backbone.cls_token"}
    assert len(tables) == 1 + 3 * 6, "SlowFast spares one-dimensional weights alone"
    official = named(create_model("mvit_tiny", {"slots": {"t0": 0.6}, "scorer": "official"}, 5, size=64), OFFICIAL)
    assert "selectors/no_decay" not in official
    assert "backbone.cls_token" in official["backbone/decay"]


@pytest.mark.parametrize("backbone", ["vit_tiny", "mvit_tiny", "video_swin_tiny"])
def test_layers_learn_the_slower_the_nearer_to_the_stem(backbone: str) -> None:
    model = create_model(backbone, "t0_0.5", 5)
    names = layers(model.backbone)
    depth = len(model.backbone.block_sizes)
    assert sorted(set(names.values())) == list(range(depth + 2))
    assert names["patch_embed.weight"] == 0 and names["norm.weight"] == depth + 1
    assert names[next(name for name in reversed(names) if "blocks." in name and "mlp" in name)] == depth
    spec = OptimSpec(lr=1.0, weight_decay=0.1, epochs=1, parts={"backbone": PartSpec(layer_decay=0.5)})
    rates = {str(group["name"]): float(group["lr"]) for group in parameter_groups(model, spec)}  # type: ignore[arg-type]
    assert rates["backbone/decay/0"] == 0.5 ** (depth + 1) and rates["backbone/no_decay/1"] == 0.5**depth
    assert rates[f"backbone/no_decay/{depth + 1}"] == rates["head/decay"] == rates["selectors/decay"] == 1.0
    listed = [name for found in named(model, spec).values() for name in found]
    assert sorted(listed) == sorted(name for name, _ in model.named_parameters())
    with pytest.raises(ValueError, match=r"optim.parts.head.layer_decay=0.5: only the backbone has layers"):
        OptimSpec(lr=1.0, weight_decay=0.1, epochs=1, parts={"head": PartSpec(layer_decay=0.5)})


def test_schedule_matches_the_paper() -> None:
    model = create_model("mvit_tiny", "t0_0.6", 5, size=64)
    optimizer, schedule = build_optimizer(model, PAPER, total_steps=200)
    rates = []
    for _ in range(200):
        rates.append({g["name"]: g["lr"] for g in optimizer.param_groups})
        optimizer.step()
        schedule.step()
    assert rates[0]["selectors/decay"] == 0
    assert rates[15]["selectors/decay"] == pytest.approx(0.5e-4)
    assert rates[30]["selectors/decay"] == pytest.approx(1e-4)
    assert rates[30]["backbone/decay"] == pytest.approx(1e-6)
    assert rates[115]["selectors/decay"] == pytest.approx(0.5e-4)
    assert rates[199]["selectors/decay"] < 1e-7


def test_schedule_matches_the_official_code() -> None:
    rate = lambda part, epoch: 1e-4 * lr_factor(OFFICIAL.part(part), OFFICIAL, epoch / 20)  # noqa: E731
    assert rate("selectors", 0) == pytest.approx(1e-4)
    assert rate("selectors", 20) == pytest.approx(1e-6)
    assert rate("backbone", 2.99) == 0
    assert rate("backbone", 3) == pytest.approx(1e-5)
    shares = {part: PartSpec(lr_cap=0.1, frozen_share=0.15) for part in ("backbone", "head")}
    by_share = replace(OFFICIAL, parts=shares)
    for epoch in (0, 2.99, 3, 10, 20):
        assert 1e-4 * lr_factor(by_share.part("backbone"), by_share, epoch / 20) == pytest.approx(rate("backbone", epoch))
    assert rate("backbone", 19.9) == pytest.approx(1e-4 * lr_factor(OFFICIAL.part("selectors"), OFFICIAL, 19.9 / 20))


def test_a_share_of_the_run_warms_up_as_that_many_epochs_do() -> None:
    epochs, share = PartSpec(lr_scale=0.2, warmup_epochs=4), PartSpec(lr_scale=0.2, warmup_share=0.5)
    spec = OptimSpec(lr=1e-4, weight_decay=0.0, epochs=8)
    for progress in (0, 0.1, 0.49, 0.5, 0.8, 1.0):
        assert lr_factor(share, spec, progress) == pytest.approx(lr_factor(epochs, spec, progress))
    assert lr_factor(share, spec, 0.25) == pytest.approx(0.1)
    assert lr_factor(share, replace(spec, epochs=80), 0.25) == pytest.approx(0.1), "whatever the length of the run"
    assert lr_factor(share, spec, 0.5) == pytest.approx(0.2)
    assert lr_factor(replace(share, warmup_epochs=6), spec, 0.5) == pytest.approx(0.2 * 4 / 6), "the longer of the two counts"


def test_official_swin_schedule_moves_by_epochs_and_never_reaches_zero() -> None:
    part = PartSpec(warmup_epochs=0.8, warmup_from=0.1, decay_biases=True)
    spec = OptimSpec(lr=3e-4, weight_decay=0.05, epochs=10, steps_of="epoch", parts={"backbone": part})
    rate = lambda epoch: lr_factor(part, spec, epoch / 10)  # noqa: E731
    assert rate(0) == pytest.approx(0.1)
    assert rate(0.4) == pytest.approx(0.55)
    assert rate(0.8) == rate(0.99) == 1.0
    assert rate(5.0) == rate(5.9) == pytest.approx(0.5)
    assert rate(9.99) == pytest.approx(0.5 * (1 - 0.9510565))
    groups = named(create_model("video_swin_tiny", "t0_0.6", 5), spec)
    decayed = set(groups["backbone/decay"])
    assert "backbone.stages.0.blocks.0.attn.qkv.bias" in decayed
    assert not any("norm" in name or "bias_table" in name for name in decayed)
    with pytest.raises(ValueError, match="optim.steps_of='day': allowed are step, epoch"):
        OptimSpec(lr=1, weight_decay=0, epochs=1, steps_of="day")


def test_unknown_optimizer_part_is_refused() -> None:
    with pytest.raises(ValueError, match="optim.parts.bacbone: unknown; the parts are selectors, backbone, head"):
        OptimSpec(lr=1, weight_decay=0, epochs=1, parts={"bacbone": PartSpec()})


def test_sigma_falls_linearly_to_zero() -> None:
    values = [annealed_sigma(0.1, step, 10) for step in range(12)]
    assert values[0] == 0.1
    assert values[5] == pytest.approx(0.05)
    assert values[9] == pytest.approx(0.01)
    assert values[10] == values[11] == 0
    early = [annealed_sigma(0.1, step, 10, until=0.5) for step in range(12)]
    assert early[0] == 0.1 and early[2] == pytest.approx(0.06)
    assert not any(early[5:])


def test_a_frozen_part_takes_no_part_in_training() -> None:
    model = create_model("mvit_tiny", "t0_0.6_s2_0.6", 5, size=64)
    spec = OptimSpec(1e-3, 0.05, 1, parts={"backbone": PartSpec(frozen=True), "head": PartSpec(frozen=True)})
    freeze(model, spec)
    assert {name.partition("/")[0] for name in named(model, spec)} == {"selectors"}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer, _ = build_optimizer(model, spec, total_steps=10)
    model.train()(torch.randn(2, 3, 16, 64, 64)).square().sum().backward()
    optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    selectors = {name for name, _ in model.named_parameters() if ".slots." in name}
    # A constant added to all scores changes no choice: that bias has no gradient but rounding, and may stay where it is.
    assert {name for name in selectors if not name.endswith("score.bias")} <= changed <= selectors
    with pytest.raises(ValueError, match="all that this model has is frozen"):
        freeze(create_model("mvit_tiny", None, 5, size=64), spec)
    freeze(model, PAPER)
    assert all(p.requires_grad for p in model.parameters())
