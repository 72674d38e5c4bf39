"""Phi-3, Phi-3.5 and Phi-4: Llama with fused tensors, part of a head rotated, and LongRoPE."""

from dataclasses import replace

from infer.models.config import ModelConfig, decoder_config
from infer.models.fields import Fields
from infer.models.names import Names

NAMES = Names(qkv="self_attn.qkv_proj", gate_up="mlp.gate_up_proj")


def read_phi3(f: Fields) -> ModelConfig:
    f.section("rope_parameters").refuse("rope_type", "default", "longrope", "su")
    size = f.count("sliding_window") if f.get("sliding_window") is not None else 0
    window = (size,) * f.count("num_hidden_layers")
    return replace(decoder_config(f, window=window, norm_eps=1e-5), names=NAMES)
