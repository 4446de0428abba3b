"""Token selection: which frames, and which window of each frame, the rest of the network sees.

Floor 0: torch only. Start with `topk` (the operator), then `temporal` and `spatial` (what it selects), then `slots`
(where a backbone calls it).
"""

from stts_lightning.selection.slots import SlotBank
from stts_lightning.selection.spec import SelectionError, SelectionSpec, SlotSpec
from stts_lightning.selection.topk import hard_topk, perturbed_topk

__all__ = ["SelectionError", "SelectionSpec", "SlotBank", "SlotSpec", "hard_topk", "perturbed_topk"]
