"""What every registered backbone must do."""

import copy
import hashlib
import pickle
import re

import pytest
import torch

from stts_lightning import create_model
from stts_lightning.backbones import list_backbones, register_backbone
from stts_lightning.selection.spec import SelectionError

SWIN = {"frames": 16, "size": 64, "dim": 16, "depths": (2, 2, 2, 2), "heads": (1, 1, 2, 2)}
VIT = {"size": 64, "patch": 8, "dim": 32, "heads": 2, "depth": 6}
SMALL = {
    "mvit_b16": {"size": 64, "dim": 24},
    "mvit_tiny": {"size": 64},
    "video_swin_b": SWIN,
    "video_swin_s": SWIN,
    "video_swin_t": SWIN,
    "video_swin_tiny": {},
    "vit_s": VIT,
    "vit_b": VIT,
    "vit_l": VIT,
    "vit_tiny": {},
    "mvit_v2_s": {"size": 64, "dim": 24},
    "mvit_v2_b": {"size": 64, "dim": 24, "frames": 16, "depth": 8, "stages": (1, 3)},
    "mvit_v2_tiny": {},
}
SELECTIONS = ["none", "t0_0.5", "s0_0.5", "t1_0.6_s1_0.6", "t0_0.6_s4_0.9", "t2_0.5_s3_0.5", "t0_0.9_s0_0.9_t4_0.7_s4_0.7"]


# With these arguments some models are the same, and tested once: those of all sizes of VideoSwin, and of ViT.
DIFFERENT = sorted({(name.rpartition("_")[0], str(arguments)): name for name, arguments in SMALL.items()}.values())


@pytest.fixture(params=DIFFERENT)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def test_all_backbones_are_here() -> None:
    assert sorted(SMALL) == sorted(KEYS) == list_backbones()


def clip_for(model: torch.nn.Module, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, *model.backbone.clip_size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("selection", SELECTIONS)
def test_shapes_and_a_gradient_for_every_parameter(name: str, selection: str) -> None:
    model = create_model(name, selection, 7, **SMALL[name]).train()
    logits, kept = model(clip_for(model), return_selection=True)
    assert logits.shape == (2, 7)
    assert "_".join(kept) == "_".join(s for s in selection.split("_") if s[0] in "ts")
    logits.square().sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{key} dropped out of the graph"
        assert torch.isfinite(parameter.grad).all(), key
        # Of the last block of an MViTv2 only the class token is used: no position is relative to it, no pooling moves it.
        if re.search(rf"blocks\.{len(model.backbone.block_sizes) - 1}\.attn\.(rel_pos_|pool_q\.conv)", key):
            continue
        # Eq. 3 removes what moves all scores of a row alike: the last bias, and (paper) the global half and its way in.
        if ".scorer.score" not in key and not key.endswith((".attn.qkv.bias", "pool_k.norm.bias", ".scorer.local.bias")):
            assert parameter.grad.abs().sum() > 0, f"{key} got no gradient"


@pytest.mark.parametrize("selection", ["none", "t0_0.6_s4_0.9"])
def test_batch_independence_and_determinism_in_evaluation(name: str, selection: str) -> None:
    model = create_model(name, selection, 7, **SMALL[name]).eval()
    clip = clip_for(model, 3)
    with torch.inference_mode():
        together = model(clip)
        torch.testing.assert_close(together, model(clip), atol=0, rtol=0)
        alone = torch.cat([model(one[None]) for one in clip])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


def test_empty_bank_is_the_plain_model_and_keeping_all_changes_nothing(name: str) -> None:
    plain = create_model(name, None, 7, **SMALL[name]).eval()
    assert not list(plain.slots.parameters())
    full = create_model(name, "t0_1.0_s3_1.0", 7, **SMALL[name]).eval()
    full.load_state_dict(plain.state_dict(), strict=False)
    clip = clip_for(plain)
    with torch.inference_mode():
        if name.startswith("mvit_v2"):  # Positions of kept frames and windows are looked up for each clip, and round otherwise.
            torch.testing.assert_close(plain(clip), full(clip), atol=1e-6, rtol=1e-5)
        else:
            assert torch.equal(plain(clip), full(clip))


def test_logits_under_autocast_match_float32(name: str) -> None:
    model = create_model(name, "t0_0.6_s4_0.9", 7, **SMALL[name]).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(clip_for(model)).float().square().sum()
    loss.backward()
    assert torch.isfinite(loss)
    # Without selectors, whose choice between near candidates may be another.
    plain, clip = create_model(name, None, 7, **SMALL[name]).eval(), clip_for(model)
    with torch.inference_mode():
        wanted = plain(clip)
        with torch.autocast("cpu", torch.bfloat16):
            found = plain(clip).float()
    assert 0 < float((found - wanted).norm()) < 0.05 * float(wanted.norm())


def test_uint8_clips_are_normalized_by_the_backbone(name: str) -> None:
    model = create_model(name, None, 7, **SMALL[name]).eval()
    raw = torch.randint(0, 256, (1, 3, *model.backbone.clip_size), dtype=torch.uint8)
    with torch.inference_mode():
        mean, std = (torch.tensor(values).view(3, 1, 1, 1) for values in (model.backbone.mean, model.backbone.std))
        torch.testing.assert_close(model(raw), model((raw / 255 - mean) / std))


def test_wrong_clip_size_is_refused(name: str) -> None:
    model = create_model(name, None, 7, **SMALL[name])
    with pytest.raises(ValueError, match="this backbone takes"):
        model(torch.zeros(1, 3, 4, 64, 64))


# SHA-256 of the sorted keys and shapes, at full size: whoever changes a name breaks everybody's checkpoints.
KEYS = {
    "mvit_b16": "4455a30ae87494a3",
    "mvit_tiny": "6c755522c1081330",
    "video_swin_b": "914aac94ee1b6c34",
    "video_swin_s": "dee840eb31c1a38a",
    "video_swin_t": "b6da96f56fe69a9c",
    "video_swin_tiny": "505ab80c6f163779",
    "vit_s": "9c5f629017223cda",
    "vit_b": "74fb811e5212165b",
    "vit_l": "5e6c4f0aefe8b864",
    "vit_tiny": "a2599fc576512780",
    "mvit_v2_s": "2e182e038c355800",
    "mvit_v2_b": "8d46e421f0acf155",
    "mvit_v2_tiny": "6f95b941bf3b8179",
}


@pytest.mark.parametrize("name", list_backbones())
def test_state_dict_keys_are_pinned(name: str) -> None:
    with torch.device("meta"):
        state = create_model(name, "t0_0.5_s1_0.5", 7).state_dict()
    text = "\n".join(f"{key} {tuple(value.shape)}" for key, value in sorted(state.items()))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == KEYS[name], f"now {text}"


@pytest.mark.parametrize("name", list_backbones())
def test_a_model_can_be_copied_and_sent_to_another_process(name: str) -> None:
    """At full size: `evaluate` copies it to count launches."""
    with torch.device("meta"):
        model = create_model(name, "t0_0.5_s1_0.5", 7)
    copied, sent = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    assert list(copied.state_dict()) == list(sent.state_dict()) == list(model.state_dict())
    assert copied.backbone.reading == sent.backbone.reading == model.backbone.reading


@pytest.mark.parametrize("axis", ["t", "s"])
def test_every_location_is_accepted_or_refused_with_a_reason(name: str, axis: str) -> None:
    with torch.device("meta"):
        blocks = len(create_model(name, None, 7, **SMALL[name]).backbone.block_sizes)
        for block in range(blocks):
            model = create_model(name, f"{axis}{block}_0.6", 7, **SMALL[name])
            assert list(model.slots.describe()) == [f"{axis}{block}"]
        with pytest.raises(SelectionError, match=f"slots.{axis}{blocks}: no block {blocks}; this backbone has 0 to {blocks - 1}"):
            create_model(name, f"{axis}{blocks}_0.6", 7, **SMALL[name])
        with pytest.raises(SelectionError, match=f"slots.{axis}0.ratio=0.0001 .*: must keep 1 to"):
            create_model(name, f"{axis}0_0.0001", 7, **SMALL[name])


def test_noise_follows_the_seed() -> None:
    model = create_model("mvit_tiny", "t0_0.5", 7, size=64).train()
    clip, outputs = clip_for(model), []
    for seed in (1, 1, 2):
        model.slots.seed_noise([seed, 7])
        outputs.append(model(clip))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


def test_unknown_names_and_duplicates() -> None:
    with pytest.raises(ValueError, match="'mvit_b61' is unknown; known are .*mvit_b16"):
        create_model("mvit_b61")
    with pytest.raises(ValueError, match="unexpected keyword argument 'sise'"):
        create_model("mvit_tiny", sise=3)
    with pytest.raises(ValueError, match="registered twice"):

        @register_backbone
        def mvit_tiny() -> torch.nn.Module: ...


@pytest.mark.parametrize("name", ["mvit_tiny", "video_swin_tiny"])
def test_activation_checkpointing_changes_no_gradient_and_holds_less(name: str) -> None:
    model = create_model(name, "t0_0.6_s4_0.9", 7, drop_path=0.3).train()
    clip, found = clip_for(model), []
    for checkpointing in (False, True):
        model.backbone.checkpointing = checkpointing
        model.slots.seed_noise([1, 2])
        torch.manual_seed(0)
        held: dict[int, int] = {}

        def pack(tensor: torch.Tensor, held: dict[int, int] = held) -> torch.Tensor:
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(clip).square().sum()
        loss.backward()
        found.append((sum(held.values()), [p.grad.clone() for p in model.parameters()]))
        model.zero_grad()
    (much, plain), (little, again) = found
    assert little < 0.6 * much
    for one, other in zip(plain, again, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
