"""Root-mean-square norm, alone or fused with the residual addition before it."""

from torch import Tensor

from infer import ops
from infer.layers.declare import Layer, Placement
from infer.parallel.placement import Source, WeightSpec


class RMSNorm(Layer):
    """source: checkpoint name without ".weight". Every rank holds all of it."""

    def __init__(self, source: str, size: int, eps: float, place: Placement):
        super().__init__()
        self.eps = eps
        spec = WeightSpec((Source(f"{source}.weight", (size,), (range(size),)),), init="ones")
        self.weight = self.declare("weight", spec, place)

    def forward(self, x: Tensor) -> Tensor:
        """x [T, size] -> its norm [T, size]."""
        return ops.rms_norm(x, self.weight, self.eps)

    def add(self, pending: Tensor | None, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm of residual + pending, residual + pending), all [T, size]; pending None: nothing is due yet."""
        if pending is None:
            return self(residual), residual
        return ops.add_rms_norm(pending, residual, self.weight, self.eps)
