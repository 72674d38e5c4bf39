"""Gemma, Gemma 2 and Gemma 3 (text, and the text part of the models that see)."""

from dataclasses import replace
from typing import Any

from infer.models.config import ModelConfig, alternating_windows, current_names, decoder_config, sliding_window
from infer.models.fields import Fields
from infer.models.names import Names
from infer.models.rope import read_two_ropes

SANDWICH = Names(
    attention_out_norm="post_attention_layernorm",
    ffn_norm="pre_feedforward_layernorm",
    ffn_out_norm="post_feedforward_layernorm",
)
# What Gemma 3's own code has where a text_config is silent; those on the Hub are.
GEMMA3_TEXT: dict[str, Any] = {
    "vocab_size": 262208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131072,
}


def read_gemma(f: Fields) -> ModelConfig:
    """Its first configs say "gelu" and mean the tanh form, as its own code takes them."""
    c = _decoder(f)
    return replace(c, activation="gelu_tanh" if c.activation == "gelu" else c.activation)


def read_gemma2(f: Fields) -> ModelConfig:
    """Every second layer sees all, the others a window."""
    return _sandwich(_decoder(f.renamed(hidden_act="hidden_activation"), every=2), f, caps=(50.0, 30.0))


def read_gemma3(f: Fields) -> ModelConfig:
    """Every sixth layer sees all, the others a window; those rotate by a table of their own, never stretched."""
    every = f.count("sliding_window_pattern", 6)
    c = _decoder(f.renamed(hidden_act="hidden_activation"), every=every, has_rope=False)
    local_theta = f.number("rope_local_base_freq", 10000.0)
    rope, local_rope = read_two_ropes(f, c.head_dim, c.max_position, theta=1e6, local_theta=local_theta)
    return replace(_sandwich(c, f, caps=(0.0, 0.0)), qk_norm="head", rope=rope, local_rope=local_rope)


def read_gemma3_text_part(f: Fields) -> ModelConfig:
    """A model that sees, without its eyes: images are not taken."""
    given = current_names(f.section("text_config").data, f"{f.file}: text_config")
    data = {**GEMMA3_TEXT, **given, "architectures": f.get("architectures")}
    if f.get("tie_word_embeddings") is not None:  # the outer one decides
        data["tie_word_embeddings"] = f.flag("tie_word_embeddings", True)
    return read_gemma3(Fields(f.file, data, "text_config."))


def _decoder(f: Fields, *, every: int = 0, has_rope: bool = True) -> ModelConfig:
    """every: each so-manieth layer sees all, the others a window; 0: all do."""
    f.refuse("use_bidirectional_attention", False)
    bias = f.flag("attention_bias", False)
    window = alternating_windows(f, sliding_window(f), every) if every else None
    c = decoder_config(
        f, head_dim=256, window=window, has_rope=has_rope, activation="gelu_pytorch_tanh", tie_embeddings=True,
        qkv_bias=bias, o_bias=bias,
    )  # fmt: skip
    return replace(c, norm="rms_plus_one", embed_scale=c.hidden_size**0.5)


def _sandwich(c: ModelConfig, f: Fields, caps: tuple[float, float]) -> ModelConfig:
    """caps: the soft caps on attention scores and on logits, where config.json has none; null is none."""
    return replace(
        c,
        residual="sandwich",
        names=SANDWICH,
        attention_scale=f.number("query_pre_attn_scalar", 256) ** -0.5,
        attention_soft_cap=f.number_or_null("attn_logit_softcapping", caps[0]),
        logit_soft_cap=f.number_or_null("final_logit_softcapping", caps[1]),
    )
