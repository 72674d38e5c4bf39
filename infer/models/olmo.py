"""OLMo 2 and 3: norms after the blocks alone, and of q and k over all heads; OLMo 3 has windows, too."""

from dataclasses import replace

from infer.models.config import ModelConfig, decoder_config
from infer.models.fields import Fields
from infer.models.names import Names

NAMES = Names(attention_out_norm="post_attention_layernorm", ffn_out_norm="post_feedforward_layernorm")


def read_olmo2(f: Fields) -> ModelConfig:
    bias = f.flag("attention_bias", False)
    c = decoder_config(f, norm_eps=1e-5, qkv_bias=bias, o_bias=bias, qk_norm="all")
    return replace(c, residual="post", names=NAMES)
