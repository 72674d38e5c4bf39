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
    order: the rows of held in the order in which they are computed (None: as they come).

    Projections that share a tensor of the checkpoint are several intervals of that one source.
    """

    source: str
    total: int
    held: range
    order: tuple[int, ...] | None = None


class ColumnLinear(MatrixLayer):
    """x [T, in_features] -> [T, sum of held rows]: this rank's outputs of several projections, one after another.

    transposed: the checkpoint has the weights as [in, out].
    """

    def __init__(
        self, in_features: int, parts: Sequence[Rows], bias: bool, place: Placement, *, transposed: bool = False
    ):
        super().__init__()
        columns = range(in_features)
        weights, biases = [], []
        for p in parts:
            shape, held = (p.total, in_features), (p.held, columns)
            if transposed:
                shape, held = (in_features, p.total), (columns, p.held)
            weights.append(Source(f"{p.source}.weight", shape, held, transposed, p.order))
            biases.append(Source(f"{p.source}.bias", (p.total,), (p.held,), order=p.order))
        self.hold(WeightSpec(tuple(weights)), place)
        self.bias = self.declare("bias", WeightSpec(tuple(biases)), place) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return self.matrix.multiply(x, self.bias)


class RowLinear(MatrixLayer):
    """x [T, len(held)] -> [T, out_features]: each rank multiplies the input columns it has; the sum is over the ranks.

    source: checkpoint name without ".weight". total: its input features. held: the interval of them in x.
    transposed: the checkpoint has the weight as [in, out].
    The bias is held, and so added, by the group's first rank alone.
    """

    def __init__(
        self,
        source: str,
        total: int,
        held: range,
        out_features: int,
        bias: bool,
        place: Placement,
        *,
        transposed: bool = False,
    ):
        super().__init__()
        self.tp = place.tp
        rows = range(out_features)
        weight = Source(f"{source}.weight", (out_features, total), (rows, held))
        if transposed:
            weight = Source(f"{source}.weight", (total, out_features), (held, rows), transposed)
        self.hold(WeightSpec((weight,)), place)
        whole = Source(f"{source}.bias", (out_features,), (rows,))
        adds_bias = bias and place.tp.index == 0
        self.bias = self.declare("bias", WeightSpec((whole,)), place) if adds_bias else None

    def forward(self, x: Tensor) -> Tensor:
        return self.tp.all_reduce(self.partial(x))

    def partial(self, x: Tensor) -> Tensor:
        """This rank's part of the sum, [T, out_features]."""
        return self.matrix.multiply(x, self.bias)
