"""One pipeline stage of a decoder: some of its layers, the embedding before the first and the head after the last."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from infer.layers.attention import Attention, ForwardContext, make_attention
from infer.layers.declare import Layer, Placement, declared
from infer.layers.ffn import make_ffn
from infer.layers.mla import LatentAttention
from infer.layers.norm import NoNorm, Norm, make_norm
from infer.layers.rotary import Rotary
from infer.layers.scale import EmbedScale, Scale, SoftCap
from infer.layers.vocab import LearnedPositions, LMHead, VocabEmbedding
from infer.models.config import ModelConfig
from infer.models.rope import RopeConfig
from infer.parallel.placement import balanced_layers, check_tensor_parallel, split, split_heads

if TYPE_CHECKING:
    from infer.parallel.groups import Group

__all__ = ["DecoderLayer", "Stage", "balanced_layers"]


class DecoderLayer(nn.Module):
    """Attention and feed-forward, with norms before them, after them, or both.

    layer: its number in the model; local: in this stage.
    """

    def __init__(self, c: ModelConfig, layer: int, local: int, rotary: Rotary, place: Placement):
        super().__init__()
        prefix, names = c.names.layer.format(layer=layer), c.names
        self.attention_norm = _norm_before(c, f"{prefix}.{names.attention_norm}", place)
        self.attention = _attention(prefix, c, layer, local, rotary, place)
        self.attention_out = _after_block(c, f"{prefix}.{names.attention_out_norm}", place)
        self.ffn_norm = _norm_before(c, f"{prefix}.{names.ffn_norm}", place)
        self.ffn = make_ffn(prefix, c, layer, place)
        self.ffn_out = _after_block(c, f"{prefix}.{names.ffn_out_norm}", place)

    def forward(self, pending: Tensor | None, residual: Tensor, ctx: ForwardContext) -> tuple[Tensor, Tensor]:
        """(pending, residual), both [T, hidden], -> the same after this layer.

        The residual stream is residual + pending; the addition waits for the next norm, which does both at once.
        """
        x, residual = self.attention_norm.add(pending, residual)
        x, residual = self.ffn_norm.add(self.attention_out(self.attention(x, ctx)), residual)
        return self.ffn_out(self.ffn(x)), residual


class ParallelLayer(DecoderLayer):
    """Attention and feed-forward side by side: each reads the residual through its own norm (GPT-NeoX)."""

    def forward(self, pending: Tensor | None, residual: Tensor, ctx: ForwardContext) -> tuple[Tensor, Tensor]:
        x, residual = self.attention_norm.add(pending, residual)
        attended = self.attention_out(self.attention(x, ctx))
        return attended + self.ffn_out(self.ffn(self.ffn_norm(residual))), residual


def _attention(
    prefix: str, c: ModelConfig, layer: int, local: int, rotary: Rotary, place: Placement
) -> Attention | LatentAttention:
    """As make_attention has it, of any kind."""
    if c.mla is not None:
        return LatentAttention(prefix, c, local, rotary, place)
    return make_attention(prefix, c, layer, local, rotary, place)


def _norm_before(c: ModelConfig, source: str, place: Placement) -> Norm:
    if c.residual == "post":
        return NoNorm()
    return make_norm(c.norm, source, c.hidden_size, c.norm_eps, place)


def _after_block(c: ModelConfig, source: str, place: Placement) -> nn.Module:
    """What a block's output goes through before it is added to the residual stream."""
    steps: list[nn.Module] = []
    if c.residual in ("post", "sandwich"):
        steps.append(make_norm(c.norm, source, c.hidden_size, c.norm_eps, place))
    if c.residual_scale != 1.0:
        steps.append(Scale(c.residual_scale))
    return nn.Sequential(*steps)


class Stage(nn.Module):
    """Layers `layers` of the model, and this rank's part of each. Nothing else is built.

    kv_layout           what this rank keeps of a token in each layer's KV cache
    kv_bytes_per_token  bytes of KV cache per token, on this rank and stage
    vocab_starts        [tp size + 1]: rank i holds the vocabulary rows [vocab_starts[i], vocab_starts[i + 1])
    vocab_range         (start, stop) of this rank
    parameter_bytes     bytes of parameters on this rank and stage, shared ones counted once

    Built on the meta device, it says what it would take. Raises ValueError where tp does not fit the model.
    """

    def __init__(
        self,
        c: ModelConfig,
        layers: range,
        tp: "Group",
        *,
        is_first: bool,
        is_last: bool,
        dtype: torch.dtype,
        device: torch.device,
        expert_parallel: bool = False,
    ):
        super().__init__()
        check_tensor_parallel(c, tp.size, expert_parallel)
        place = Placement(tp, dtype, device, expert_parallel)
        self.config, self.is_first, self.is_last, self.num_layers = c, is_first, is_last, len(layers)
        embedding = VocabEmbedding(c.names.embed, c.vocab_size, c.hidden_size, place) if is_first else None
        self.embed: nn.Module = nn.Identity() if embedding is None else embedding
        self.embed_steps = nn.ModuleList(_embed_steps(c, place) if is_first else [])
        self.layers = nn.ModuleList(_layers(c, layers, place))
        if is_last:
            # Tied weights on two stages are two copies: the last stage then loads its own from the embedding's tensor.
            source = c.names.embed if c.tie_embeddings else c.names.head
            self.norm = make_norm(c.norm, c.names.final_norm, c.hidden_size, c.norm_eps, place)
            self.head = LMHead(source, c.vocab_size, c.hidden_size, embedding if c.tie_embeddings else None, place)
            self.head_steps = nn.Sequential(*_head_steps(c))

        held = split(c.vocab_size, tp.size)
        self.vocab_starts = [interval.start for interval in held] + [c.vocab_size]
        self.vocab_range = (held[tp.index].start, held[tp.index].stop)
        self.kv_layout = c.kv_layout(len(split_heads(c.num_heads, c.num_kv_heads, tp.size)[tp.index].kv))
        self.kv_bytes_per_token = len(layers) * self.kv_layout.numel * dtype.itemsize
        self.parameter_bytes = sum(spec.local_numel * held.itemsize for held, spec in declared(self))

    def pack(self) -> None:
        """Once the weights are loaded: keeps each matrix in the form that is fastest here (quant.py)."""
        for layer in self.modules():
            if isinstance(layer, Layer):
                layer.pack()

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        """x: token ids [T] int64 on the first stage, the previous stage's output on the others.

        Returns the residual stream [T, hidden], not normed, on the last stage too.
        """
        return self.decoded(self.embedded(x, ctx), ctx)

    def embedded(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        """The first half of forward: the residual stream before the first layer."""
        residual: Tensor = self.embed(x)
        for step in self.embed_steps:
            residual = step(residual, ctx.positions)
        return residual

    def decoded(self, residual: Tensor, ctx: ForwardContext) -> Tensor:
        """The second half: the residual stream after the last layer."""
        pending: Tensor | None = None
        for layer in self.layers:
            pending, residual = layer(pending, residual, ctx)
        assert pending is not None, "a stage has at least one layer"
        return residual + pending

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [rows, hidden], rows of the last stage's output -> [rows, local vocabulary], this rank's shard."""
        return self.head_steps(self.head(self.norm(hidden)))


def _layers(c: ModelConfig, layers: range, place: Placement) -> Iterator[DecoderLayer]:
    kind = ParallelLayer if c.residual == "parallel" else DecoderLayer
    tables: dict[RopeConfig | None, Rotary] = {}  # shared by the layers that rotate alike
    for local, layer in enumerate(layers):
        rope = c.rope_of(layer)
        if rope not in tables:
            tables[rope] = Rotary(rope, c.max_position, place.device)
        yield kind(c, layer, local, tables[rope], place)


def _embed_steps(c: ModelConfig, place: Placement) -> Iterator[nn.Module]:
    """What the embeddings go through, given the positions as well."""
    if c.embed_scale != 1.0:
        yield EmbedScale(c.embed_scale, place.dtype)
    if c.positions is not None:
        table = c.positions
        yield LearnedPositions(c.names.positions, c.max_position, table.rows, table.skipped, c.hidden_size, place)


def _head_steps(c: ModelConfig) -> Iterator[nn.Module]:
    if c.logit_scale != 1.0:
        yield Scale(c.logit_scale)
    if c.logit_soft_cap:
        yield SoftCap(c.logit_soft_cap)
