"""Mistral: Llama with a sliding window over every layer (null in most later checkpoints)."""

from infer.models.config import ModelConfig, decoder_config
from infer.models.fields import Fields


def read_mistral(f: Fields) -> ModelConfig:
    # A null window is none; an absent one is the 4096 of the first Mistral, as its own code has it.
    disabled = "sliding_window" in f.data and f.get("sliding_window") is None
    window = 0 if disabled else f.count("sliding_window", 4096)
    return decoder_config(f, num_kv_heads=8, window=(window,) * f.count("num_hidden_layers"))
