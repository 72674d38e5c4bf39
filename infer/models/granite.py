"""Granite 3 (dense): Llama with factors on embeddings, attention scores, blocks and logits."""

from dataclasses import replace

from infer.models.config import ModelConfig, decoder_config
from infer.models.fields import Fields


def read_granite(f: Fields) -> ModelConfig:
    bias = f.flag("attention_bias", False)
    return replace(
        decoder_config(f, qkv_bias=bias, o_bias=bias, mlp_bias=f.flag("mlp_bias", False)),
        embed_scale=f.number("embedding_multiplier", 1.0),
        attention_scale=f.number("attention_multiplier", 1.0),
        residual_scale=f.number("residual_multiplier", 1.0),
        logit_scale=1 / f.number("logits_scaling", 1.0),
    )
