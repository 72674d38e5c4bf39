"""Attention over the paged KV cache, split by query head, and the context a forward pass runs in."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infer import ops
from infer.layers.declare import Placement
from infer.layers.linear import ColumnLinear, RowLinear, Rows
from infer.layers.norm import RMSNorm
from infer.layers.rotary import Rotary
from infer.models.config import ModelConfig
from infer.ops_cuda import Prefill, plan_prefill
from infer.parallel.placement import HeadShard, split_heads


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
    """Grouped-query attention of layer `layer`, the `local`-th of this stage. prefix: the layer's name."""

    kv_map: Tensor

    def __init__(self, prefix: str, c: ModelConfig, layer: int, local: int, rotary: Rotary, place: Placement):
        super().__init__()
        heads = split_heads(c.num_heads, c.num_kv_heads, place.tp.size)[place.tp.index]
        d, names, q_size = c.head_dim, c.names, c.num_heads * c.head_dim
        query = _scaled(heads.query, d)
        rows = _qkv_rows(prefix, c, heads)
        self.qkv = ColumnLinear(c.hidden_size, rows, c.qkv_bias, place, transposed=names.transposed)
        self.o = RowLinear(
            f"{prefix}.{names.o}", q_size, query, c.hidden_size, c.o_bias, place, transposed=names.transposed
        )
        self.q_norm, self.k_norm = _head_norms(prefix, c, place)
        # Taken out of the modules here, so that forward need not ask whether there are any.
        self.q_norm_weight = self.q_norm.weight if self.q_norm is not None else None
        self.k_norm_weight = self.k_norm.weight if self.k_norm is not None else None
        self.norm_qk: nn.Module = WideNorm(prefix, c, heads, place) if c.qk_norm == "all" else nn.Identity()
        self.register_buffer(
            "kv_map", torch.tensor(heads.kv_map, dtype=torch.int32, device=place.device), persistent=False
        )
        self.rotary, self.local = rotary, local
        self.num_q, self.num_kv, self.q_width = len(heads.query), len(heads.kv), len(query)
        # Query heads of each KV head, if all have as many: kernels need not look.
        group, rest = divmod(self.num_q, self.num_kv)
        self.even_groups = rest == 0 and list(heads.kv_map) == [head // group for head in range(self.num_q)]
        self.eps, self.window, self.soft_cap = c.norm_eps, c.window[layer], c.attention_soft_cap
        self.scale = c.attention_scale or d**-0.5

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        """x [T, hidden] -> [T, hidden]; writes this batch's keys and values into the cache."""
        return self.o(self.attend(self.project(x), ctx))

    def project(self, x: Tensor) -> list[Tensor]:
        """x [T, hidden] -> this rank's q, k and v, side by side [T, (num_q + 2 * num_kv) * head_dim]."""
        return [self.qkv(x)]

    def attend(self, projected: list[Tensor], ctx: ForwardContext) -> Tensor:
        """What `project` gave -> the heads' outputs [T, q_width]."""
        k_pages, v_pages = ctx.k_pages[self.local], ctx.v_pages[self.local]
        q = ops.rotary_write_kv(
            self.norm_qk(projected[0]), ctx.positions, self.rotary.cos_sin, self.q_norm_weight, self.k_norm_weight,
            self.eps, k_pages, v_pages, ctx.slots, self.num_q, self.num_kv,
        )  # fmt: skip
        out = ops.paged_attention(
            q, k_pages, v_pages, ctx.block_table, ctx.query_start, ctx.seq_lens, self.kv_map, self.scale, self.window,
            soft_cap=self.soft_cap, prefill=ctx.prefill, even_groups=self.even_groups,
        )  # fmt: skip
        return out.view(-1, self.q_width)


class WideNorm(nn.Module):
    """RMSNorm of q over all heads of the model, and of k over all of its own (OLMo 2), before the rotation.

    Each rank has some of the heads, so the squares are summed over the ranks. A KV head that several ranks hold is
    counted by the one that has its first query head. All of it is float32, rounded once, as OLMo's own code has it.
    """

    shares: Tensor
    one: Tensor

    def __init__(self, prefix: str, c: ModelConfig, heads: HeadShard, place: Placement):
        super().__init__()
        d, group = c.head_dim, c.num_heads // c.num_kv_heads
        q_size, k_size = c.num_heads * d, c.num_kv_heads * d
        query, kv = _scaled(heads.query, d), _scaled(heads.kv, d)
        self.q = RMSNorm(f"{prefix}.{c.names.q_norm}", q_size, c.norm_eps, place, held=query)
        self.k = RMSNorm(f"{prefix}.{c.names.k_norm}", k_size, c.norm_eps, place, held=kv)
        own = [head - heads.kv.start for head in heads.kv if head * group in heads.query]
        own_rows = _scaled(range(own[0], own[-1] + 1), d) if own else range(0)
        self.tp, self.eps = place.tp, c.norm_eps
        self.q_end, self.k_end = len(query), len(query) + len(kv)
        self.own_start, self.own_end = own_rows.start, own_rows.stop  # of this rank's rows of k
        shares = torch.tensor([1 / q_size, 1 / k_size], device=place.device)
        self.register_buffer("shares", shares, persistent=False)
        self.register_buffer("one", torch.ones(1, device=place.device), persistent=False)

    def forward(self, qkv: Tensor) -> Tensor:
        """qkv [T, width] of this rank's heads -> the same with q and k normed."""
        # Times a float32 one, and copied into place: a tape records neither casts nor ops that take lists of tensors.
        q, k = qkv[:, : self.q_end] * self.one, qkv[:, self.q_end : self.k_end] * self.one
        own_k = k[:, self.own_start : self.own_end]
        q_sum, k_sum = q.square().sum(-1, keepdim=True), own_k.square().sum(-1, keepdim=True)
        sums = self.tp.all_reduce(F.pad(q_sum, (0, 1)) + F.pad(k_sum, (1, 0)))
        inverse_rms = torch.rsqrt(sums * self.shares + self.eps)
        normed = torch.empty_like(qkv)
        normed[:, : self.q_end].copy_(q * inverse_rms[:, :1] * self.q.weight)
        normed[:, self.q_end : self.k_end].copy_(k * inverse_rms[:, 1:] * self.k.weight)
        normed[:, self.k_end :].copy_(qkv[:, self.k_end :])
        return normed


def make_attention(
    prefix: str, c: ModelConfig, layer: int, local: int, rotary: Rotary, place: Placement
) -> Attention:
    """The attention of layer `layer`, the `local`-th of this stage, whose name is prefix ("model.layers.3")."""
    return Attention(prefix, c, layer, local, rotary, place)


def _head_norms(prefix: str, c: ModelConfig, place: Placement) -> tuple[RMSNorm | None, RMSNorm | None]:
    """Norms of each head of q and of k."""
    if c.qk_norm != "head":
        return None, None
    offset = 1.0 if c.norm == "rms_plus_one" else 0.0
    names = (c.names.q_norm, c.names.k_norm)
    q, k = (RMSNorm(f"{prefix}.{name}", c.head_dim, c.norm_eps, place, offset=offset) for name in names)
    return q, k


def _qkv_rows(prefix: str, c: ModelConfig, heads: HeadShard) -> tuple[Rows, ...]:
    """The rows of q, k and v that a rank computes, wherever the checkpoint has them."""
    names, d = c.names, c.head_dim
    sizes = {"q": c.num_heads * d, "k": c.num_kv_heads * d, "v": c.num_kv_heads * d}
    held = {"q": _scaled(heads.query, d), "k": _scaled(heads.kv, d), "v": _scaled(heads.kv, d)}
    fused, total = f"{prefix}.{names.qkv}", sum(sizes.values())
    if names.qkv_by_head:
        assert c.num_kv_heads == c.num_heads, "q, k and v of each head in turn: each has its own"
        order = [(3 * head + part) * d + i for part in range(3) for head in range(len(heads.query)) for i in range(d)]
        return (Rows(fused, total, _scaled(heads.query, 3 * d), tuple(order)),)
    rows, start = [], 0
    for part, name in {"q": names.q, "k": names.k, "v": names.v}.items():
        own = held[part]
        order_of = _halves(c, len(own) // d) if part != "v" else None
        if names.qkv:
            rows.append(Rows(fused, total, range(start + own.start, start + own.stop), order_of))
        else:
            rows.append(Rows(f"{prefix}.{name}", sizes[part], own, order_of))
        start += sizes[part]
    return tuple(rows)


def _halves(c: ModelConfig, num_heads: int) -> tuple[int, ...] | None:
    """The order of rows that turns neighbours, which some families rotate together, into the two halves of a head.

    It is that of q and of k, so that their products are the same sums. None: they come as halves.
    """
    if c.rope is None or not c.rope.interleaved:
        return None
    turned = c.rope.dim
    one = [*range(0, turned, 2), *range(1, turned, 2), *range(turned, c.head_dim)]
    return tuple(head * c.head_dim + i for head in range(num_heads) for i in one)


def _scaled(heads: range, head_dim: int) -> range:
    """An interval of heads as the interval of their rows."""
    return range(heads.start * head_dim, heads.stop * head_dim)
