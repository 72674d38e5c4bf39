"""The ops of multi-head latent attention, as ops.py has those of the others: function, native kernel, reference.

Attention itself is that of other models, in the absorbed form (DeepSeek-V2, 2024, section 2.1.2): what makes a head's
keys from a latent is applied to its query instead, and what makes its values to the sum of latents. So all heads read
one key a token, the latent beside a rotated part, and their value is that latent; nothing is ever expanded.

Legend: T tokens in the batch, S sequences, H local heads, L size of a latent (kv_lora_rank), R rotated dimensions of a
head.
"""

import torch
from torch import Tensor

from infer import native, ops
from infer.ops_gathered import attend_gathered


def head_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, H, K] times weight [H, N, K] transposed, head by head: [T, H, N], contiguous."""
    return torch.bmm(x.transpose(0, 1), weight.transpose(1, 2)).transpose(0, 1).contiguous()


def pack_head_linear(weight: Tensor) -> Tensor:
    """weight [H, N, K] -> [H, ceil(N / 16), ceil(K / P), 16, P]: each head's as ops.pack_linear packs it."""
    return torch.stack([ops.pack_linear(head) for head in weight])


def packed_head_linear(x: Tensor, packed: Tensor, outputs: int) -> Tensor:
    """head_linear with a weight [H, outputs, K] packed by pack_head_linear: [T, H, outputs], contiguous.

    x may be strided but for its last dimension. Sums are as in ops.packed_linear: a row's result does not depend on
    other rows, to the last bit.
    """
    if native.use_native("packed_head_linear", x):
        return torch.ops.infer.packed_head_linear.default(x, packed, outputs)
    return packed_head_linear_reference(x, packed, outputs)


def rotary_write_latent(
    q_latent: Tensor,
    q_rope: Tensor,
    kv: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    norm: Tensor,
    eps: float,
    pages: Tensor,
    slots: Tensor,
) -> Tensor:
    """Rotates q_rope and kv's end, writes kv into the cache, and returns the absorbed form's queries [T, H, L + R].

    q_latent   [T, H, L], and q_rope [T, H, R]: what goes before and into the rotated part of the result
    kv         [T, L + R]: a latent, which is normed (ops.rms_norm), and a key, which is rotated, of each token
    positions  [T] int64, each in [0, max_pos)
    cos_sin    [max_pos, R] float32: cosines, then sines; rotation is float32, half against half
    norm       [L]: weight of the latent's norm; eps is its epsilon
    pages      [num_blocks, block_size, 1, L + R], written in place
    slots      [T] int64: block * block_size + offset; -1 writes nothing

    The last dimension of each is contiguous.
    """
    args = (q_latent, q_rope, kv, positions, cos_sin, norm, eps, pages, slots)
    if native.use_native("rotary_write_latent", q_latent):
        return torch.ops.infer.rotary_write_latent.default(*args)
    return rotary_write_latent_reference(*args)


def attend_latents(
    q: Tensor,
    pages: Tensor,
    values: Tensor,
    block_table: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    kv_map: Tensor,
    scale: float,
) -> Tensor:
    """Causal attention of rows over their sequences' latents: q [T, H, L + R] -> latents summed by weight [T, H, L].

    pages [num_blocks, block_size, 1, L + R]; values: its first L dimensions. The others are as in ops.paged_attention.
    The CUDA kernel of that has no room for so large a head: a GPU runs PyTorch's matrix products over gathered latents.
    """
    if q.is_cuda:
        return attend_gathered(q, pages, values.shape[3], block_table, query_start, seq_lens, scale)
    return ops.paged_attention(
        q, pages, values, block_table, query_start, seq_lens, kv_map, scale, window=0, soft_cap=0.0
    )


def packed_head_linear_reference(x: Tensor, packed: Tensor, outputs: int) -> Tensor:
    rows = (ops.packed_linear_reference(x[:, h], packed[h], None, outputs) for h in range(x.shape[1]))
    return torch.stack(list(rows), dim=1)


def rotary_write_latent_reference(
    q_latent: Tensor,
    q_rope: Tensor,
    kv: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    norm: Tensor,
    eps: float,
    pages: Tensor,
    slots: Tensor,
) -> Tensor:
    size, block_size = q_latent.shape[2], pages.shape[1]
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)
    latent, key = ops.rms_norm_reference(kv[:, :size], norm, eps), kv[:, None, size:]
    written = slots >= 0
    block, offset = slots[written] // block_size, slots[written] % block_size
    pages[block, offset, 0] = torch.cat((latent, ops.rotate_reference(key, cos, sin)[:, 0]), dim=-1)[written]
    return torch.cat((q_latent, ops.rotate_reference(q_rope, cos, sin)), dim=-1)
