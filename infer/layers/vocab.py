"""The vocabulary-parallel embedding and head: each rank holds an interval of the vocabulary's rows."""

import torch.nn.functional as F
from torch import Tensor

from infer import ops
from infer.layers.declare import Layer, Placement
from infer.parallel.placement import Source, WeightSpec, split


class VocabEmbedding(Layer):
    """tokens [T] int64 -> [T, hidden]: each rank looks up the tokens it holds; the sum is over the ranks."""

    def __init__(self, source: str, vocab_size: int, hidden: int, place: Placement):
        super().__init__()
        self.tp = place.tp
        self.held = split(vocab_size, place.tp.size)[place.tp.index]
        spec = WeightSpec((Source(f"{source}.weight", (vocab_size, hidden), (self.held, range(hidden))),))
        self.weight = self.declare("weight", spec, place)
        self._lookup = self._lookup_all if place.tp.size == 1 else self._lookup_held

    def forward(self, tokens: Tensor) -> Tensor:
        return self._lookup(tokens)

    def _lookup_all(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.weight)

    def _lookup_held(self, tokens: Tensor) -> Tensor:
        others = (tokens < self.held.start) | (tokens >= self.held.stop)
        rows = F.embedding((tokens - self.held.start).masked_fill(others, 0), self.weight)
        return self.tp.all_reduce(rows.masked_fill(others.unsqueeze(1), 0))


class LMHead(Layer):
    """hidden [rows, hidden] -> logits [rows, local vocabulary] of this rank's interval, in the compute dtype.

    They are not gathered: the sampler decides what has to move. tied_to: the embedding whose weight this shares.
    """

    def __init__(self, source: str, vocab_size: int, hidden: int, tied_to: VocabEmbedding | None, place: Placement):
        super().__init__()
        if tied_to is not None:
            self.weight = tied_to.weight
            return
        held = split(vocab_size, place.tp.size)[place.tp.index]
        spec = WeightSpec((Source(f"{source}.weight", (vocab_size, hidden), (held, range(hidden))),))
        self.weight = self.declare("weight", spec, place)

    def forward(self, hidden: Tensor) -> Tensor:
        return ops.linear(hidden, self.weight)
