"""OPT: layer norms, learned positions, a plain MLP with relu. The 350m model is built otherwise, and is refused."""

from dataclasses import replace

from infer.models.config import ModelConfig, PositionTable, decoder_config
from infer.models.fields import Fields
from infer.models.names import Names

NAMES = Names(
    embed="model.decoder.embed_tokens",
    positions="model.decoder.embed_positions",
    final_norm="model.decoder.final_layer_norm",
    layer="model.decoder.layers.{layer}",
    attention_norm="self_attn_layer_norm",
    o="self_attn.out_proj",
    ffn_norm="final_layer_norm",
    up="fc1",
    down="fc2",
)
SKIPPED_POSITIONS = 2  # rows of the table before that of the first token, whatever the config says


def read_opt(f: Fields) -> ModelConfig:
    f = f.renamed(intermediate_size="ffn_dim", hidden_act="activation_function")
    f.refuse("do_layer_norm_before", True)
    f.refuse("_remove_final_layer_norm", False)
    f.refuse("layer_norm_elementwise_affine", True)
    f.refuse("word_embed_proj_dim", f.count("hidden_size"))
    bias = f.flag("enable_bias", True)
    c = decoder_config(
        f, has_rope=False, norm_eps=1e-5, activation="relu", gated_mlp=False, tie_embeddings=True, qkv_bias=bias,
        o_bias=bias, mlp_bias=bias,
    )  # fmt: skip
    table = PositionTable(c.max_position + SKIPPED_POSITIONS, SKIPPED_POSITIONS)
    return replace(c, norm="layer", positions=table, names=NAMES)
