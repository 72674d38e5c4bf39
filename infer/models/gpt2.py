"""GPT-2: layer norms, learned positions, a plain MLP, and matrices stored as [in, out]."""

from dataclasses import replace

from infer.models.config import ModelConfig, PositionTable, decoder_config
from infer.models.fields import Fields
from infer.models.names import Names

NAMES = Names(
    embed="transformer.wte",
    positions="transformer.wpe",
    final_norm="transformer.ln_f",
    layer="transformer.h.{layer}",
    attention_norm="ln_1",
    qkv="attn.c_attn",
    o="attn.c_proj",
    ffn_norm="ln_2",
    up="mlp.c_fc",
    down="mlp.c_proj",
    transposed=True,
)


def read_gpt2(f: Fields) -> ModelConfig:
    f = f.renamed(
        hidden_size="n_embd", num_hidden_layers="n_layer", num_attention_heads="n_head", intermediate_size="n_inner",
        max_position_embeddings="n_positions", hidden_act="activation_function", rms_norm_eps="layer_norm_epsilon",
    )  # fmt: skip
    f.refuse("scale_attn_by_inverse_layer_idx", False)
    f.refuse("add_cross_attention", False)
    c = decoder_config(
        f, has_rope=False, norm_eps=1e-5, activation="gelu_new", gated_mlp=False, tie_embeddings=True,
        intermediate_size=4 * f.count("hidden_size"), qkv_bias=True, o_bias=True, mlp_bias=True,
    )  # fmt: skip
    scale = None if f.flag("scale_attn_weights", True) else 1.0
    return replace(c, norm="layer", positions=PositionTable(c.max_position), attention_scale=scale, names=NAMES)
