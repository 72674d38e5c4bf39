"""Mistral: Llama with a sliding window over every layer (null in most later checkpoints)."""

from infer.models.config import ModelConfig, decoder_config, sliding_window
from infer.models.fields import Fields


def read_mistral(f: Fields) -> ModelConfig:
    return decoder_config(f, num_kv_heads=8, window=(sliding_window(f),) * f.count("num_hidden_layers"))
