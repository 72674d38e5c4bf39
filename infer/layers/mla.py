"""Multi-head latent attention (DeepSeek-V2, 2024) over a cache of latents, split by query head.

Keys and values of all heads are made from a latent, one short vector a token, and that is what the cache holds, beside
a rotated key that all heads share. Attention runs in the absorbed form (infer/ops_latent.py) for every row, of prompts
too: in place of making keys, a head's query is brought to where the latents are, and in place of making values, the
weighted sum of latents is turned into the head's output.
"""

import torch
from torch import Tensor, nn

from infer import ops_latent
from infer.layers.attention import ForwardContext
from infer.layers.declare import Layer, Placement
from infer.layers.linear import ColumnLinear, RowLinear, Rows
from infer.layers.norm import RMSNorm
from infer.layers.rotary import Rotary
from infer.models.config import ModelConfig
from infer.models.mla_config import MlaConfig
from infer.parallel.placement import Source, WeightSpec, split
from infer.quant import HeadMatrix, PlainHeads, choose_heads

NORM_EPS = 1e-6  # of the norms within attention, whatever that of the others: config.json has no word for it


class LatentAttention(nn.Module):
    """Latent attention of the `local`-th layer of this stage. prefix: the layer's name in the checkpoint."""

    kv_map: Tensor

    def __init__(self, prefix: str, c: ModelConfig, local: int, rotary: Rotary, place: Placement):
        super().__init__()
        assert c.mla is not None and c.rope is not None
        mla, prefix = c.mla, f"{prefix}.self_attn"
        heads = split(c.num_heads, place.tp.size)[place.tp.index]
        project = LowRankProjection if mla.q_lora_rank else DirectProjection
        self.qkv = project(prefix, c, mla, heads, place)
        self.kv_norm = RMSNorm(f"{prefix}.kv_a_layernorm", mla.kv_lora_rank, NORM_EPS, place)
        self.expansion = LatentExpansion(f"{prefix}.kv_b_proj", mla, c.num_heads, heads, place)
        held, total = _scaled(heads, mla.v_head_dim), c.num_heads * mla.v_head_dim
        self.o = RowLinear(f"{prefix}.o_proj", total, held, c.hidden_size, c.o_bias, place)
        kv_map = torch.zeros(len(heads), dtype=torch.int32, device=place.device)  # all heads read the same key
        self.register_buffer("kv_map", kv_map, persistent=False)
        self.rotary, self.local = rotary, local
        self.num_q, self.q_width = len(heads), len(held)
        self.qk_dim, self.nope_dim = mla.qk_head_dim, mla.qk_nope_head_dim
        self.scale = mla.softmax_scale

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        """x [T, hidden] -> [T, hidden]; writes this batch's latents into the cache."""
        return self.o(self.attend(self.project(x), ctx))

    def project(self, x: Tensor) -> list[Tensor]:
        """x [T, hidden] -> this rank's queries [T, num_q * qk_head_dim], and [T, kv_lora_rank + qk_rope_head_dim]."""
        return self.qkv(x)

    def attend(self, projected: list[Tensor], ctx: ForwardContext) -> Tensor:
        """What `project` gave -> the heads' outputs [T, num_q * v_head_dim]."""
        queries, kv = projected
        pages, values = ctx.k_pages[self.local], ctx.v_pages[self.local]
        heads = queries.view(-1, self.num_q, self.qk_dim)
        q = ops_latent.rotary_write_latent(
            self.expansion.absorb(heads[:, :, : self.nope_dim]), heads[:, :, self.nope_dim :], kv, ctx.positions,
            self.rotary.cos_sin, self.kv_norm.weight, NORM_EPS, pages, ctx.slots,
        )  # fmt: skip
        latents = ops_latent.attend_latents(
            q, pages, values, ctx.block_table, ctx.query_start, ctx.seq_lens, self.kv_map, self.scale
        )
        return self.expansion.expand(latents).view(-1, self.q_width)


class LatentExpansion(Layer):
    """What makes each head's keys and values from a latent (kv_b_proj), used on the other side of the attention."""

    def __init__(self, source: str, mla: MlaConfig, num_heads: int, heads: range, place: Placement):
        super().__init__()
        rank, rows = mla.kv_lora_rank, mla.qk_nope_head_dim + mla.v_head_dim
        shape, held = (num_heads * rows, rank), (_scaled(heads, rows), range(rank))
        self.weight = self.declare("weight", WeightSpec((Source(f"{source}.weight", shape, held),)), place)
        by_head = self.weight.view(len(heads), rows, rank)
        self._keys = by_head[:, : mla.qk_nope_head_dim].transpose(1, 2)
        self._values = by_head[:, mla.qk_nope_head_dim :]
        self._absorb: HeadMatrix = PlainHeads(self._keys)
        self._expand: HeadMatrix = PlainHeads(self._values)

    def absorb(self, queries: Tensor) -> Tensor:
        """queries [T, H, qk_nope_head_dim], for keys made from latents -> [T, H, kv_lora_rank], for the latents."""
        return self._absorb.multiply(queries)

    def expand(self, latents: Tensor) -> Tensor:
        """latents [T, H, kv_lora_rank], summed by weight -> values summed by weight [T, H, v_head_dim]."""
        return self._expand.multiply(latents)

    def pack(self) -> None:
        """Once the weight is loaded: keeps both parts in the form that is fastest here, and frees the other."""
        self._absorb, self._expand = choose_heads(self._keys), choose_heads(self._values)
        if not isinstance(self._absorb, PlainHeads):
            self.weight.data = torch.empty(0, dtype=self.weight.dtype)
            del self._keys, self._values  # views of what was freed


class DirectProjection(nn.Module):
    """x [T, hidden] -> queries [T, H * qk_head_dim], and latent and key [T, kv_lora_rank + qk_rope_head_dim]."""

    def __init__(self, prefix: str, c: ModelConfig, mla: MlaConfig, heads: range, place: Placement):
        super().__init__()
        self.q = ColumnLinear(c.hidden_size, (_query_rows(f"{prefix}.q_proj", c, mla, heads),), False, place)
        self.kv = ColumnLinear(c.hidden_size, (_kv_rows(prefix, c, mla),), c.qkv_bias, place)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.q(x), self.kv(x)]


class LowRankProjection(nn.Module):
    """The same, with queries that are made from a vector of q_lora_rank numbers."""

    def __init__(self, prefix: str, c: ModelConfig, mla: MlaConfig, heads: range, place: Placement):
        super().__init__()
        self.rank = mla.q_lora_rank
        down = (Rows(f"{prefix}.q_a_proj", self.rank, range(self.rank)), _kv_rows(prefix, c, mla))
        self.down = ColumnLinear(c.hidden_size, down, c.qkv_bias, place)
        self.norm = RMSNorm(f"{prefix}.q_a_layernorm", self.rank, NORM_EPS, place)
        self.up = ColumnLinear(self.rank, (_query_rows(f"{prefix}.q_b_proj", c, mla, heads),), False, place)

    def forward(self, x: Tensor) -> list[Tensor]:
        down = self.down(x)
        return [self.up(self.norm(down[:, : self.rank])), down[:, self.rank :]]


def _query_rows(source: str, c: ModelConfig, mla: MlaConfig, heads: range) -> Rows:
    """Of each head, the dimensions without a position, then the rotated ones."""
    return Rows(
        source, c.num_heads * mla.qk_head_dim, _scaled(heads, mla.qk_head_dim),
        _halves(c, mla.qk_nope_head_dim, mla.qk_rope_head_dim, len(heads)),
    )  # fmt: skip


def _kv_rows(prefix: str, c: ModelConfig, mla: MlaConfig) -> Rows:
    """The latent, then the key that is rotated: every rank needs all of both."""
    order = _halves(c, mla.kv_lora_rank, mla.qk_rope_head_dim, 1)
    return Rows(f"{prefix}.kv_a_proj_with_mqa", mla.latent_dim, range(mla.latent_dim), order)


def _halves(c: ModelConfig, before: int, turned: int, num_heads: int) -> tuple[int, ...] | None:
    """The order of rows that turns neighbours into halves, in the `turned` rows behind `before` others of each head.

    It is that of queries and of the key, so that their products are the same sums. None: they come as halves.
    """
    if c.rope is None or not c.rope.interleaved:
        return None
    size = before + turned
    one = (*range(before), *range(before, size, 2), *range(before + 1, size, 2))
    return tuple(head * size + i for head in range(num_heads) for i in one)


def _scaled(heads: range, dim: int) -> range:
    """An interval of heads as the interval of their rows."""
    return range(heads.start * dim, heads.stop * dim)
