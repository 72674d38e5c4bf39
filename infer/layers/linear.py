"""Linear layers split over the tensor-parallel ranks: by output rows (column-parallel) and by input columns."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from infer.layers.declare import Layer, Placement
from infer.parallel.placement import Source, WeightSpec
from infer.quant import Matrix, Plain, choose


class MatrixLayer(Layer):
    """A layer around one declared weight matrix [N, K], used through `matrix` in whatever form it is stored."""

    weight: nn.Parameter
    matrix: Matrix

    def hold(self, spec: WeightSpec, place: Placement) -> None:
        """Declares the weight."""
        self.weight = self.declare("weight", spec, place)
        self.matrix = Plain(self.weight)

    def pack(self, needs_rows: bool = False) -> None:
        if "weight" not in self.specs:  # another layer's is used
            return
        self.matrix = choose(self.weight.data, needs_rows)
        if not isinstance(self.matrix, Plain):
            self.weight.data = torch.empty(0, dtype=self.weight.dtype)


@dataclass(frozen=True)
class Rows:
    """One projection of a merged column-parallel linear.

    source: checkpoint name without ".weight". total: its output features. held: the interval this rank computes.
    """

    source: str
    total: int
    held: range


class ColumnLinear(MatrixLayer):
    """x [T, in_features] -> [T, sum of held rows]: this rank's outputs of several projections, one after another."""

    def __init__(self, in_features: int, parts: Sequence[Rows], bias: bool, place: Placement):
        super().__init__()
        columns = range(in_features)
        weight = [Source(f"{p.source}.weight", (p.total, in_features), (p.held, columns)) for p in parts]
        self.hold(WeightSpec(tuple(weight)), place)
        biases = [Source(f"{p.source}.bias", (p.total,), (p.held,)) for p in parts]
        self.bias = self.declare("bias", WeightSpec(tuple(biases)), place) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return self.matrix.multiply(x, self.bias)


class RowLinear(MatrixLayer):
    """x [T, len(held)] -> [T, out_features]: each rank multiplies the input columns it has; the sum is over the ranks.

    source: checkpoint name without ".weight". total: its input features. held: the interval of them in x.
    The bias is held, and so added, by the group's first rank alone.
    """

    def __init__(self, source: str, total: int, held: range, out_features: int, bias: bool, place: Placement):
        super().__init__()
        self.tp = place.tp
        weight = Source(f"{source}.weight", (out_features, total), (range(out_features), held))
        self.hold(WeightSpec((weight,)), place)
        whole = Source(f"{source}.bias", (out_features,), (range(out_features),))
        adds_bias = bias and place.tp.index == 0
        self.bias = self.declare("bias", WeightSpec((whole,)), place) if adds_bias else None

    def forward(self, x: Tensor) -> Tensor:
        return self.tp.all_reduce(self.partial(x))

    def partial(self, x: Tensor) -> Tensor:
        """This rank's part of the sum, [T, out_features]."""
        return self.matrix.multiply(x, self.bias)
