"""OLMo 2 and 3: norms after the blocks alone, and of q and k over all heads; OLMo 3 has windows, too."""

from dataclasses import replace

from infer.models.config import ModelConfig, alternating_windows, decoder_config, sliding_window
from infer.models.fields import Fields
from infer.models.names import Names
from infer.models.rope import read_two_ropes

NAMES = Names(attention_out_norm="post_attention_layernorm", ffn_out_norm="post_feedforward_layernorm")


def read_olmo2(f: Fields) -> ModelConfig:
    return _decoder(f)


def read_olmo3(f: Fields) -> ModelConfig:
    """Every fourth layer sees all, the others a window; scaling stretches the former's rotation alone."""
    c = _decoder(f, window=alternating_windows(f, sliding_window(f), every=4), has_rope=False)
    theta = f.section("rope_parameters").number("rope_theta", 500000.0)
    rope, local_rope = read_two_ropes(f, c.head_dim, c.max_position, theta=theta, local_theta=theta)
    return replace(c, rope=rope, local_rope=local_rope)


def _decoder(f: Fields, window: tuple[int, ...] | None = None, has_rope: bool = True) -> ModelConfig:
    bias = f.flag("attention_bias", False)
    c = decoder_config(
        f, window=window, has_rope=has_rope, norm_eps=1e-5, qkv_bias=bias, o_bias=bias, qk_norm="all"
    )
    return replace(c, residual="post", names=NAMES)
