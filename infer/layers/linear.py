"""Linear layers split over the tensor-parallel ranks: by output rows (column-parallel) and by input columns."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from infer import ops
from infer.layers.declare import Layer, Placement
from infer.parallel.placement import Source, WeightSpec


@dataclass(frozen=True)
class Rows:
    """One projection of a merged column-parallel linear.

    source: checkpoint name without ".weight". total: its output features. held: the interval this rank computes.
    """

    source: str
    total: int
    held: range


class ColumnLinear(Layer):
    """x [T, in_features] -> [T, sum of held rows]: this rank's outputs of several projections, one after another."""

    def __init__(self, in_features: int, parts: Sequence[Rows], bias: bool, place: Placement):
        super().__init__()
        columns = range(in_features)
        weight = [Source(f"{p.source}.weight", (p.total, in_features), (p.held, columns)) for p in parts]
        self.weight = self.declare("weight", WeightSpec(tuple(weight)), place)
        biases = [Source(f"{p.source}.bias", (p.total,), (p.held,)) for p in parts]
        self.bias = self.declare("bias", WeightSpec(tuple(biases)), place) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias)


class RowLinear(Layer):
    """x [T, len(held)] -> [T, out_features]: each rank multiplies the input columns it has; the sum is over the ranks.

    source: checkpoint name without ".weight". total: its input features. held: the interval of them in x.
    The bias is held, and so added, by the group's first rank alone.
    """

    def __init__(self, source: str, total: int, held: range, out_features: int, bias: bool, place: Placement):
        super().__init__()
        self.tp = place.tp
        weight = Source(f"{source}.weight", (out_features, total), (range(out_features), held))
        self.weight = self.declare("weight", WeightSpec((weight,)), place)
        whole = Source(f"{source}.bias", (out_features,), (range(out_features),))
        adds_bias = bias and place.tp.index == 0
        self.bias = self.declare("bias", WeightSpec((whole,)), place) if adds_bias else None

    def forward(self, x: Tensor) -> Tensor:
        return self.tp.all_reduce(ops.linear(x, self.weight, self.bias))
