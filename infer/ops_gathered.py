"""Attention over latents on a GPU: PyTorch's matrix products over keys that are gathered from the pages.

For any device. Products are float32, as scores are elsewhere. Lengths are read back, for which the host waits, so that
no CUDA graph can hold this. All query heads read one key a token, whose first numbers are the value.

Legend: T tokens, S sequences, H query heads, D numbers of a key, V of a value.
"""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

# Gathered keys and scores take about this much at a time: sequences take turns, and the rows of a prompt do. Only one
# sequence's keys and one row's scores are never divided.
GATHER_BYTES = 256 << 20
_SCORE_BYTES = 3 * 4  # of a score in float32, its mask and its weight


@dataclass
class Gathering:
    """Where the keys of a batch stand. lengths: of each sequence, in keys.

    pages [num_blocks, block_size, 1, D]; block_table [S, max_blocks] int32.
    """

    pages: Tensor
    block_table: Tensor
    lengths: list[int]

    def keys(self, seqs: list[int]) -> tuple[Tensor, Tensor]:
        """(keys [sequences, K, D] float32, number of each one's [sequences, 1]); K is that of the longest.

        The shorter repeat their last key: nothing of others comes near, not even masked (0 * NaN is NaN).
        """
        device, block_size = self.pages.device, self.pages.shape[1]
        num_keys = torch.tensor([[self.lengths[s]] for s in seqs], device=device)
        position = torch.arange(max(self.lengths[s] for s in seqs), device=device)
        position = torch.minimum(position, num_keys - 1)
        block = self.block_table[torch.tensor(seqs, device=device).unsqueeze(1), position // block_size].long()
        return self.pages[block, position % block_size, 0].float(), num_keys


def attend_gathered(
    q: Tensor,
    pages: Tensor,
    value_dim: int,
    block_table: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    scale: float,
) -> Tensor:
    """Causal attention: q [T, H, D] -> [T, H, V]. Rows of no sequence come out as zeros.

    pages [num_blocks, block_size, 1, D]; value_dim: V. The others are as in ops.paged_attention.
    """
    gathering = Gathering(pages, block_table, seq_lens.tolist())
    out = q.new_zeros(*q.shape[:2], value_dim)
    decoding = []
    for s, (begin, end) in enumerate(itertools.pairwise(query_start.tolist())):
        if end - begin == 1:
            decoding.append((s, begin))
        elif end > begin:
            out[begin:end] = _prompt(q[begin:end], gathering, s, value_dim, scale)
    for turn in _turns(decoding, gathering, q.shape[1]):
        keys, num_keys = gathering.keys([s for s, _ in turn])
        hidden = torch.arange(keys.shape[1], device=q.device) >= num_keys
        rows = torch.tensor([row for _, row in turn], device=q.device)
        out[rows] = _attend(q[rows], keys, hidden.unsqueeze(1), value_dim, scale).to(q.dtype)
    return out


def gathered_room(pages: Tensor, max_model_len: int) -> int:
    """Bytes that the keys of one sequence may take at most, beside what is bounded."""
    return max_model_len * _key_bytes(pages)


def _key_bytes(pages: Tensor) -> int:
    """Of a gathered key: as it is kept, and in float32."""
    return pages.shape[3] * (pages.element_size() + 4)


def _prompt(q: Tensor, gathering: Gathering, s: int, value_dim: int, scale: float) -> Tensor:
    """The last rows of sequence s, q [rows, H, D] -> [rows, H, V], in blocks of rows."""
    keys, _ = gathering.keys([s])
    num_rows, num_heads, num_keys = len(q), q.shape[1], keys.shape[1]
    at_once = max(1, GATHER_BYTES // (_SCORE_BYTES * num_heads * num_keys))
    out = q.new_empty(num_rows, num_heads, value_dim)
    for first in range(0, num_rows, at_once):
        rows = q[first : first + at_once]
        position = torch.arange(first, first + len(rows), device=q.device) + (num_keys - num_rows)
        hidden = torch.arange(num_keys, device=q.device) > position.repeat_interleave(num_heads).unsqueeze(1)
        attended = _attend(rows.flatten(0, 1).unsqueeze(0), keys, hidden, value_dim, scale)
        out[first : first + at_once] = attended.view(-1, num_heads, value_dim).to(q.dtype)
    return out


def _turns(decoding: list[tuple[int, int]], gathering: Gathering, num_heads: int) -> list[list[tuple[int, int]]]:
    """Sequences with one row, (sequence, row), in groups of bounded size. Neighbours in length go together, since each
    is padded to the longest."""
    key_bytes, turns = _key_bytes(gathering.pages) + _SCORE_BYTES * num_heads, list[list[tuple[int, int]]]()
    for s, row in sorted(decoding, key=lambda item: gathering.lengths[item[0]]):
        if not turns or (len(turns[-1]) + 1) * gathering.lengths[s] * key_bytes > GATHER_BYTES:
            turns.append([])
        turns[-1].append((s, row))
    return turns


def _attend(q: Tensor, keys: Tensor, hidden: Tensor, value_dim: int, scale: float) -> Tensor:
    """q [B, N, D], keys [B, K, D] float32, hidden (broadcast to [B, N, K]) -> [B, N, V] float32."""
    scores = torch.bmm(q.float() * scale, keys.transpose(1, 2))
    return torch.bmm(scores.masked_fill_(hidden, float("-inf")).softmax(-1), keys[..., :value_dim])
