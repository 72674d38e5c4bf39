"""Attention over the paged KV cache, split by query head, and the context a forward pass runs in."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from infer import ops
from infer.layers.declare import Placement
from infer.layers.linear import ColumnLinear, RowLinear, Rows
from infer.layers.norm import RMSNorm
from infer.layers.rotary import Rotary
from infer.models.config import ModelConfig
from infer.ops_cuda import Prefill, plan_prefill
from infer.parallel.placement import split_heads


@dataclass
class ForwardContext:
    """Where the T tokens of a batch of S sequences stand, and the KV cache they read and write.

    positions    [T] int64: of each token in its sequence
    slots        [T] int64: where its key and value go, block * block_size + offset; -1: nowhere
    block_table  [S, max_blocks] int32: the blocks of each sequence, in order
    query_start  [S + 1] int32: tokens [query_start[s], query_start[s + 1]) are the last ones of sequence s
    seq_lens     [S] int32: keys of each sequence, this batch's included
    k_pages      one [num_blocks, block_size, heads, key_dim] for each layer of this stage (cache/layout.py)
    v_pages      likewise with value_dim

    On a GPU, what the host knows of a batch that is not decode-only; a number that it does not tell is read from the
    device, once, which waits for it:

    max_query_len  the most tokens of a sequence; may be more than that
    max_seq_len    the most keys of a sequence; may be more than that
    prefill_keys   keys of the sequences with more than one token, all together
    """

    positions: Tensor
    slots: Tensor
    block_table: Tensor
    query_start: Tensor
    seq_lens: Tensor
    k_pages: list[Tensor]
    v_pages: list[Tensor]
    max_query_len: int | None = None
    max_seq_len: int | None = None
    prefill_keys: int | None = None
    prefill: Prefill | None = field(init=False, default=None)  # how a GPU attends, worked out once for all layers

    def __post_init__(self) -> None:
        # Every sequence has a token or pads a batch that only decodes, so as many tokens as sequences mean decode-only.
        if self.positions.is_cuda and len(self.positions) != len(self.seq_lens):
            self.prefill = plan_prefill(
                self.query_start, self.seq_lens, self.block_table, self.k_pages[0], self.max_query_len,
                self.max_seq_len, self.prefill_keys,
            )  # fmt: skip


class Attention(nn.Module):
    """Grouped-query attention of layer `layer`, the `local`-th of this stage."""

    kv_map: Tensor

    def __init__(self, prefix: str, c: ModelConfig, layer: int, local: int, rotary: Rotary, place: Placement):
        super().__init__()
        heads = split_heads(c.num_heads, c.num_kv_heads, place.tp.size)[place.tp.index]
        d, q_size, kv_size = c.head_dim, c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        query, kv = _scaled(heads.query, d), _scaled(heads.kv, d)
        parts = (
            Rows(f"{prefix}.q_proj", q_size, query),
            Rows(f"{prefix}.k_proj", kv_size, kv),
            Rows(f"{prefix}.v_proj", kv_size, kv),
        )
        self.qkv = ColumnLinear(c.hidden_size, parts, c.qkv_bias, place)
        self.o = RowLinear(f"{prefix}.o_proj", q_size, query, c.hidden_size, c.o_bias, place)
        self.q_norm = RMSNorm(f"{prefix}.q_norm", d, c.norm_eps, place) if c.qk_norm else None
        self.k_norm = RMSNorm(f"{prefix}.k_norm", d, c.norm_eps, place) if c.qk_norm else None
        # Taken out of the modules here, so that forward need not ask whether there are any.
        self.q_norm_weight = self.q_norm.weight if self.q_norm is not None else None
        self.k_norm_weight = self.k_norm.weight if self.k_norm is not None else None
        self.register_buffer(
            "kv_map", torch.tensor(heads.kv_map, dtype=torch.int32, device=place.device), persistent=False
        )
        self.rotary, self.local = rotary, local
        self.num_q, self.num_kv, self.q_width = len(heads.query), len(heads.kv), len(query)
        # Query heads of each KV head, if all have as many: kernels need not look.
        group, rest = divmod(self.num_q, self.num_kv)
        self.even_groups = rest == 0 and list(heads.kv_map) == [head // group for head in range(self.num_q)]
        self.eps, self.scale, self.window = c.norm_eps, d**-0.5, c.window[layer]

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        """x [T, hidden] -> [T, hidden]; writes this batch's keys and values into the cache."""
        k_pages, v_pages = ctx.k_pages[self.local], ctx.v_pages[self.local]
        q = ops.rotary_write_kv(
            self.qkv(x), ctx.positions, self.rotary.cos_sin, self.q_norm_weight, self.k_norm_weight, self.eps,
            k_pages, v_pages, ctx.slots, self.num_q, self.num_kv,
        )  # fmt: skip
        out = ops.paged_attention(
            q, k_pages, v_pages, ctx.block_table, ctx.query_start, ctx.seq_lens, self.kv_map, self.scale, self.window,
            soft_cap=0.0, prefill=ctx.prefill, even_groups=self.even_groups,
        )  # fmt: skip
        return self.o(out.view(-1, self.q_width))


def _scaled(heads: range, head_dim: int) -> range:
    """An interval of heads as the interval of their rows."""
    return range(heads.start * head_dim, heads.stop * head_dim)
