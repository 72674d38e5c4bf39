"""Qwen 2, 2.5 and 3 (dense): Llama with biases on q, k and v (2), or norms on q and k (3)."""

from dataclasses import replace

from infer.models.config import ModelConfig, decoder_config, layer_windows, sliding_window
from infer.models.fields import Fields


def read_qwen2(f: Fields) -> ModelConfig:
    return within_trained_length(f, decoder_config(f, window=_window(f), qkv_bias=True))


def read_qwen3(f: Fields) -> ModelConfig:
    bias = f.flag("attention_bias", False)
    c = decoder_config(f, head_dim=128, window=_window(f), qkv_bias=bias, o_bias=bias, qk_norm="head")
    return within_trained_length(f, c)


def within_trained_length(f: Fields, c: ModelConfig) -> ModelConfig:
    """Dual chunk attention (Qwen 2.5 1M) is plain attention up to the trained length, which is all there is here."""
    chunks = f.section("dual_chunk_attention_config")
    trained = chunks.count("original_max_position_embeddings", c.max_position)
    return replace(c, max_position=min(c.max_position, trained))


def _window(f: Fields) -> tuple[int, ...]:
    """sliding_window counts only with use_sliding_window, and in the layers that layer_types names, else in those from
    max_window_layers on (the name notwithstanding)."""
    num_layers, first = f.count("num_hidden_layers"), f.get("max_window_layers")
    size = sliding_window(f) if f.flag("use_sliding_window", False) else 0
    first = 28 if first is None else first
    if isinstance(first, bool) or not isinstance(first, int) or first < 0:
        raise f.error("max_window_layers", "must be an integer of at least 0")
    return layer_windows(f, size, [size if layer >= first else 0 for layer in range(num_layers)])
