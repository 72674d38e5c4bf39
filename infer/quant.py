"""Storage schemes: how a weight matrix is kept in memory, read row by row, and multiplied.

Weights are loaded plain, [N, K]; `choose` then says how they are kept from there on. These schemes change neither
shapes nor values, only where the numbers lie.
"""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from infer import native, ops, ops_latent

_PACKED_DTYPES = (torch.float32, torch.bfloat16)


class Matrix(ABC):
    """A weight [N, K] in some form."""

    @abstractmethod
    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [T, K] -> x times the weight transposed, plus bias [N]: [T, N]."""

    @abstractmethod
    def rows(self, ids: Tensor) -> Tensor:
        """ids [T] int64 -> those rows of the weight, [T, K]."""


class Plain(Matrix):
    """The weight as it was loaded."""

    def __init__(self, weight: Tensor):
        self.weight = weight

    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return ops.linear(x, self.weight, bias)

    def rows(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)


class Packed(Matrix):
    """Packed for our own CPU kernel (ops.packed_linear), whose rows do not depend on the rows beside them."""

    def __init__(self, weight: Tensor):
        self.outputs, self.inputs = weight.shape
        self.packed = ops.pack_linear(weight)

    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return ops.packed_linear(x, self.packed, bias, self.outputs)

    def rows(self, ids: Tensor) -> Tensor:
        return ops.packed_rows(ids, self.packed, self.inputs)


class OneDnn(Matrix):
    """Packed by oneDNN, for CPUs that multiply bfloat16 in hardware. Rows are read from a plain copy, if kept."""

    def __init__(self, weight: Tensor, keep_rows: bool):
        self.weight = weight if keep_rows else None
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight)

    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, bias, "none", [], "")

    def rows(self, ids: Tensor) -> Tensor:
        assert self.weight is not None, "this matrix was packed without its rows"
        return F.embedding(ids, self.weight)


class HeadMatrix(ABC):
    """A weight [H, N, K], one matrix for each head, in some form."""

    @abstractmethod
    def multiply(self, x: Tensor) -> Tensor:
        """x [T, H, K] -> x times the weight transposed, head by head: [T, H, N], contiguous."""


class PlainHeads(HeadMatrix):
    """The weight as it was loaded, or a view of it."""

    def __init__(self, weight: Tensor):
        self.weight = weight

    def multiply(self, x: Tensor) -> Tensor:
        return ops_latent.head_linear(x, self.weight)


class PackedHeads(HeadMatrix):
    """Packed for our own CPU kernel (ops_latent.packed_head_linear)."""

    def __init__(self, weight: Tensor):
        self.outputs = weight.shape[1]
        self.packed = ops_latent.pack_head_linear(weight)

    def multiply(self, x: Tensor) -> Tensor:
        return ops_latent.packed_head_linear(x, self.packed, self.outputs)


def choose_heads(weight: Tensor) -> HeadMatrix:
    """The fastest form of a weight [H, N, K] on this machine."""
    if not weight.is_cpu or weight.dtype not in _PACKED_DTYPES or not native.is_loaded():
        return PlainHeads(weight)
    return PackedHeads(weight)


def choose(weight: Tensor, needs_rows: bool) -> Matrix:
    """The fastest form of a weight on this machine. needs_rows: it is an embedding as well."""
    if not weight.is_cpu or weight.dtype not in _PACKED_DTYPES or not native.is_loaded():
        return Plain(weight)
    if weight.dtype == torch.bfloat16 and _multiplies_bfloat16():
        return OneDnn(weight, needs_rows)
    return Packed(weight)


def _multiplies_bfloat16() -> bool:
    """Whether this CPU has bfloat16 products. Elsewhere oneDNN emulates them, at a quarter of our kernel's speed."""
    return torch.cpu._is_avx512_bf16_supported() and torch.backends.mkldnn.is_available()
