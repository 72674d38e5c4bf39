"""The norms, each alone or fused with the residual addition before it. Every rank holds all of a norm, unless `held`
says which interval of its dimensions."""

import torch
import torch.nn.functional as F
from torch import Tensor

from infer import ops
from infer.layers.declare import Layer, Placement
from infer.models.config import NormKind
from infer.parallel.placement import Source, WeightSpec


class RMSNorm(Layer):
    """Root-mean-square norm. source: checkpoint name without ".weight". offset: added to the weights stored there.

    With an offset they are kept in float32, since the sum has more digits than they had; ops.rms_norm knows both.
    """

    def __init__(
        self, source: str, size: int, eps: float, place: Placement, *, offset: float = 0.0, held: range | None = None
    ):
        super().__init__()
        self.eps = eps
        weight = Source(f"{source}.weight", (size,), (held or range(size),), offset=offset)
        dtype = torch.float32 if offset else place.dtype
        self.weight = self.declare("weight", WeightSpec((weight,), init="ones"), place, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [T, size] -> its norm [T, size]."""
        return ops.rms_norm(x, self.weight, self.eps)

    def add(self, pending: Tensor | None, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm of residual + pending, residual + pending), all [T, size]; pending None: nothing is due yet."""
        if pending is None:
            return self(residual), residual
        return ops.add_rms_norm(pending, residual, self.weight, self.eps)


class LayerNorm(Layer):
    """Layer norm with a bias (Ba et al., 2016). Statistics are float32. Called as RMSNorm is."""

    def __init__(self, source: str, size: int, eps: float, place: Placement):
        super().__init__()
        self.eps, self.shape = eps, (size,)
        weight = Source(f"{source}.weight", (size,), (range(size),))
        bias = Source(f"{source}.bias", (size,), (range(size),))
        self.weight = self.declare("weight", WeightSpec((weight,), init="ones"), place)
        self.bias = self.declare("bias", WeightSpec((bias,)), place)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.shape, self.weight, self.bias, self.eps)

    def add(self, pending: Tensor | None, residual: Tensor) -> tuple[Tensor, Tensor]:
        if pending is not None:
            residual = residual + pending
        return self(residual), residual


class NoNorm(Layer):
    """Stands where a block has no norm before it. Called as RMSNorm is."""

    def forward(self, x: Tensor) -> Tensor:
        return x

    def add(self, pending: Tensor | None, residual: Tensor) -> tuple[Tensor, Tensor]:
        if pending is not None:
            residual = residual + pending
        return residual, residual


Norm = RMSNorm | LayerNorm | NoNorm


def make_norm(kind: NormKind, source: str, size: int, eps: float, place: Placement) -> RMSNorm | LayerNorm:
    """The norm of a family; "rms_plus_one" is one whose weights are stored less one (Gemma)."""
    if kind == "layer":
        return LayerNorm(source, size, eps, place)
    return RMSNorm(source, size, eps, place, offset=1.0 if kind == "rms_plus_one" else 0.0)
