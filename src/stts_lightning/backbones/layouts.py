"""How each family of published files names the same weights: tables of rules, nothing else."""

# torch's own types have gaps.
# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Layout:
    """How one family of files names the weights of a backbone.

    Attributes:
        name: for messages.
        family: class of the backbone that such files hold; None where the file itself says it.
        signature: keys that, together, only this layout has.
        licence: of the code that wrote such files; what its weights are under is the publisher's to say.
        rules: (pattern of their key, replacement to our key), tried in order; the first full match wins. An empty
            replacement leaves the key out: what can be computed, or stands in the file twice. A replacement that ends in
            `@<letter>` is one part of a weight; the parts are strung together in the order of `PARTS`. The other way round,
            `<key>/<letter>`, with a blank between several, takes parts of a file's weight apart; parts not named are left out.
        scorer: the scorer that selectors in such a file have.
        backbone: constructor arguments that this family implies.
        tuned: further ones, implied where the file holds selectors.
    """

    name: str
    family: str | None
    signature: tuple[str, ...]
    licence: str
    rules: tuple[tuple[str, str], ...]
    scorer: str | None = None
    backbone: Mapping[str, Any] = field(default_factory=dict)
    tuned: Mapping[str, Any] = field(default_factory=dict)


PARTS = "qkv"

OWN = Layout("stts_lightning", None, ("backbone.norm.weight", "backbone.patch_embed.weight"), "yours", ((r"(.*)", r"\1"),))

# Selectors of the official code, numbered in the order of their places; "<time 0>" is resolved when the slots are known.
_SELECTORS = (
    (r"(?:backbone\.)?(time|space)_score_predictor\.(\d+)\.score_network\.in_conv\.(\d)\.(.*)", r"<\1 \2>.scorer.features.\3.\4"),
    (r"(?:backbone\.)?(time|space)_score_predictor\.(\d+)\.score_network\.out_conv\.(\d)\.(.*)", r"<\1 \2>.scorer.score.\3.\4"),
)

_MVIT = (
    (r"(blocks\.\d+\.norm[12]\..*)", r"backbone.\1"),
    (r"(blocks\.\d+\.attn\.qkv\..*)", r"backbone.\1"),
    (r"(blocks\.\d+\.attn)\.([qkv])\.(weight|bias)", r"backbone.\1.qkv.\3@\2"),
    (r"(?:norm|norm_embed)\.(weight|bias)", r"backbone.norm.\1"),
)

# What SlowFast's code and its descendants share.
_SLOWFAST = (
    *_MVIT,
    (r"(?:cls_positional_encoding\.)?(cls_token|pos_embed_\w+)", r"backbone.\1"),
    (r"patch_embed\.(?:proj|patch_model)\.(.*)", r"backbone.patch_embed.\1"),
    (r"(blocks\.\d+\.attn)\.pool_([qkv])\.weight", r"backbone.\1.pool_\2.conv.weight"),
    (r"(blocks\.\d+\.attn)\.norm_([qkv])\.(.*)", r"backbone.\1.pool_\2.norm.\3"),
    (r"(blocks\.\d+\.(?:attn\.proj|mlp\.fc[12]|proj)\..*)", r"backbone.\1"),
    (r"head\.(?:projection|proj)\.(.*)", r"head.\1"),
)

STTS_MVIT = Layout(
    name="official STTS / SlowFast MViT",
    family="MViT",
    signature=("cls_token", "pos_embed_spatial", "blocks.0.attn.qkv.weight"),
    licence="MIT (STTS), Apache-2.0 (SlowFast)",
    rules=(*_SLOWFAST, *_SELECTORS),
    scorer="official",
    backbone={"pool_norm_eps": 1e-6},
    tuned={"pool_norm_eps": 1e-5},
)

SLOWFAST_MVIT = Layout(
    name="SlowFast MViT before MViTv2",
    family="MViT",
    signature=("cls_token", "pos_embed_spatial", "blocks.0.attn.q.weight"),
    licence="Apache-2.0",
    rules=_SLOWFAST,
    backbone={"pool_norm_eps": 1e-5},
)

PYTORCHVIDEO_MVIT = Layout(
    name="pytorchvideo MViT",
    family="MViT",
    signature=(
        "cls_positional_encoding.cls_token",
        "cls_positional_encoding.pos_embed_spatial",
        "patch_embed.patch_model.weight",
    ),
    licence="Apache-2.0",
    rules=((r"blocks\.\d+\.attn\._attention_pool_[qkv]\..*", ""), *_SLOWFAST),
    backbone={"pool_norm_eps": 1e-6},
)

TORCHVISION_MVIT = Layout(
    name="torchvision mvit_v1_b",
    family="MViT",
    signature=("pos_encoding.class_token", "pos_encoding.spatial_pos", "conv_proj.weight"),
    licence="BSD-3-Clause",
    rules=(
        *_MVIT,
        (r"pos_encoding\.class_token", "backbone.cls_token"),
        (r"pos_encoding\.class_pos", "backbone.pos_embed_class"),
        (r"pos_encoding\.(spatial|temporal)_pos", r"backbone.pos_embed_\1"),
        (r"conv_proj\.(.*)", r"backbone.patch_embed.\1"),
        (r"(blocks\.\d+)\.attn\.project\.0\.(.*)", r"backbone.\1.attn.proj.\2"),
        (r"(blocks\.\d+\.attn\.pool_[qkv])\.pool\.weight", r"backbone.\1.conv.weight"),
        (r"(blocks\.\d+\.attn\.pool_[qkv])\.norm_act\.0\.(.*)", r"backbone.\1.norm.\2"),
        (r"(blocks\.\d+\.mlp)\.0\.(.*)", r"backbone.\1.fc1.\2"),
        (r"(blocks\.\d+\.mlp)\.3\.(.*)", r"backbone.\1.fc2.\2"),
        (r"(blocks\.\d+)\.project\.(.*)", r"backbone.\1.proj.\2"),
        (r"head\.1\.(.*)", r"head.\1"),
    ),
    backbone={"pool_norm_eps": 1e-6},
)

SLOWFAST_MVIT_V2 = Layout(
    name="SlowFast MViTv2",
    family="MViTv2",
    signature=("cls_token", "patch_embed.proj.weight", "blocks.0.attn.rel_pos_h"),
    licence="Apache-2.0",
    rules=((r"(blocks\.\d+\.attn\.rel_pos_[thw])", r"backbone.\1"), *_SLOWFAST),
)

TORCHVISION_MVIT_V2 = Layout(
    name="torchvision mvit_v2_s",
    family="MViTv2",
    signature=("pos_encoding.class_token", "conv_proj.weight", "blocks.0.attn.rel_pos_h"),
    licence="BSD-3-Clause",
    rules=((r"(blocks\.\d+\.attn\.rel_pos_[thw])", r"backbone.\1"), *TORCHVISION_MVIT.rules),
)

_SWIN = (
    (r"(?:backbone\.)?patch_embed\.proj\.(.*)", r"backbone.patch_embed.\1"),
    (r"(?:backbone\.)?patch_embed\.norm\.(.*)", r"backbone.patch_norm.\1"),
    (r"(?:backbone\.)?norm\.(.*)", r"backbone.norm.\1"),
    (r".*\.(?:attn\.relative_position_index|attn_mask)", ""),
    (r"(?:backbone\.)?layers\.(\d+\.blocks\.\d+\..*)", r"backbone.stages.\1"),
)

MMACTION_SWIN = Layout(
    name="official STTS / Video-Swin (mmaction)",
    family="VideoSwin",
    signature=("backbone.patch_embed.proj.weight", "backbone.layers.0.blocks.0.attn.qkv.weight"),
    licence="MIT (STTS), Apache-2.0 (mmaction, on which Video-Swin stands)",
    rules=(
        *_SWIN,
        (r"backbone\.layers\.(\d+)\.downsample\.(.*)", r"backbone.stages.\1.merge.\2"),
        (r"cls_head\.fc_cls\.(.*)", r"head.\1"),
        *_SELECTORS,
    ),
    scorer="official",
    tuned={"window_policy": "official"},
)

TORCHVISION_SWIN = Layout(
    name="torchvision swin3d",
    family="VideoSwin",
    signature=("patch_embed.proj.weight", "features.0.0.attn.qkv.weight"),
    licence="BSD-3-Clause",
    rules=(
        *_SWIN,
        *((rf"features\.{2 * i}\.(\d+)\.mlp\.0\.(.*)", rf"backbone.stages.{i}.blocks.\1.mlp.fc1.\2") for i in range(4)),
        *((rf"features\.{2 * i}\.(\d+)\.mlp\.3\.(.*)", rf"backbone.stages.{i}.blocks.\1.mlp.fc2.\2") for i in range(4)),
        *((rf"features\.{2 * i}\.(\d+\..*)", rf"backbone.stages.{i}.blocks.\1") for i in range(4)),
        *((rf"features\.{2 * i + 1}\.(.*)", rf"backbone.stages.{i}.merge.\1") for i in range(3)),
        (r"head\.(.*)", r"head.\1"),
    ),
)

IMAGENET_SWIN = Layout(
    name="ImageNet Swin (2-D)",
    family="VideoSwin",
    signature=("patch_embed.proj.weight", "layers.0.blocks.0.attn.qkv.weight", "layers.0.downsample.norm.weight"),
    licence="MIT",
    rules=(*_SWIN, (r"layers\.(\d+)\.downsample\.(.*)", r"backbone.stages.\1.merge.\2"), (r"head\.(weight|bias)", r"head.\1")),
)

TIMM_SWIN = Layout(
    name="timm Swin (2-D)",
    family="VideoSwin",
    signature=("patch_embed.proj.weight", "layers.0.blocks.0.attn.qkv.weight", "layers.3.downsample.norm.weight"),
    licence="Apache-2.0 (timm), MIT (the weights' first publisher)",
    rules=(
        *_SWIN,
        *((rf"layers\.{i + 1}\.downsample\.(.*)", rf"backbone.stages.{i}.merge.\1") for i in range(3)),
        (r"head\.fc\.(weight|bias)", r"head.\1"),
    ),
)

_VIT = (
    (r"patch_embed\.proj\.(.*)", r"backbone.patch_embed.\1"),
    (r"(blocks\.\d+\.(?:norm[12]|attn\.proj|mlp\.fc[12])\..*)", r"backbone.\1"),
    (r"(blocks\.\d+\.attn\.qkv\.weight)", r"backbone.\1"),
    (r"head\.(.*)", r"head.\1"),
)

VIDEOMAE = Layout(
    name="VideoMAE ViT",
    family="ViT",
    signature=("patch_embed.proj.weight", "blocks.0.attn.q_bias", "fc_norm.weight"),
    licence="CC-BY-NC-4.0 (VideoMAE), MIT (VideoMAEv2)",
    rules=(*_VIT, (r"(blocks\.\d+\.attn\.[qv]_bias)", r"backbone.\1"), (r"fc_norm\.(.*)", r"backbone.norm.\1")),
    backbone={"positions": "sinusoid"},
)

HUGGING_FACE_VIT = Layout(
    name="Hugging Face VideoMAE",
    family="ViT",
    signature=("videomae.encoder.layer.0.attention.attention.query.weight", "fc_norm.weight"),
    licence="Apache-2.0 (transformers); the weights' is their first publisher's",
    rules=(
        (r"videomae\.embeddings\.patch_embeddings\.projection\.(.*)", r"backbone.patch_embed.\1"),
        (r"videomae\.encoder\.layer\.(\d+)\.layernorm_before\.(.*)", r"backbone.blocks.\1.norm1.\2"),
        (r"videomae\.encoder\.layer\.(\d+)\.layernorm_after\.(.*)", r"backbone.blocks.\1.norm2.\2"),
        *(
            (
                rf"videomae\.encoder\.layer\.(\d+)\.attention\.attention\.{name}\.weight",
                rf"backbone.blocks.\1.attn.qkv.weight@{part}",
            )
            for part, name in (("q", "query"), ("k", "key"), ("v", "value"))
        ),
        # Releases 4 of transformers, and all files on the hub, have the second names.
        (r"videomae\.encoder\.layer\.(\d+)\.attention\.attention\.(?:query\.|q_)bias", r"backbone.blocks.\1.attn.q_bias"),
        (r"videomae\.encoder\.layer\.(\d+)\.attention\.attention\.(?:value\.|v_)bias", r"backbone.blocks.\1.attn.v_bias"),
        (r"videomae\.encoder\.layer\.(\d+)\.attention\.output\.dense\.(.*)", r"backbone.blocks.\1.attn.proj.\2"),
        (r"videomae\.encoder\.layer\.(\d+)\.intermediate\.dense\.(.*)", r"backbone.blocks.\1.mlp.fc1.\2"),
        (r"videomae\.encoder\.layer\.(\d+)\.output\.dense\.(.*)", r"backbone.blocks.\1.mlp.fc2.\2"),
        (r"fc_norm\.(.*)", r"backbone.norm.\1"),
        (r"classifier\.(.*)", r"head.\1"),
    ),
    backbone={"positions": "sinusoid"},
)

TIMM_VIT = Layout(
    name="timm ViT (2-D)",
    family="ViT",
    signature=("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.bias"),
    licence="Apache-2.0 (timm), that of the weights' first publisher",
    rules=(
        *_VIT,
        # Keys need no bias; the class token has no place where all tokens are averaged.
        (r"(blocks\.\d+\.attn)\.qkv\.bias", r"backbone.\1.q_bias/q backbone.\1.v_bias/v"),
        (r"cls_token", ""),
        (r"pos_embed", r"backbone.pos_embed"),
        (r"(?:fc_)?norm\.(.*)", r"backbone.norm.\1"),
    ),
    backbone={"positions": "learned", "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},
)

LAYOUTS = [
    OWN,
    STTS_MVIT,
    SLOWFAST_MVIT,
    PYTORCHVIDEO_MVIT,
    TORCHVISION_MVIT,
    SLOWFAST_MVIT_V2,
    TORCHVISION_MVIT_V2,
    MMACTION_SWIN,
    TORCHVISION_SWIN,
    IMAGENET_SWIN,
    TIMM_SWIN,
    VIDEOMAE,
    HUGGING_FACE_VIT,
    TIMM_VIT,
]
"""In the order in which they are tried."""


def register_layout(layout: Layout) -> None:
    """Let files of one more layout be recognised. Raises ValueError if there is one of that name."""
    if layout.name in [known.name for known in LAYOUTS]:
        raise ValueError(f"layout {layout.name!r} is registered twice")
    LAYOUTS.append(layout)
