"""One pipeline stage of a decoder: some of its layers, the embedding before the first and the head after the last."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from infer.layers.attention import Attention, ForwardContext
from infer.layers.declare import Placement, declared
from infer.layers.ffn import MLP
from infer.layers.linear import MatrixLayer
from infer.layers.norm import RMSNorm
from infer.layers.rotary import Rotary
from infer.layers.vocab import LMHead, VocabEmbedding
from infer.models.config import ModelConfig
from infer.parallel.placement import balanced_layers, check_tensor_parallel, split, split_heads

if TYPE_CHECKING:
    from infer.parallel.groups import Group

__all__ = ["DecoderLayer", "Stage", "balanced_layers"]


class DecoderLayer(nn.Module):
    """Attention and feed-forward, each behind a norm. layer: its number in the model; local: in this stage."""

    def __init__(self, c: ModelConfig, layer: int, local: int, rotary: Rotary, place: Placement):
        super().__init__()
        prefix = f"model.layers.{layer}"
        self.attention_norm = RMSNorm(f"{prefix}.input_layernorm", c.hidden_size, c.norm_eps, place)
        self.attention = Attention(f"{prefix}.self_attn", c, layer, local, rotary, place)
        self.ffn_norm = RMSNorm(f"{prefix}.post_attention_layernorm", c.hidden_size, c.norm_eps, place)
        self.ffn = MLP(f"{prefix}.mlp", c, place)

    def forward(self, pending: Tensor | None, residual: Tensor, ctx: ForwardContext) -> tuple[Tensor, Tensor]:
        """(pending, residual), both [T, hidden], -> the same after this layer.

        The residual stream is residual + pending; the addition waits for the next norm, which does both at once.
        """
        x, residual = self.attention_norm.add(pending, residual)
        x, residual = self.ffn_norm.add(self.attention(x, ctx), residual)
        return self.ffn(x), residual


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
    ):
        super().__init__()
        check_tensor_parallel(c, tp.size)
        place = Placement(tp, dtype, device)
        self.config, self.is_first, self.is_last, self.num_layers = c, is_first, is_last, len(layers)
        embedding = VocabEmbedding("model.embed_tokens", c.vocab_size, c.hidden_size, place) if is_first else None
        self.embed: nn.Module = nn.Identity() if embedding is None else embedding
        rotary = Rotary(c.rope, c.max_position, device)
        self.layers = nn.ModuleList(DecoderLayer(c, layer, local, rotary, place) for local, layer in enumerate(layers))
        if is_last:
            # Tied weights on two stages are two copies: the last stage then loads its own from the embedding's tensor.
            source = "model.embed_tokens" if c.tie_embeddings else "lm_head"
            self.norm = RMSNorm("model.norm", c.hidden_size, c.norm_eps, place)
            self.head = LMHead(source, c.vocab_size, c.hidden_size, embedding if c.tie_embeddings else None, place)

        held = split(c.vocab_size, tp.size)
        self.vocab_starts = [interval.start for interval in held] + [c.vocab_size]
        self.vocab_range = (held[tp.index].start, held[tp.index].stop)
        self.kv_layout = c.kv_layout(len(split_heads(c.num_heads, c.num_kv_heads, tp.size)[tp.index].kv))
        self.kv_bytes_per_token = len(layers) * self.kv_layout.numel * dtype.itemsize
        self.parameter_bytes = sum(spec.local_numel * dtype.itemsize for _, spec in declared(self))

    def pack(self) -> None:
        """Once the weights are loaded: keeps each matrix in the form that is fastest here (quant.py)."""
        for layer in self.modules():
            if isinstance(layer, MatrixLayer) and "weight" in layer.specs:
                layer.pack()

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        """x: token ids [T] int64 on the first stage, the previous stage's output on the others.

        Returns the residual stream [T, hidden], not normed, on the last stage too.
        """
        residual: Tensor = self.embed(x)
        pending: Tensor | None = None
        for layer in self.layers:
            pending, residual = layer(pending, residual, ctx)
        assert pending is not None, "a stage has at least one layer"
        return residual + pending

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [rows, hidden], rows of the last stage's output -> [rows, local vocabulary], this rank's shard."""
        return self.head(self.norm(hidden))
