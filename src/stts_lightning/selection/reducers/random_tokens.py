"""Random tokens: what every other reducer must beat at the same number of tokens."""

from torch import Tensor

from stts_lightning.selection.baselines import content_noise
from stts_lightning.selection.noise import Noise
from stts_lightning.selection.reducer import Given, Reducer, Tokens, where_kept
from stts_lightning.selection.topk import hard_topk


class Random(Reducer):
    """Keeps random tokens, in input order; in evaluation a clip always keeps the same."""

    places = ("inside", "before")

    def forward(self, tokens: Tokens, given: Given, sigma: Tensor, noise: Noise) -> tuple[Tokens, Tensor]:
        """Tokens `(B, N, C)` -> `(B, N', C)`; see `Reducer.forward`."""
        uniform = content_noise(self.name, self.training, (tokens.x.shape[0], self.in_tokens), tokens.x.detach(), noise)
        indices = hard_topk(uniform, self.out_tokens)
        return tokens.take(indices), where_kept(indices, self.in_tokens)
