"""Every native op: its meaning, its plain PyTorch reference, and the choice between the two.

The model calls the plain functions of this module (`rms_norm`, `paged_attention`, ...). Each runs the kernel of
`infer._kernels` (compiled from kernels/ by setup.py, loaded by native.py, which has the schemas) where one covers the
tensors it was given, and its `*_reference` otherwise; the reference is the definition of the op, so both give the same
result up to float32 rounding.

Legend: T tokens in the batch, S sequences, H hidden size, D head size, num_q and num_kv local heads. All ops are for
inference: none has a gradient. INFER_OPS=reference in the environment keeps every op on its reference. More of them
stand in ops_latent.py and ops_moe.py.
"""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from infer import native
from infer.ops_sampling import argmax_rows_reference, largest_reference, perturbed_max_reference

if TYPE_CHECKING:
    from infer.ops_cuda import Prefill

LINEAR_LANES = 16  # outputs that a packed weight keeps side by side

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
}
_PLAIN_ACTIVATIONS = {**_ACTIVATIONS, "relu": F.relu}


# ---------------------------------------------------------------------------------------------------- the ops


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, K] times weight [N, K] transposed, plus bias [N]: [T, N] in the weight's dtype."""
    return F.linear(x.to(weight.dtype), weight, bias)


def pack_linear(weight: Tensor) -> Tensor:
    """weight [N, K] -> [ceil(N / 16), ceil(K / P), 16, P], for packed_linear.

    P inputs lie together: 1 in float32, 2 in bfloat16, which are unpacked from one 32-bit load.

    Entry [b, k, l, p] is weight[16 * b + l, P * k + p], zero beyond the weight's ends.
    """
    (outputs, inputs), together = weight.shape, 4 // weight.element_size()
    blocks, groups = -(-outputs // LINEAR_LANES), -(-inputs // together)
    if (outputs, inputs) != (blocks * LINEAR_LANES, groups * together):
        weight = F.pad(weight, (0, groups * together - inputs, 0, blocks * LINEAR_LANES - outputs))
    # Moved as 32-bit words, whole groups: five times as fast as moving numbers of 16 bits.
    words = weight.contiguous().view(torch.int32).view(blocks, LINEAR_LANES, groups).transpose(1, 2).contiguous()
    return words.view(weight.dtype).view(blocks, groups, LINEAR_LANES, together)


def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None, outputs: int) -> Tensor:
    """x [T, K] times a weight [outputs, K] packed by pack_linear, transposed, plus bias [outputs]: [T, outputs].

    Sums are float32, over the inputs in rising order: a row's result does not depend on other rows, to the last bit.
    The result has the weight's dtype; x may be bfloat16 where that is float32.
    """
    if native.use_native("packed_linear", x):
        return torch.ops.infer.packed_linear.default(x, packed, bias, outputs)
    return packed_linear_reference(x, packed, bias, outputs)


def packed_rows(ids: Tensor, packed: Tensor, inputs: int) -> Tensor:
    """ids [T] int64 -> those rows of a weight [N, inputs] packed by pack_linear: [T, inputs]."""
    if native.use_native("packed_rows", packed):
        return torch.ops.infer.packed_rows.default(ids, packed, inputs)
    return packed_rows_reference(ids, packed, inputs)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm of each row (Zhang and Sennrich, 2019): x [T, H], weight [H] -> [T, H].

    Statistics are float32; the normalized row is cast to the weight's dtype before it meets the weight: to x.dtype, as
    Llama's is, or not at all where the weight is float32 (Gemma), in which case the product is cast.
    x may be a strided view whose last dimension is contiguous.
    """
    if native.use_native("rms_norm", x):
        return torch.ops.infer.rms_norm.default(x, weight, eps)
    return rms_norm_reference(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """residual + x, and its rms_norm: x and residual [T, H], weight [H] -> (normed [T, H], residual [T, H]).

    The weight has the dtype of x, or float32, as for rms_norm.
    """
    if native.use_native("add_rms_norm", x):
        return torch.ops.infer.add_rms_norm.default(x, residual, weight, eps)
    return add_rms_norm_reference(x, residual, weight, eps)


def act_and_mul(x: Tensor, kind: str) -> Tensor:
    """act(x[:, :I]) * x[:, I:] for x [T, 2 * I] -> [T, I]; kind is silu, gelu (erf) or gelu_tanh."""
    if native.use_native("act_and_mul", x):
        return torch.ops.infer.act_and_mul.default(x, kind)
    return act_and_mul_reference(x, kind)


def activation(x: Tensor, kind: str) -> Tensor:
    """act(x), elementwise; kind is silu, gelu (erf), gelu_tanh or relu. PyTorch's own kernels: there is no other."""
    return _PLAIN_ACTIVATIONS[kind](x)


def rotary_write_kv(
    qkv: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    k_pages: Tensor,
    v_pages: Tensor,
    slots: Tensor,
    num_q: int,
    num_kv: int,
) -> Tensor:
    """Norms (optional) and rotates q and k, writes k and v into the cache, and returns q [T, num_q, D].

    qkv        [T, (num_q + 2 * num_kv) * D], last dimension contiguous
    positions  [T] int64, each in [0, max_pos)
    cos_sin    [max_pos, rot_dim] float32: cosines, then sines; the first rot_dim <= D dimensions of a head are
               rotated in float32, half against half (GPT-NeoX's order)
    q_norm     [D] or None: weight of a per-head rms_norm before the rotation (of qkv's dtype or float32, as there);
               k_norm likewise; eps is theirs
    k_pages    [num_blocks, block_size, num_kv, D], written in place; v_pages likewise
    slots      [T] int64: block * block_size + offset; -1 writes nothing
    """
    args = (qkv, positions, cos_sin, q_norm, k_norm, eps, k_pages, v_pages, slots, num_q, num_kv)
    if native.use_native("rotary_write_kv", qkv):
        return torch.ops.infer.rotary_write_kv.default(*args)
    return rotary_write_kv_reference(*args)


def paged_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    kv_map: Tensor,
    scale: float,
    window: int,
    soft_cap: float,
    prefill: "Prefill | None" = None,
    even_groups: bool = False,
) -> Tensor:
    """Causal attention of rows of q over their sequences' cached keys: [T, num_q, value D]. Softmax is float32.

    q            [T, num_q, D]; rows query_start[s] to query_start[s + 1] are the last ones of sequence s
    k_pages      [num_blocks, block_size, num_kv, D]
    v_pages      likewise, with a D of its own; may be a part of k_pages, such as its first dimensions
    block_table  [S, max_blocks] int32: block i of sequence s holds its keys [i * block_size, (i + 1) * block_size)
    query_start  [S + 1] int32, ascending
    seq_lens     [S] int32: keys in the cache for each sequence, this batch's rows included
    kv_map       [num_q] int32: local query head -> local KV head
    window       0, or a query at position p sees only the keys in (p - window, p]; blocks before them are not read
    soft_cap     0, or scores become soft_cap * tanh(score / soft_cap)
    prefill      CUDA: the batch's plan (ForwardContext.prefill); without one, each row is computed by itself
    even_groups  whether the caller knows kv_map[i] to be i // (num_q / num_kv); spares the plan copies of keys

    Row i of sequence s stands at position seq_lens[s] - query_len[s] + i. Rows of no sequence come out as zeros.
    A row's result depends on its own sequence alone, to the last bit.
    """
    args = (q, k_pages, v_pages, block_table, query_start, seq_lens, kv_map, scale, window, soft_cap)
    if native.use_native("paged_attention", q) and (q.is_cpu or _cuda_covers(q, v_pages)):
        if prefill is not None and prefill.covers(q, k_pages, soft_cap):
            return prefill.attend(q, k_pages, v_pages, kv_map, scale, window, even_groups)
        return torch.ops.infer.paged_attention.default(*args)
    return paged_attention_reference(*args)


def _cuda_covers(q: Tensor, v_pages: Tensor) -> bool:
    return native.covers_heads(q.shape[1], q.shape[2], v_pages.shape[3])


def argmax_rows(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The largest of each row, and its column (the lowest one of equals): float32 [rows], int64 [rows].

    logits: [rows, width] in any floating dtype, width > 0. A NaN counts as larger than everything.
    """
    if logits.is_cpu and native.use_native("argmax_rows", logits):  # elsewhere the reference is one kernel
        return torch.ops.infer.argmax_rows.default(logits)
    return argmax_rows_reference(logits)


def perturbed_max(logits: Tensor, temperatures: Tensor, keys: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """The largest of logit + temperature * gumbel in each row, and its column: float32 [rows], int64 [rows].

    logits        [rows, width] in any floating dtype, width > 0: those of the token ids [start, start + width)
    temperatures  [rows] float32, positive
    keys          [rows] int64, from noise.stream_key: what the noise of a row is made from, with the token id

    The lowest column of equals; a NaN counts as larger than everything. The native kernel equals the reference to the
    last bit.
    """
    if logits.is_cpu and native.use_native("perturbed_max", logits):  # there is none for GPUs
        return torch.ops.infer.perturbed_max.default(logits, temperatures, keys, start)
    return perturbed_max_reference(logits, temperatures, keys, start)


def largest(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row by (value falling, column rising): float32 [rows, k] and int64 columns [rows, k].

    logits: [rows, width] in any floating dtype. A NaN counts as larger than everything; several of them come in any
    order. k > 0 is cut to the width.
    """
    if logits.is_cpu and k < logits.shape[-1] and native.use_native("largest", logits):  # a full sort is PyTorch's
        return torch.ops.infer.largest.default(logits, k)
    return largest_reference(logits, k)


# ---------------------------------------------------------------------------------------------- the references


def packed_linear_reference(x: Tensor, packed: Tensor, bias: Tensor | None, outputs: int) -> Tensor:
    weight = packed.transpose(1, 2).flatten(2).flatten(0, 1)[:outputs, : x.shape[1]]
    return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(packed.dtype)


def packed_rows_reference(ids: Tensor, packed: Tensor, inputs: int) -> Tensor:
    return packed[ids // LINEAR_LANES, :, ids % LINEAR_LANES].flatten(1)[:, :inputs]


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x32 = x.float()
    inverse_rms = torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return ((x32 * inverse_rms).to(weight.dtype) * weight).to(x.dtype)


def add_rms_norm_reference(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    residual = x + residual
    return rms_norm_reference(residual, weight, eps), residual


def act_and_mul_reference(x: Tensor, kind: str) -> Tensor:
    if kind not in _ACTIVATIONS:
        raise ValueError(f"act_and_mul: kind is {kind!r}, must be one of {', '.join(_ACTIVATIONS)}")
    gate, up = x.chunk(2, dim=-1)
    return _ACTIVATIONS[kind](gate) * up


def rotary_write_kv_reference(
    qkv: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    k_pages: Tensor,
    v_pages: Tensor,
    slots: Tensor,
    num_q: int,
    num_kv: int,
) -> Tensor:
    block_size, dim = k_pages.shape[1], k_pages.shape[3]
    heads = qkv.view(qkv.shape[0], num_q + 2 * num_kv, dim)
    q, k, v = heads.split((num_q, num_kv, num_kv), dim=1)
    if q_norm is not None:
        q = rms_norm_reference(q, q_norm, eps)
    if k_norm is not None:
        k = rms_norm_reference(k, k_norm, eps)
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)
    written = slots >= 0
    block, offset = slots[written] // block_size, slots[written] % block_size
    k_pages[block, offset] = rotate_reference(k, cos, sin)[written]
    v_pages[block, offset] = v[written]
    return rotate_reference(q, cos, sin)


def rotate_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, heads, D], cos and sin [T, 1, rot_dim / 2] float32: x with its first rot_dim dimensions rotated."""
    half = cos.shape[-1]
    first, second = x[..., :half].float(), x[..., half : 2 * half].float()
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
    return torch.cat((rotated, x[..., 2 * half :]), dim=-1)


def paged_attention_reference(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    kv_map: Tensor,
    scale: float,
    window: int,
    soft_cap: float,
) -> Tensor:
    out = q.new_zeros(*q.shape[:2], v_pages.shape[3])
    block_size, heads = k_pages.shape[1], kv_map.long()
    starts = query_start.tolist()
    for s, num_keys in enumerate(seq_lens.tolist()):
        begin, end = starts[s], starts[s + 1]
        if begin == end:
            continue
        # Rows stand at [first, num_keys); no row sees a key before first_key, whose blocks may be gone.
        first = num_keys - (end - begin)
        first_block = max(0, first - window + 1) // block_size if window else 0
        first_key = first_block * block_size
        blocks = block_table[s, first_block : -(-num_keys // block_size)].long()
        k = k_pages[blocks].flatten(0, 1)[: num_keys - first_key, heads].float()
        v = v_pages[blocks].flatten(0, 1)[: num_keys - first_key, heads].float()
        scores = torch.einsum("qhd,khd->hqk", q[begin:end].float(), k) * scale
        if soft_cap:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        key_pos = torch.arange(first_key, num_keys, device=q.device)
        query_pos = torch.arange(first, num_keys, device=q.device).unsqueeze(1)
        hidden = key_pos > query_pos
        if window:
            hidden |= key_pos <= query_pos - window
        weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
        out[begin:end] = torch.einsum("hqk,khd->qhd", weights, v).to(q.dtype)
    return out
