"""Storage schemes: how a weight matrix is kept in memory, read row by row, and multiplied; so for a stack of them.

Weights are loaded plain, [N, K]; `choose` then says how they are kept from there on, and `choose_stack` for the experts
of a layer, [E, N, K]. These schemes change neither shapes nor values, only where the numbers lie.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from infer import native, ops, ops_latent, ops_moe

_PACKED_DTYPES = (torch.float32, torch.bfloat16)
_WORD_BYTES = 4  # what ops.pack_linear moves
_BYTES_AT_ONCE = 1 << 20
_MAX_COPIED_BYTES = 200 << 20  # a larger matrix must not be there twice, even for a moment


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
        """May overwrite the weight."""
        self.outputs, self.inputs = weight.shape
        self.packed = _pack(weight.unsqueeze(0))[0]

    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return ops.packed_linear(x, self.packed, bias, self.outputs)

    def rows(self, ids: Tensor) -> Tensor:
        return ops.packed_rows(ids, self.packed, self.inputs)


class OneDnn(Matrix):
    """Packed by oneDNN, for CPUs that multiply bfloat16 in hardware, in a form whose rows cannot be read. Packing takes
    memory for a second copy."""

    def __init__(self, weight: Tensor):
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight)

    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, bias, "none", [], "")

    def rows(self, ids: Tensor) -> Tensor:
        raise TypeError("a matrix that oneDNN has packed has no rows to read")


class Stack(ABC):
    """Weights [E, N, K] of several experts in some form."""

    @abstractmethod
    def multiply(self, x: Tensor, rows: Tensor | None, starts: Tensor) -> Tensor:
        """Sorted rows of x, each times its own expert's weight: ops_moe.grouped_linear."""


class PlainStack(Stack):
    """The weights as they were loaded."""

    def __init__(self, weight: Tensor):
        self.weight = weight

    def multiply(self, x: Tensor, rows: Tensor | None, starts: Tensor) -> Tensor:
        return ops_moe.grouped_linear(x, rows, starts, self.weight)


class PackedStack(Stack):
    """Each expert's weight as Packed has it, for our own CPU kernel (ops_moe.packed_grouped_linear)."""

    def __init__(self, weight: Tensor):
        """May overwrite the weight."""
        self.outputs = weight.shape[1]
        self.packed = _pack(weight)

    def multiply(self, x: Tensor, rows: Tensor | None, starts: Tensor) -> Tensor:
        return ops_moe.packed_grouped_linear(x, rows, starts, self.packed, self.outputs)


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
    """Each head's weight as Packed has it, for our own CPU kernel (ops_latent.packed_head_linear)."""

    def __init__(self, weight: Tensor):
        self.outputs = weight.shape[1]
        self.packed = ops_latent.pack_head_linear(weight)

    def multiply(self, x: Tensor) -> Tensor:
        return ops_latent.packed_head_linear(x, self.packed, self.outputs)


def choose(weight: Tensor, needs_rows: bool) -> Matrix:
    """The fastest form of a weight on this machine that has it once. The weight itself may be overwritten.

    needs_rows: it is an embedding as well, which oneDNN would need a second copy for. Those, and most matrices that are
    too large for oneDNN to pack, are heads. A head multiplies only the last row of each sequence, where reading the
    weight is what takes the time.
    """
    if not _packs(weight):
        return Plain(weight)
    may_copy = not needs_rows and weight.nbytes <= _MAX_COPIED_BYTES
    if weight.dtype == torch.bfloat16 and may_copy and _multiplies_bfloat16():
        return OneDnn(weight)
    return Packed(weight)


def choose_stack(weight: Tensor) -> Stack:
    """The fastest form of several experts' weights [E, N, K] on this machine. The weight itself may be overwritten."""
    return PackedStack(weight) if _packs(weight) else PlainStack(weight)


def choose_heads(weight: Tensor) -> HeadMatrix:
    """The fastest form of a weight [H, N, K], one matrix for each head, on this machine."""
    return PackedHeads(weight) if _packs(weight) else PlainHeads(weight)


def allocate(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for a weight, undefined, with room behind it for a form whose rows are padded."""
    if len(shape) < 2 or device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    *stack, rows, inputs = shape
    room = torch.empty(math.prod(stack) * _padded(rows) * inputs, dtype=dtype)
    return room[: math.prod(shape)].view(*shape)


def _pack(stack: Tensor) -> Tensor:
    """ops.pack_linear of each of some matrices [E, N, K], in their own memory if they fill whole words and were
    allocated here: a large one must not be there twice.

    Blocks of rows lie one after the other in both forms, so that a few at a time can change places. The last go first,
    as padding moves each matrix behind where it was.
    """
    count, rows, inputs = stack.shape
    together = _WORD_BYTES // stack.element_size()
    padded, width = _padded(rows), -(-inputs // together) * together
    storage, size = stack.untyped_storage(), count * padded * width * stack.element_size()
    has_room = stack.storage_offset() == 0 and storage.nbytes() == size  # a part of a larger tensor has none of its own
    if stack.is_contiguous() and width == inputs and (rows == padded or has_room):
        packed = stack.as_strided((count, padded, width), (padded * width, width, 1))
    else:
        packed = stack.new_empty(count, padded, width)
    row_bytes = max(width * stack.element_size(), 1)
    step = max(_BYTES_AT_ONCE // row_bytes // ops.LINEAR_LANES, 1) * ops.LINEAR_LANES
    for index in reversed(range(count)):
        for first in reversed(range(0, rows, step)):
            part = packed[index, first : first + step]
            part.copy_(ops.pack_linear(stack[index, first : first + step]).view_as(part))
    return packed.view(count, padded // ops.LINEAR_LANES, width // together, ops.LINEAR_LANES, together)


def _padded(rows: int) -> int:
    """Rows of a packed matrix, which come in whole blocks."""
    return -(-rows // ops.LINEAR_LANES) * ops.LINEAR_LANES


def _packs(weight: Tensor) -> bool:
    """Whether there are CPU kernels for such a weight in another form."""
    return weight.is_cpu and weight.dtype in _PACKED_DTYPES and native.is_loaded()


def _multiplies_bfloat16() -> bool:
    """Whether this CPU has bfloat16 products. Elsewhere oneDNN emulates them, at a quarter of our kernel's speed."""
    return torch.cpu._is_avx512_bf16_supported() and torch.backends.mkldnn.is_available()
