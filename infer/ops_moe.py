"""The ops of a mixture of experts, each with its plain PyTorch reference, as infer/ops.py has them.

A token goes to several experts, so that there are T * k rows to multiply. They are sorted by expert: those of an expert
then lie together, and one grouped product multiplies each stretch by its expert's own matrix.

Legend: T tokens, k experts of each token, E experts held by this rank, R = T * k rows, N outputs, K inputs.
"""

import functools
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from infer import native
from infer.ops import packed_linear_reference

# GPUs whose grouped products read the groups' bounds on the device (CUTLASS in torch): compute capability -> the first
# torch with kernels for it. On others, torch's grouped_mm itself reads them back and multiplies group by group.
_GROUPED_MM_SINCE = {9: (2, 11), 10: (2, 13)}
_GROUPED_MM_UNIT = 8  # inputs: rows must begin at multiples of 16 bytes


def group_rows(experts: Tensor, first: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sorts what goes to the experts [first, first + count) by expert: experts [T, k] int64 -> (rows, starts, place).

    rows    [R] int64: the token of each sorted row; what goes to other experts comes last, as rows of any token
    starts  [count + 1] int32: the rows of expert first + e are [starts[e], starts[e + 1]), in the order of the tokens
    place   [T, k] int64: the row that each of a token's experts has, -1 for other experts
    """
    if experts.is_cpu and native.is_loaded():
        return torch.ops.infer.group_rows.default(experts, first, count)
    return group_rows_reference(experts, first, count)


def grouped_linear(x: Tensor, rows: Tensor | None, starts: Tensor, weight: Tensor) -> Tensor:
    """Each sorted row times its own expert's weight, transposed: [R, N]. Rows from starts[-1] on are undefined.

    x       [*, K]
    rows    [R] int64: the row of x that each sorted row is; None: x is sorted already
    starts  [E + 1] int32, as group_rows gives them
    weight  [E, N, K]
    """
    if x.is_cuda and runs_on_device(weight):
        sorted_x = x if rows is None else x.index_select(0, rows)
        return F.grouped_mm(sorted_x, weight.transpose(1, 2), offs=starts[1:])
    return grouped_linear_reference(x, rows, starts, weight)


def packed_grouped_linear(x: Tensor, rows: Tensor | None, starts: Tensor, packed: Tensor, outputs: int) -> Tensor:
    """grouped_linear with weights [E, outputs, K] that ops.pack_linear packed, one by one: [R, outputs].

    As in ops.packed_linear, a row's result does not depend on other rows, to the last bit.
    """
    if native.use_native("packed_grouped_linear", x):
        return torch.ops.infer.packed_grouped_linear.default(x, rows, starts, packed, outputs)
    return packed_grouped_linear_reference(x, rows, starts, packed, outputs)


def combine_rows(y: Tensor, place: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum of each token's rows: y [R, N], place [T, k] int64, weights [T, k] float32 -> [T, N].

    Rows at place -1 do not count. Sums are float32.
    """
    if y.is_cpu and native.use_native("combine_rows", y):
        return torch.ops.infer.combine_rows.default(y, place, weights)
    return combine_rows_reference(y, place, weights)


def runs_on_device(weight: Tensor) -> bool:
    """Whether grouped_linear with such a weight [E, N, K] leaves the host out, as CUDA graphs need it."""
    return weight.is_cuda and weight.dtype == torch.bfloat16 and weight.shape[2] % _GROUPED_MM_UNIT == 0 and (
        _has_grouped_mm(weight.device)
    )  # fmt: skip


@functools.cache
def _has_grouped_mm(device: torch.device) -> bool:
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    since = _GROUPED_MM_SINCE.get(torch.cuda.get_device_capability(device)[0])
    found = since is not None and version >= since and torch.version.hip is None
    if not found:
        native.log_fallback(
            "grouped_linear", f"{torch.cuda.get_device_name(device)} in torch {torch.__version__}: experts one by one"
        )
    return found


# ---------------------------------------------------------------------------------------------- the references


def group_rows_reference(experts: Tensor, first: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    flat = experts.flatten() - first
    local = torch.where((flat >= 0) & (flat < count), flat, count)
    in_order, order = local.sort(stable=True)
    starts = torch.searchsorted(in_order, torch.arange(count + 1, device=flat.device))
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=flat.device))
    place = place.masked_fill(local == count, -1).view(experts.shape)
    return order // experts.shape[1], starts.int(), place


def grouped_linear_reference(x: Tensor, rows: Tensor | None, starts: Tensor, weight: Tensor) -> Tensor:
    sorted_x = x if rows is None else x.index_select(0, rows)
    out = sorted_x.new_zeros(len(sorted_x), weight.shape[1])
    bounds = starts.tolist()
    for expert, (begin, end) in enumerate(pairwise(bounds)):
        if begin < end:
            out[begin:end] = F.linear(sorted_x[begin:end], weight[expert])
    return out


def packed_grouped_linear_reference(
    x: Tensor, rows: Tensor | None, starts: Tensor, packed: Tensor, outputs: int
) -> Tensor:
    sorted_x = x if rows is None else x.index_select(0, rows)
    out = sorted_x.new_zeros(len(sorted_x), outputs)
    bounds = starts.tolist()
    for expert, (begin, end) in enumerate(pairwise(bounds)):
        if begin < end:
            out[begin:end] = packed_linear_reference(sorted_x[begin:end], packed[expert], None, outputs)
    return out


def combine_rows_reference(y: Tensor, place: Tensor, weights: Tensor) -> Tensor:
    # Undefined rows may hold NaN, which no weight of zero would silence.
    picked = y[place.clamp(min=0)].masked_fill((place < 0).unsqueeze(-1), 0).float()
    return (picked * weights.unsqueeze(-1)).sum(1).to(y.dtype)
