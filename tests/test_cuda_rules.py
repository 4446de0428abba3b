"""Rules of CUDA, without a GPU: nothing lies on the host, nothing waits, and launches and bytes stay within a budget."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stts_lightning import create_model
from stts_lightning.analysis.launches import count_forward, count_training
from stts_lightning.selection.baselines import SELECTORS
from stts_lightning.selection.reducers import REDUCERS
from stts_lightning.selection.topk import ESTIMATORS

TEMPORAL = {name: {"slots": {"t1": {"ratio": 0.5, "selector": name}}} for name in SELECTORS["t"]}
SPATIAL = {f"s-{name}": {"slots": {"s1": {"ratio": 0.5, "selector": name}}} for name in SELECTORS["s"]}
OPERATORS = {f"estimator-{name}": {"slots": {"t0": 0.5}, "estimator": name} for name in ESTIMATORS}
SELECTIONS: dict[str, Any] = {
    "none": None,
    "joint": "t0_0.6_s2_0.9",
    "official scorer": {"slots": {"t0": 0.6, "s2": 0.9}, "scorer": "official"},
    **TEMPORAL,
    **SPATIAL,
    **OPERATORS,
    **{f"reducer-{kind}": {"slots": {"r0": 0.7}, "reducer": kind} for kind in REDUCERS},
}
CASES = [
    (backbone, name)
    for backbone in ("mvit_tiny", "video_swin_tiny")
    for name in SELECTIONS
    if not name.startswith("reducer-")
    if not (backbone == "video_swin_tiny" and name.endswith("attention"))  # It has no class token.
] + [(backbone, name) for backbone in ("vit_tiny", "mvit_v2_tiny") for name in ("none", "joint")]
CASES += [("vit_tiny", f"reducer-{kind}") for kind in REDUCERS]


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize(("backbone", "name"), CASES)
def test_a_forward_pass_keeps_the_rules(backbone: str, name: str, training: bool) -> None:
    build = functools.partial(create_model, backbone, SELECTIONS[name], 7)
    size = build().backbone.clip_size
    for precision in ("bf16",) if training else ("bf16", "bf16-true", "32"):
        asked = count_forward(build, 2, size, precision, training)
        assert not asked.waits, asked.waits
        # The exact operator is a loop over candidates; MViTv2 looks positions up along three axes in each block.
        many = name == "estimator-exact" or backbone == "mvit_v2_tiny"
        assert 0 < asked.launches <= (700 if many else 420), asked.by_operator.most_common(8)
    if training:
        assert count_training(build, 2, size).launches > asked.launches


class Faulty(nn.Module):
    def __init__(self, fault: str) -> None:
        super().__init__()
        self.weight, self.fault = nn.Parameter(torch.ones(3)), fault

    def forward(self, clip: Tensor) -> Tensor:
        x = clip.float().mean((2, 3, 4)) * self.weight
        if self.fault == "a table on the host":
            return x + torch.arange(3).float().to(x.device)
        if self.fault == "the result goes to the host":
            return x.cpu()
        if self.fault == "asks the device":
            return x * 2 if bool((x > 0).any()) else x
        return x * 2.0


@pytest.mark.parametrize("fault", ["a table on the host", "the result goes to the host", "asks the device"])
def test_the_rules_see_a_fault(fault: str) -> None:
    from torch._subclasses.fake_tensor import DataDependentOutputException

    try:
        waits = count_forward(lambda: Faulty(fault), 2, (2, 4, 4), "32").waits
    except DataDependentOutputException:
        waits = [fault]
    assert waits
    asked = count_forward(lambda: Faulty("none"), 2, (2, 4, 4), "32")
    assert asked.waits == [] and asked.by_operator == {"mean": 1, "mul": 2}
    assert asked.launches == 3


@pytest.mark.parametrize(
    ("backbone", "selection", "launches", "gigabytes"),
    [
        ("mvit_b16", "t0_0.6_s4_0.9", 420, 7.0),
        ("mvit_b16", None, 370, 11.0),
        ("video_swin_b", None, 420, 36.0),
        ("video_swin_b", "t0_0.6", 420, 23.0),
    ],
)
def test_budget_of_evaluation(undrawn: None, backbone: str, selection: str | None, launches: int, gigabytes: float) -> None:
    """Eight clips, weights in bfloat16. torchvision's models, by autocast: 739 and 33.3, 1,334 and 205.6."""
    build = functools.partial(create_model, backbone, selection, 400)
    asked = count_forward(build, 8, build().backbone.clip_size, "bf16-true")
    assert asked.launches <= launches and asked.bytes <= gigabytes * 1e9, asked


@pytest.mark.parametrize(
    ("backbone", "selection", "batch", "launches"), [("video_swin_b", "t0_0.6", 2, 2000), ("mvit_b16", "t0_0.6_s4_0.9", 8, 1800)]
)
def test_budget_of_training(undrawn: None, backbone: str, selection: str, batch: int, launches: int) -> None:
    build = functools.partial(create_model, backbone, selection, 400)
    asked = count_training(build, batch, build().backbone.clip_size)
    assert asked.launches <= launches, asked.by_operator.most_common(12)
