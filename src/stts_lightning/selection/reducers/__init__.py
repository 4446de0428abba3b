"""Reducers by name: rivals of token selection on backbones that need no grid. Each file names its source."""

from stts_lightning.selection.reducer import Reducer
from stts_lightning.selection.reducers.dynamic_vit import DynamicViT
from stts_lightning.selection.reducers.joint_topk import JointTopK
from stts_lightning.selection.reducers.random_tokens import Random
from stts_lightning.selection.reducers.received import EViT, Received
from stts_lightning.selection.reducers.run_length import RunLength, RunLengthEncoded
from stts_lightning.selection.reducers.tome import ToMe
from stts_lightning.selection.spec import SelectionError, SelectionSpec, SlotSpec, subclass_at

REDUCERS: dict[str, type[Reducer]] = {
    "tome": ToMe,
    "rlt": RunLength,
    "rlt_lengths": RunLengthEncoded,
    "random": Random,
    "evit": EViT,
    "received": Received,
    "topk": JointTopK,
    "dynamic_vit": DynamicViT,
}


def find_reducer(slot: SlotSpec, selection: SelectionSpec) -> type[Reducer]:
    """The class of a slot's reducer. Raises SelectionError for an unknown name."""
    name = slot.selector or selection.reducer
    if "." in name:
        return subclass_at(name, Reducer, f"selection.slots.{slot.name}, selection.reducer")
    if name not in REDUCERS:
        raise SelectionError(f"selection.reducer={name!r}, at slot {slot.name}: allowed are {', '.join(REDUCERS)}")
    return REDUCERS[name]
