"""StarCoder 2: layer norms and a plain MLP, otherwise as Mistral."""

from dataclasses import replace

from infer.models.config import ModelConfig, decoder_config
from infer.models.fields import Fields
from infer.models.names import Names


def read_starcoder2(f: Fields) -> ModelConfig:
    bias = f.flag("use_bias", True)
    size = f.count("sliding_window") if f.get("sliding_window") is not None else 0
    c = decoder_config(
        f.renamed(rms_norm_eps="norm_epsilon"), num_kv_heads=2, window=(size,) * f.count("num_hidden_layers"),
        norm_eps=1e-5, activation="gelu_pytorch_tanh", gated_mlp=False, tie_embeddings=True, qkv_bias=bias,
        o_bias=bias, mlp_bias=bias,
    )  # fmt: skip
    return replace(c, norm="layer", names=Names(up="mlp.c_fc", down="mlp.c_proj"))
