"""Prefill attention on CUDA: torch's FlashAttention over keys and values gathered from the pages.

torch's own paged attention wants FlashAttention-3, which is seldom installed; FlashAttention-2, which every CUDA build
of torch has, wants the keys of a sequence side by side. So sequences with several rows have theirs gathered, layer by
layer; sequences with one row are left to the decode kernel (kernels/cuda/attention.cu), which reads pages as they are.

Where FlashAttention-2 does not cover a case (float32, a soft cap), the decode kernel computes every row by itself:
slower, and just as right.
"""

import functools
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

logger = logging.getLogger("infer.ops")

# Gathered keys and values of one layer take no more than this: KV heads take turns, and then sequences do. Only one
# head of one sequence is never divided, and takes more where it is that long. gather_room tells what this comes to.
GATHER_BYTES = 256 << 20

_FLASH_DTYPES = (torch.bfloat16, torch.float16)
_MIN_CAPABILITY = (8, 0)

VarlenAttention = Callable[..., Any]


@dataclass
class Run:
    """Consecutive sequences of a batch whose keys are gathered at once.

    rows         of q: those of these sequences, and maybe rows of no sequence after them
    query_start  [S + 1] int32: rows [query_start[s], query_start[s + 1]) of these are those of sequence s
    key_start    [S + 1] int32: gathered keys [key_start[s], key_start[s + 1]) are those of sequence s; none if it has
                 fewer than two rows
    block_table  [S, max_blocks] int32
    num_keys     of all of them together, not 0
    """

    rows: slice
    query_start: Tensor
    key_start: Tensor
    block_table: Tensor
    num_keys: int

    def slots(self, window: int, block_size: int) -> Tensor:
        """[num_keys] int64: block * block_size + offset of every gathered key, for layers with this window.

        Blocks before the window of a sequence's first row may be gone. In place of their keys, which no row sees, the
        first key that is seen stands: nothing of another sequence comes near, not even masked (0 * NaN is NaN).
        """
        key_lens, query_lens = self.key_start.diff(), self.query_start.diff()
        seqs = torch.arange(len(key_lens), device=key_lens.device)
        owner = torch.repeat_interleave(seqs, key_lens, output_size=self.num_keys)
        position = torch.arange(self.num_keys, device=key_lens.device) - self.key_start[owner]
        if window:
            first_seen = (key_lens - query_lens - window + 1).clamp_(min=0)
            position = torch.maximum(position, first_seen[owner])
        block = self.block_table[owner, position // block_size].long()
        return block * block_size + position % block_size


@dataclass
class Prefill:
    """The sequences of a batch that have several rows, and where their keys stand. One serves all layers.

    query_start, seq_lens, block_table: as in ops.paged_attention
    runs           which of the sequences take their turn together; none is of sequences with one row alone
    max_query_len  the most rows of a sequence; max_seq_len: the most keys
    """

    query_start: Tensor
    seq_lens: Tensor
    block_table: Tensor
    block_size: int
    runs: list[Run]
    max_query_len: int
    max_seq_len: int
    attention: VarlenAttention
    _slots: dict[int, Tensor] = field(default_factory=dict)

    def covers(self, q: Tensor, k_pages: Tensor, soft_cap: float) -> bool:
        """Whether `attend` can be called; this depends on shapes and dtypes alone."""
        return q.dtype in _FLASH_DTYPES and soft_cap == 0.0 and k_pages.is_contiguous()

    def attend(
        self,
        q: Tensor,
        k_pages: Tensor,
        v_pages: Tensor,
        kv_map: Tensor,
        scale: float,
        window: int,
        even_groups: bool,
    ) -> Tensor:
        """ops.paged_attention of this batch: [T, num_q, D], contiguous.

        even_groups: query head i is known to read KV head i // (num_q / num_kv), so that none needs to be repeated.
        """
        num_q, (num_kv, dim) = q.shape[1], k_pages.shape[2:]
        heads, group = (num_kv, num_q // num_kv) if even_groups else (num_q, 1)
        k_slots, v_slots = k_pages.view(-1, num_kv, dim), v_pages.view(-1, num_kv, dim)

        def some_heads(run: Run, slots: Tensor, begin: int, end: int) -> Tensor:
            """Query heads [begin, end) of `heads` groups."""
            if even_groups:
                k, v = (pages[:, begin:end].index_select(0, slots) for pages in (k_slots, v_slots))
            else:
                chosen = kv_map[begin:end].long()
                k, v = (pages[slots.unsqueeze(1), chosen] for pages in (k_slots, v_slots))
            return self._flash(run, q[run.rows, begin * group : end * group], k, v, scale, window)

        if len(self.runs) == 1 and heads <= _heads_at_once(k_pages, self.runs[0].num_keys):
            out = some_heads(self.runs[0], self.slots(self.runs[0], window), 0, heads)
        else:
            out = torch.empty_like(q, memory_format=torch.contiguous_format)
            for run in self.runs:
                slots, at_once = self.slots(run, window), _heads_at_once(k_pages, run.num_keys)
                for begin in range(0, heads, at_once):
                    end = min(heads, begin + at_once)
                    out[run.rows, begin * group : end * group] = some_heads(run, slots, begin, end)
        # The rows above belong to sequences with several; the others' are still undefined.
        torch.ops.infer.attend_single_rows.default(
            q, k_pages, v_pages, self.block_table, self.query_start, self.seq_lens, kv_map, scale, window, 0.0, out
        )
        return out

    def _flash(self, run: Run, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int) -> Tensor:
        # Causal and aligned at the end: the last row of a sequence sees its last key. FlashAttention counts the keys
        # before a query's own position, `window` counts that one too.
        out: Tensor = self.attention(
            q, k, v, run.query_start, run.key_start, self.max_query_len, self.max_seq_len, scale=scale,
            window_size=(window - 1 if window else -1, 0),
        )  # fmt: skip
        return out

    def slots(self, run: Run, window: int) -> Tensor:
        """run.slots, kept for the layers to come if it is the only run: those of many would grow beyond any bound."""
        if len(self.runs) > 1:
            return run.slots(window, self.block_size)
        if window not in self._slots:
            self._slots[window] = run.slots(window, self.block_size)
        return self._slots[window]


def plan_prefill(
    query_start: Tensor,
    seq_lens: Tensor,
    block_table: Tensor,
    k_pages: Tensor,
    max_query_len: int | None,
    max_seq_len: int | None,
    prefill_keys: int | None,
) -> Prefill | None:
    """The plan of a batch that does not only decode, or None where the decode kernel does all of it.

    prefill_keys: keys of the sequences with several rows, all together. A number that is None is read from the device,
    which waits for it; so are the lengths where there are more keys than can be gathered at once.
    """
    attention = _attention_for(k_pages)
    if attention is None:
        return None
    query_lens = query_start.diff()
    key_lens = torch.where(query_lens > 1, seq_lens, 0)
    if max_query_len is None or max_seq_len is None or prefill_keys is None:
        numbers = torch.stack((query_lens.max(), seq_lens.max(), key_lens.sum()))
        max_query_len, max_seq_len, prefill_keys = (int(number) for number in numbers.tolist())
    if prefill_keys == 0:
        return None
    most = GATHER_BYTES // _bytes_per_key(k_pages)
    if prefill_keys <= most:
        runs = [Run(slice(None), query_start, _starts(key_lens), block_table, prefill_keys)]
    else:
        runs = _divide(query_start, key_lens, block_table, most)
    return Prefill(query_start, seq_lens, block_table, k_pages.shape[1], runs, max_query_len, max_seq_len, attention)


def _divide(query_start: Tensor, key_lens: Tensor, block_table: Tensor, most: int) -> list[Run]:
    """Runs of at most so many keys, or of one sequence. key_lens [S] int32: 0 for sequences that are not gathered."""
    rows, lengths = query_start.tolist(), key_lens.tolist()
    runs, begin = [], 0
    while begin < len(lengths):
        end, num_keys = begin + 1, lengths[begin]
        while end < len(lengths) and num_keys + lengths[end] <= most:
            end, num_keys = end + 1, num_keys + lengths[end]
        if num_keys:
            starts = query_start[begin : end + 1] - rows[begin]
            of_keys, blocks = _starts(key_lens[begin:end]), block_table[begin:end]
            runs.append(Run(slice(rows[begin], rows[end]), starts, of_keys, blocks, num_keys))
        begin = end
    return runs


def _starts(lengths: Tensor) -> Tensor:
    """[S] int32 -> [S + 1] int32: where each begins, one after another, and the end of all."""
    return F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


def _bytes_per_key(k_pages: Tensor) -> int:
    """Of a key and a value of one head."""
    return 2 * k_pages.shape[3] * k_pages.element_size()


def _heads_at_once(k_pages: Tensor, num_keys: int) -> int:
    """How many KV heads take their turn together; at least one."""
    return max(1, GATHER_BYTES // (num_keys * _bytes_per_key(k_pages)))


def gather_room(k_pages: Tensor, *, num_keys: int, max_model_len: int) -> int:
    """Bytes that gathered keys and values may take at most, beyond what they do in a batch of one prompt of num_keys.

    k_pages: any with the cache's device, dtype and heads.
    """
    if _attention_for(k_pages) is None:
        return 0
    per_key = _bytes_per_key(k_pages)
    heads = min(k_pages.shape[2], _heads_at_once(k_pages, num_keys))
    return max(0, max(GATHER_BYTES, max_model_len * per_key) - heads * num_keys * per_key)


def _attention_for(k_pages: Tensor) -> VarlenAttention | None:
    """What attends over keys like these; None where it has to be the decode kernel."""
    if k_pages.dtype not in _FLASH_DTYPES or k_pages.shape[3] % 8 or k_pages.shape[3] > 256:
        return None
    return _flash_attention(k_pages.device)


@functools.cache
def _flash_attention(device: torch.device) -> VarlenAttention | None:
    """torch's varlen_attn, where this torch and this GPU have it; says so once where not."""
    problem = ""
    if torch.cuda.get_device_capability(device) < _MIN_CAPABILITY:
        problem = f"{torch.cuda.get_device_name(device)} is older than FlashAttention supports"
    elif not torch.backends.cuda.is_flash_attention_available():
        problem = "this build of torch has no FlashAttention"
    else:
        # Here, not above: a CPU never needs it, and it takes a while to import.
        from torch.nn.attention.varlen import varlen_attn

        needed = {"scale", "window_size"}
        if needed <= inspect.signature(varlen_attn).parameters.keys():
            # Older versions take GQA without being asked.
            if "enable_gqa" in inspect.signature(varlen_attn).parameters:
                return functools.partial(varlen_attn, enable_gqa=True)
            return varlen_attn
        problem = f"varlen_attn of torch {torch.__version__} lacks {', '.join(sorted(needed))}"
    logger.warning("prefill attention goes row by row, which is slower: %s", problem)
    return None
