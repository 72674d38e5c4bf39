"""The vocabulary-parallel embedding and head, each rank holding an interval of the vocabulary's rows, and positions."""

import torch.nn.functional as F
from torch import Tensor

from infer.layers.declare import Layer, Placement
from infer.layers.linear import MatrixLayer
from infer.parallel.placement import Source, WeightSpec, split


class VocabEmbedding(MatrixLayer):
    """tokens [T] int64 -> [T, hidden]: each rank looks up the tokens it holds; the sum is over the ranks."""

    def __init__(self, source: str, vocab_size: int, hidden: int, place: Placement):
        super().__init__()
        self.tp = place.tp
        self.held = split(vocab_size, place.tp.size)[place.tp.index]
        spec = WeightSpec((Source(f"{source}.weight", (vocab_size, hidden), (self.held, range(hidden))),))
        self.hold(spec, place)
        self.is_head = False  # set by a head that shares this weight
        self._lookup = self._lookup_all if place.tp.size == 1 else self._lookup_held

    def forward(self, tokens: Tensor) -> Tensor:
        return self._lookup(tokens)

    def pack(self, needs_rows: bool = True) -> None:
        if self.is_head:  # rows alone are read fastest from the plain form
            super().pack(needs_rows=needs_rows)

    def _lookup_all(self, tokens: Tensor) -> Tensor:
        return self.matrix.rows(tokens)

    def _lookup_held(self, tokens: Tensor) -> Tensor:
        others = (tokens < self.held.start) | (tokens >= self.held.stop)
        rows = self.matrix.rows((tokens - self.held.start).masked_fill(others, 0))
        return self.tp.all_reduce(rows.masked_fill(others.unsqueeze(1), 0))


class LMHead(MatrixLayer):
    """hidden [rows, hidden] -> logits [rows, local vocabulary] of this rank's interval, in the compute dtype.

    They are not gathered: the sampler decides what has to move. tied_to: the embedding whose weight this shares.
    """

    def __init__(self, source: str, vocab_size: int, hidden: int, tied_to: VocabEmbedding | None, place: Placement):
        super().__init__()
        if tied_to is not None:
            tied_to.is_head = True
            self.owner: tuple[MatrixLayer] = (tied_to,)  # in a tuple: it is no submodule of this one
            return
        held = split(vocab_size, place.tp.size)[place.tp.index]
        self.hold(WeightSpec((Source(f"{source}.weight", (vocab_size, hidden), (held, range(hidden))),)), place)
        self.owner = (self,)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.owner[0].matrix.multiply(hidden)


class LearnedPositions(Layer):
    """x [T, hidden] plus the embedding of each token's position. Every rank holds all of it.

    skipped: rows of the checkpoint's table that stand before the one of position 0 (OPT has two).
    """

    def __init__(self, source: str, num_positions: int, total: int, skipped: int, hidden: int, place: Placement):
        super().__init__()
        held = (range(skipped, skipped + num_positions), range(hidden))
        spec = WeightSpec((Source(f"{source}.weight", (total, hidden), held),))
        self.weight = self.declare("weight", spec, place)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        return x + F.embedding(positions, self.weight)
