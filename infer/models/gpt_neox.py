"""GPT-NeoX (Pythia, GPT-NeoX-20B): layer norms, both blocks side by side, part of a head rotated, q, k and v of each
head in one tensor."""

from dataclasses import replace

from infer.models.config import ModelConfig, decoder_config
from infer.models.fields import Fields
from infer.models.names import Names

NAMES = Names(
    embed="gpt_neox.embed_in",
    final_norm="gpt_neox.final_layer_norm",
    head="embed_out",
    layer="gpt_neox.layers.{layer}",
    qkv="attention.query_key_value",
    qkv_by_head=True,
    o="attention.dense",
    up="mlp.dense_h_to_4h",
    down="mlp.dense_4h_to_h",
)


def read_gpt_neox(f: Fields) -> ModelConfig:
    f.refuse("num_key_value_heads", f.count("num_attention_heads"))
    bias = f.flag("attention_bias", True)
    c = decoder_config(
        f.renamed(rms_norm_eps="layer_norm_eps"), rope_theta=f.number("rotary_emb_base", 10000.0),
        partial_rotary=f.number("rotary_pct", 0.25), norm_eps=1e-5, activation="gelu", gated_mlp=False,
        qkv_bias=bias, o_bias=bias, mlp_bias=True,
    )  # fmt: skip
    parallel = f.flag("use_parallel_residual", True)
    return replace(c, norm="layer", residual="parallel" if parallel else "pre", names=NAMES)
