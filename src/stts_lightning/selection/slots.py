"""The seam: `grid = self.slots(i, grid)` in a backbone's loop, before block i. An empty bank is the unpruned model."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stts_lightning.selection.baselines import find_selector
from stts_lightning.selection.noise import Noise, mixed_seeds
from stts_lightning.selection.oracle import Told
from stts_lightning.selection.scorer import Scorer
from stts_lightning.selection.selector import GridSize, Selection, Selector, SlotContext
from stts_lightning.selection.spec import SelectionError, SelectionSpec
from stts_lightning.selection.truth import follow, of_grid


class SlotBank(nn.Module):
    """All selectors of a model, by the block before which they act. Temporal comes before spatial at one place.

    A backbone calls `build_selectors` for each block while it builds itself and `forward` while it runs.
    """

    sigma: Tensor

    def __init__(self, selection: SelectionSpec) -> None:
        super().__init__()
        self.selection = selection
        self.selectors = nn.ModuleDict()
        self.at_block: dict[int, list[str]] = {}
        # A tensor, so that a new value neither recompiles a graph nor waits for a device. Not part of a checkpoint:
        # the schedule knows it from the step.
        self.register_buffer("sigma", torch.tensor(float(selection.sigma)), persistent=False)
        self._seeds: Tensor | None = None
        self._truth: Tensor | None = None
        self._boxes: Tensor | None = None
        """The truth of the grid as the slots of this pass have left it."""

    def build_selectors(self, block: int, size: GridSize, dim: int, no_attention: str = SlotContext.no_attention) -> GridSize:
        """Build the selectors that stand before a block.

        Args:
            block: number of the self-attention block, from 0.
            size: frames, height and width of the grid that reaches the slot.
            dim: its channels.
            no_attention: why the class token's attention of the block before cannot be had; empty where it can.

        Returns:
            Size of the grid that reaches the block.

        Raises:
            SelectionError: if a ratio or size cannot be honoured here.
        """
        here = sorted((slot for slot in self.selection.slots if slot.block == block), key=lambda slot: "ts".index(slot.axis))
        for slot in here:
            selector = find_selector(slot, self.selection)(SlotContext(slot, size, dim, self.selection, no_attention))
            self.selectors[slot.name] = selector
            self.at_block.setdefault(block, []).append(slot.name)
            size = selector.out_size
        return size

    def check_all_built(self, blocks: int) -> None:
        """Raise SelectionError if a slot names a block that the backbone does not have."""
        for slot in self.selection.slots:
            if slot.name not in self.selectors:
                raise SelectionError(f"selection.slots.{slot.name}: no block {slot.block}; this backbone has 0 to {blocks - 1}")

    def start_scorers(self) -> None:
        """Let new scorers start as the selection says, once more: a backbone that initialises all its layers has reset them."""
        for module in self.modules():
            if isinstance(module, Scorer) and self.selection.start == "even":
                module.start_even()

    def seed_noise(self, seeds: Sequence[int] | None) -> None:
        """Draw the next forward passes' noise from these seeds, one for each clip; None is torch's default generator."""
        if seeds is None:
            self._seeds = None
            return
        mixed = mixed_seeds(seeds)
        # From pinned memory the copy does not wait for the device.
        self._seeds = mixed.pin_memory().to(self.sigma.device, non_blocking=True) if self.sigma.is_cuda else mixed

    @property
    def wants_truth(self) -> bool:
        """Whether a selector reads where the action is."""
        return any(isinstance(selector, Told) for selector in self.selectors.values())

    def tell_truth(self, truth: Tensor | None) -> None:
        """Where the action is in the clips of the next forward pass alone, `(B, T, 4)`; see `truth`. None where nobody knows."""
        self._truth = truth

    def wants_attention(self, block: int) -> bool:
        """Whether a slot before this block needs the class token's attention of the block before it."""
        return any(self._selector(name).needs_attention for name in self.at_block.get(block, ()))

    def _selector(self, name: str) -> Selector:
        selector = self.selectors[name]
        assert isinstance(selector, Selector)
        return selector

    def forward(self, block: int, grid: Tensor, kept: list[Selection] | None = None, attention: Tensor | None = None) -> Tensor:
        """Apply the slots before a block.

        Args:
            block: number of the block.
            grid: `(B, T, H, W, C)`.
            kept: where to append what each slot kept, if that is wanted.
            attention: `(B, T, H, W)`, of the class token in the block before, if `wants_attention`.

        Returns:
            `(B, T', H', W', C)`; the grid itself where no slot stands.
        """
        for number, name in enumerate(self.at_block.get(block, ())):
            selector = self._selector(name)
            if self.wants_truth:
                self._tell(selector)
            grid, selection = selector(grid, self.sigma, Noise(self._seeds, block * 2 + number), attention)
            if attention is not None and selector.out_size[0] < attention.shape[1]:
                # The spatial slot at this place sees what the temporal one left.
                attention = attention[torch.arange(attention.shape[0], device=attention.device)[:, None], selection.indices]
            if self._boxes is not None:
                self._boxes = follow(self._boxes, selection, selector.in_size)
            if kept is not None:
                kept.append(selection)
        return grid

    def _tell(self, selector: Selector) -> None:
        if selector.slot == next(iter(self.selectors)):  # A new pass.
            truth, self._truth = self._truth, None
            self._boxes = None if truth is None else of_grid(truth, selector.in_size[0])
        if isinstance(selector, Told):
            selector.boxes = self._boxes

    @property
    def sizes(self) -> dict[str, GridSize]:
        """Frames, height and width of the grid that reaches each slot, by name, in the order of the slots."""
        return {name: self._selector(name).in_size for name in self.selectors}

    @property
    def share(self) -> float:
        """Share of tokens that passes all slots: the product of what each keeps. 1 for the unpruned model."""
        selectors = [self._selector(name) for name in self.selectors]
        return math.prod(math.prod(selector.out_size) / math.prod(selector.in_size) for selector in selectors)

    def describe(self) -> dict[str, str]:
        """What each slot keeps, in integers, by name: {"t0": "5 of 8 frames", "s4": "13x13 of 14x14, 4 anchors"}."""
        named = {slot.name: slot.selector or self.selection.selector for slot in self.selection.slots}
        which = {name: "" if kind == "learned" else f" ({kind.rpartition('.')[2]})" for name, kind in named.items()}
        return {name: f"{selector.extra_repr()}{which[name]}" for name, selector in self.selectors.items()}
