"""What a model costs where it runs, and what a threshold costs on the clips of a test."""

import copy

import pytest
import torch

from stts_lightning import create_model
from stts_lightning.analysis.flops import cost_as_tested, count_gflops
from stts_lightning.analysis.running import model_as_tested, running_costs


def test_time_memory_and_launches_are_told() -> None:
    plain, merged = (running_costs(create_model("vit_tiny", selection, 4), "cpu", 0.01) for selection in (None, "r0-5_70"))
    for costs in (plain, merged):
        assert costs["latency_ms"] > 0 and costs["clips_per_second_of_8"] > 0
    assert merged["launches"] > plain["launches"] > 50
    # Eight clips of 512 tokens: at least the hidden layer of an MLP.
    assert plain["peak_megabytes"] > 8 * 512 * 4 * 96 * 4 / 1e6


def test_cost_of_a_threshold_is_that_of_the_tokens_it_kept() -> None:
    model = create_model("vit_tiny", {"reducer": "rlt", "slots": {"r0": {"threshold": 0.1}}}, 4).eval()
    assert cost_as_tested(model, 3) == {}
    clip = torch.randint(0, 256, (2, 3, 16, 64, 64), dtype=torch.uint8)
    clip[1, :, 4:] = clip[1, :, 3:4]
    with torch.inference_mode():
        _, kept = model(clip, return_selection=True)
    share = float((kept["r0"].where >= 0).float().mean())
    assert 0.5 < share < 0.8
    cost = cost_as_tested(model, 3)
    expected = count_gflops(create_model("vit_tiny", {"reducer": "rlt", "slots": {"r0": share}}, 4))
    assert cost["gflops_per_view"] == pytest.approx(expected, abs=1e-4) and cost["tokens_kept"] == pytest.approx(share, abs=2e-3)
    assert cost["gflops"] == pytest.approx(3 * expected, abs=2e-4)
    measured = model_as_tested(model)
    (reducer,) = measured.slots.reducers.values()
    assert reducer.out_tokens == pytest.approx(512 * share, abs=1), "clips without motion are no measure"
    assert running_costs(measured, "cpu", 0.01)["launches"] > 50
    assert model_as_tested(copy.deepcopy(model).cast_weights(torch.bfloat16)).weight_dtype == torch.bfloat16
    named = dict(model.named_parameters())
    assert all(torch.equal(weight, named[name]) for name, weight in measured.named_parameters())
    assert running_costs(model, "cpu", 0.01)["launches"] is None, "it depends on the clip"
    model.slots.forget_seen()
    assert cost_as_tested(model, 3) == {} and model_as_tested(model) is model


def test_a_threshold_in_a_range_of_one_block_costs_the_same() -> None:
    model = create_model("vit_tiny", {"reducer": "rlt", "slots": {"r0-0": {"threshold": 0.1}}}, 4).eval()
    with torch.inference_mode():
        model(torch.zeros(2, 3, 16, 64, 64, dtype=torch.uint8))
    assert cost_as_tested(model, 3)["tokens_kept"] == pytest.approx(1 / 8)


def test_a_model_without_thresholds_costs_what_is_counted() -> None:
    assert cost_as_tested(create_model("vit_tiny", "r0_0.5", 4), 1) == {}
