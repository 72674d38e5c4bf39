"""Llama 2, 3 and 3.1, and what took over their architecture: SmolLM2, TinyLlama, Yi, and many more."""

from infer.models.config import ModelConfig, decoder_config
from infer.models.fields import Fields


def read_llama(f: Fields) -> ModelConfig:
    bias = f.flag("attention_bias", False)
    return decoder_config(f, qkv_bias=bias, o_bias=bias, mlp_bias=f.flag("mlp_bias", False))
