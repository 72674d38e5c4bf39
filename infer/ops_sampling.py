"""The references of the ops that pick tokens from rows of logits. infer/ops.py declares these ops."""

import torch
from torch import Tensor

from infer.noise import counters, log_exponential

# Elements of noise made at once by a reference: int64 that stay in a CPU's second-level cache, or enough to fill a GPU.
_NOISE_CHUNK = {"cpu": 1 << 16, "cuda": 1 << 23}


def argmax_rows_reference(logits: Tensor) -> tuple[Tensor, Tensor]:
    values, columns = logits.max(-1)
    return values.float(), columns


def perturbed_max_reference(logits: Tensor, temperatures: Tensor, keys: Tensor, start: int) -> tuple[Tensor, Tensor]:
    num_rows, width = logits.shape
    token_counters = counters(torch.arange(start, start + width, device=logits.device))
    step = max(1, min(num_rows, _NOISE_CHUNK.get(logits.device.type, 1 << 16) // width))
    state = torch.empty(step, width, dtype=torch.int64, device=logits.device)
    scratch, noise = torch.empty_like(state), torch.empty_like(state, dtype=torch.float32)
    values = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    columns = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    for first in range(0, num_rows, step):
        rows = slice(first, min(first + step, num_rows))
        size = rows.stop - first
        torch.add(keys[rows, None], token_counters, out=state[:size])
        log_exponential(state[:size], scratch[:size], noise[:size])
        noise[:size].mul_(-temperatures[rows, None]).add_(logits[rows].float())
        values[rows], columns[rows] = noise[:size].max(-1)
    return values, columns


def largest_reference(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    width = logits.shape[-1]
    if k >= width:
        values, columns = torch.sort(logits, dim=-1, descending=True, stable=True)
        return values.float(), columns
    # One more than asked for: the set of the k largest is in doubt only where entries k and k + 1 are equal.
    values, columns = logits.topk(k + 1, dim=-1)
    last = values[:, k - 1 : k]
    doubtful = (last == values[:, k:]).squeeze(-1).nonzero().squeeze(-1)
    values, columns = values[:, :k], columns[:, :k]
    if len(doubtful):
        columns[doubtful] = _lowest_of_equals(logits[doubtful], values[doubtful], columns[doubtful], last[doubtful])
    return in_order(values.float(), columns)


def _lowest_of_equals(logits: Tensor, values: Tensor, columns: Tensor, last: Tensor) -> Tensor:
    """`columns` with the entries whose value is `last` [rows, 1] replaced by the lowest columns of that value."""
    open_slots = values == last
    needed = open_slots.sum(-1, keepdim=True)
    most, width = int(needed.max()), logits.shape[-1]
    from_end = torch.arange(width, 0, -1, dtype=torch.int32, device=logits.device)
    lowest = width - torch.where(logits == last, from_end, 0).topk(most, dim=-1).values
    columns = columns.clone()
    # Both masks are read in row-major order and have `needed` entries in each row.
    columns[open_slots] = lowest[torch.arange(most, device=logits.device) < needed].long()
    return columns


def in_order(values: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Both [rows, k], sorted by (value falling, id rising)."""
    ids, order = ids.sort(dim=-1)
    values, order = values.gather(-1, order).sort(dim=-1, descending=True, stable=True)
    return values, ids.gather(-1, order)
