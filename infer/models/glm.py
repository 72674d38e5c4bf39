"""GLM-4, and GLM-4-0414 with norms around its blocks: half of a head rotated, by neighbours."""

from dataclasses import replace

from infer.models.config import ModelConfig, decoder_config
from infer.models.fields import Fields
from infer.models.names import Names

GLM = Names(gate_up="mlp.gate_up_proj")
GLM4 = replace(GLM, attention_out_norm="post_self_attn_layernorm", ffn_out_norm="post_mlp_layernorm")


def read_glm(f: Fields) -> ModelConfig:
    c = decoder_config(
        f, num_kv_heads=2, head_dim=128, partial_rotary=0.5, norm_eps=1.5625e-7,
        qkv_bias=f.flag("attention_bias", True),
    )  # fmt: skip
    assert c.rope is not None
    return replace(c, rope=replace(c.rope, interleaved=True), names=GLM)


def read_glm4(f: Fields) -> ModelConfig:
    return replace(read_glm(f), residual="sandwich", names=GLM4)
