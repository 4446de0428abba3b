"""Backbones, each one file from stem to named sizes, and the doors for published weights."""

# torch's own types have gaps.
# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from stts_lightning.backbones import mvit, mvit_v2, video_swin, vit
from stts_lightning.backbones.checkpoints import CheckpointError
from stts_lightning.backbones.registry import Backbone, BackboneError, create_backbone, list_backbones, register_backbone

__all__ = [
    "Backbone",
    "BackboneError",
    "CheckpointError",
    "create_backbone",
    "list_backbones",
    "mvit",
    "mvit_v2",
    "register_backbone",
    "video_swin",
    "vit",
]
