"""The seam: `grid = self.slots(i, grid)` in a backbone's loop, before block i. An empty bank is the unpruned model.

A backbone that needs no grid has a second one: `self.slots.reduce(i, tokens, ...)` before block i, and
`self.slots.reducer(i)`, which the block calls between attention and MLP.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from stts_lightning.selection.baselines import find_selector
from stts_lightning.selection.noise import Noise, mixed_seeds
from stts_lightning.selection.oracle import Told
from stts_lightning.selection.reducer import Given, Record, Reducer, ReducerContext, Reducing, Reduction, Tokens
from stts_lightning.selection.reducers import find_reducer
from stts_lightning.selection.scorer import Scorer
from stts_lightning.selection.selector import GridSize, Selector, SlotContext
from stts_lightning.selection.spec import SelectionError, SelectionSpec
from stts_lightning.selection.truth import follow, of_grid


class SlotBank(nn.Module):
    """All selectors of a model, by the block before which they act, and its reducers. Temporal comes before spatial.

    A backbone calls `build_selectors` for each block while it builds itself and `forward` while it runs; one that needs no grid
    also `build_reducer`, `reduce` and `reducer`.
    """

    sigma: Tensor

    def __init__(self, selection: SelectionSpec) -> None:
        super().__init__()
        self.selection = selection
        self.selectors = nn.ModuleDict()
        self.reducers = nn.ModuleDict()
        self.at_block: dict[int, list[str]] = {}
        # A tensor, so that a new value neither recompiles a graph nor waits for a device. Not part of a checkpoint:
        # the schedule knows it from the step.
        self.register_buffer("sigma", torch.tensor(float(selection.sigma)), persistent=False)
        self._seeds: Tensor | None = None
        self._truth: Tensor | None = None
        self.keeps_final = False
        """Whether a backbone leaves its final tokens here in each pass, for a loss on them."""
        self._final: Tokens | None = None
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
        grid_slots = [slot for slot in self.selection.slots if slot.block == block and slot.axis != "r"]
        for slot in sorted(grid_slots, key=lambda slot: "ts".index(slot.axis)):
            if self.reducers:
                first = next(iter(self.reducers))
                raise SelectionError(
                    f"selection.slots.{slot.name}: needs a grid, of which the reducer {first} before it leaves none"
                )
            selector = find_selector(slot, self.selection)(SlotContext(slot, size, dim, self.selection, no_attention))
            self.selectors[slot.name] = selector
            self.at_block.setdefault(block, []).append(slot.name)
            size = selector.out_size
        return size

    def build_reducer(
        self, block: int, tokens: int, grid: GridSize, dim: int, clip_size: GridSize, std: tuple[float, float, float]
    ) -> int:
        """Build the reducer of a block, if the selection has one; see `ReducerContext`. Returns the tokens that come out.

        Raises:
            SelectionError: if it cannot stand here.
        """
        slot = next((slot for slot in self.selection.slots if slot.axis == "r" and block in slot.blocks), None)
        if slot is None:
            return tokens
        context = ReducerContext(f"r{block}", slot, block, tokens, grid, clip_size, std, dim, self.selection)
        reducer = find_reducer(slot, self.selection)(context)
        for name, other in self._reducers():
            if type(other) is not type(reducer) and (other.alone or reducer.alone):
                raise SelectionError(f"selection.slots.{slot.name}: the reducers of {name} and r{block} cannot be combined")
        self.reducers[reducer.name] = reducer
        return reducer.out_tokens

    def check_all_built(self, blocks: int) -> None:
        """Raise SelectionError if a slot names a block that the backbone does not have, or a reducer that it has no place for."""
        for slot in self.selection.slots:
            if slot.blocks[-1] >= blocks:
                raise SelectionError(
                    f"selection.slots.{slot.name}: no block {slot.blocks[-1]}; this backbone has 0 to {blocks - 1}"
                )
            if slot.axis != "r" and slot.name not in self.selectors:
                raise SelectionError(f"selection.slots.{slot.name}: this backbone has no place for a selector, only for reducers")
            if slot.axis == "r" and f"r{slot.block}" not in self.reducers:
                raise SelectionError(
                    f"selection.slots.{slot.name}: this backbone has no place for a reducer; those whose convolutions or windows "
                    "need a grid cannot have one. Reducers are for plain ViTs (vit_s, vit_b, vit_l)"
                )

    def start_scorers(self) -> None:
        """Let new scorers start as the selection says, once more: a backbone that initialises all its layers has reset them."""
        for module in self.modules():
            if isinstance(module, Scorer):
                module.start()

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

    def forward(self, block: int, grid: Tensor, kept: list[Record] | None = None, attention: Tensor | None = None) -> Tensor:
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

    def reduce(self, block: int, tokens: Tokens, clip: Tensor, kept: list[Record] | None = None) -> Tokens:
        """Apply the reducer before a block, if there is one; see `forward`. Some read the clip, `(B, 3, T, H, W)`, normalised."""
        reducing = self._reducing(block, "before")
        if reducing is None:
            return tokens
        tokens, where = reducing(tokens, Given(clip=clip))
        if kept is not None:
            kept.append(Reduction(reducing.reducer.name, where))
        return tokens

    def reducer(self, block: int) -> Reducing | None:
        """What a block is to call between attention and MLP; None for nothing."""
        return self._reducing(block, "inside")

    def _reducing(self, block: int, place: str) -> Reducing | None:
        name = f"r{block}"
        if name not in self.reducers:
            return None
        reducer = self.reducers[name]
        assert isinstance(reducer, Reducer)
        # Selectors' salts are twice the block, or one more.
        return Reducing(reducer, self.sigma, Noise(self._seeds, 1000 + block)) if reducer.place == place else None

    def keep_more(self, share: float) -> bool:
        """Let reducers keep more than their ratio in training, 1 is all of it; False if none of them can."""
        falling = [reducer for _, reducer in self._reducers() if reducer.falls]
        for reducer in falling:
            reducer.more = share
        return bool(falling)

    def fixed_behind_falling(self) -> list[str]:
        """Reducers whose number of tokens is fixed, and that stand behind one which can keep more than its ratio."""
        found = list(self._reducers())
        first = next((number for number, (_, reducer) in enumerate(found) if reducer.falls), len(found))
        return [name for name, reducer in found[first:] if not reducer.falls]

    def loss(self) -> Tensor | None:
        """What reducers add to the loss of a training step, after its forward pass, 0-d; None for nothing."""
        losses = [loss for _, reducer in self._reducers() if (loss := reducer.loss()) is not None]
        return torch.stack(losses).sum() if losses else None

    @property
    def masks(self) -> bool:
        """Whether tokens are dropped by masks in training: all of them reach the end."""
        return any(reducer.masks for _, reducer in self._reducers())

    def leave_final(self, tokens: Tokens) -> None:
        """Take in the tokens of a pass after the last norm."""
        self._final = tokens

    def take_final(self) -> Tokens:
        """Hand out the final tokens of the last pass, once."""
        tokens, self._final = self._final, None
        assert tokens is not None
        return tokens

    @property
    def learns(self) -> bool:
        """Whether anything is learned."""
        return any(True for _ in self.parameters())

    @property
    def empty(self) -> bool:
        """Whether this is the unpruned model."""
        return not self.selectors and not self.reducers

    def _tell(self, selector: Selector) -> None:
        if selector.slot == next(iter(self.selectors)):  # A new pass.
            truth, self._truth = self._truth, None
            self._boxes = None if truth is None else of_grid(truth, selector.in_size[0])
        if isinstance(selector, Told):
            selector.boxes = self._boxes

    @property
    def sizes(self) -> dict[str, GridSize]:
        """Frames, height and width of the grid that reaches each slot, by name, in the order of the slots.

        A reducer has the grid that its tokens were before the first reducer.
        """
        grids = {name: self._selector(name).in_size for name in self.selectors}
        return grids | {name: reducer.grid for name, reducer in self._reducers()}

    @property
    def share(self) -> float:
        """Share of tokens that passes all slots: the product of what each keeps. 1 for the unpruned model."""
        selectors = [self._selector(name) for name in self.selectors]
        share = math.prod(math.prod(selector.out_size) / math.prod(selector.in_size) for selector in selectors)
        return share * math.prod(reducer.out_tokens / reducer.in_tokens for _, reducer in self._reducers())

    def tokens_after_reducers(self) -> dict[str, int]:
        """How many tokens come out of each slot r with a fixed number, by name; of a slot in several blocks, after the last."""
        out = {name: reducer.out_tokens for name, reducer in self._reducers()}
        fixed = [slot for slot in self.selection.slots if slot.axis == "r" and slot.threshold is None]
        return {slot.name: out[f"r{slot.blocks[-1]}"] for slot in fixed}

    def without_effect(self) -> list[str]:
        """Slots that keep everything although less was asked for: their grid is too small for the ratio."""
        names = [slot.name for slot in self.selection.slots if slot.axis != "r" and slot.ratio is not None and slot.ratio < 1]
        found = [(name, self._selector(name)) for name in names]
        return [f"{name} ({one.extra_repr()})" for name, one in found if one.in_size == one.out_size]

    def forget_seen(self) -> None:
        """Begin anew to count what thresholds keep."""
        for _, reducer in self._reducers():
            reducer.forget_seen()

    def as_seen(self) -> SelectionSpec | None:
        """The selection with a ratio in place of each threshold: what was kept on average in evaluation. None without any."""
        means = {name: mean / reducer.in_tokens for name, reducer in self._reducers() if (mean := reducer.mean_tokens())}
        if not means:
            return None
        slots = (
            replace(slot, threshold=None, ratio=means[name]) if (name := f"r{slot.block}") in means and slot.axis == "r" else slot
            for slot in self.selection.slots
        )
        return replace(self.selection, slots=tuple(slots))

    def _reducers(self) -> Iterator[tuple[str, Reducer]]:
        for name, reducer in self.reducers.items():
            assert isinstance(reducer, Reducer)
            yield name, reducer

    def describe(self) -> dict[str, str]:
        """What each slot keeps, in integers, by name: {"t0": "5 of 8 frames", "s4": "13x13 of 14x14, 4 anchors"}."""
        named: dict[str, str] = {}
        for slot in self.selection.slots:
            modules, usual = (
                (self.reducers, self.selection.reducer) if slot.axis == "r" else (self.selectors, self.selection.selector)
            )
            kind = slot.selector or usual
            which = "" if kind == "learned" else f" ({kind.rpartition('.')[2]})"
            ends = [f"{slot.axis}{block}" for block in (slot.blocks[0], slot.blocks[-1])]
            first, last = (modules[end] for end in ends)
            text = first.extra_repr()
            if first is not last and isinstance(first, Reducer) and isinstance(last, Reducer):
                text = f"{last.out_tokens} of {first.in_tokens} tokens after {len(slot.blocks)} blocks"
            named[slot.name] = text + which
        return named
