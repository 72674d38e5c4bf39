"""DeepSeek-V2 and V3: multi-head latent attention, and experts that are chosen within groups."""

import dataclasses
import math

from infer.models.config import ModelConfig, decoder_config
from infer.models.fields import Fields
from infer.models.mla_config import MlaConfig
from infer.models.moe_config import MoeConfig, MoeNames, read_experts, read_grouping
from infer.models.rope import RopeConfig


def read_deepseek_v2(f: Fields) -> ModelConfig:
    grouped = f.choice("topk_method", ("greedy", "group_limited_greedy"), "greedy") == "group_limited_greedy"
    f.choice("scoring_func", ("softmax",), "softmax")
    if f.flag("norm_topk_prob", False):
        raise f.error("norm_topk_prob", "must be false: no DeepSeek-V2 divides its experts' weights by their sum")
    moe = _experts(f, scaling=1.0, num_dense=0, num_shared=2)
    grouping = read_grouping(f, moe.num_experts, moe.top_k, "max") if grouped else None
    return _decoder(f, dataclasses.replace(moe, grouping=grouping), interleaved=True)


def read_deepseek_v3(f: Fields) -> ModelConfig:
    """The layers behind the last that predict further tokens (num_nextn_predict_layers) are not read."""
    f.choice("topk_method", ("noaux_tc",), "noaux_tc")
    f.choice("scoring_func", ("sigmoid",), "sigmoid")
    moe = _experts(f, scaling=2.5, num_dense=3, num_shared=1)
    moe = dataclasses.replace(
        moe,
        scoring="sigmoid",
        correction_bias=True,
        renormalize=f.flag("norm_topk_prob", True),
        grouping=read_grouping(f, moe.num_experts, moe.top_k, "top2", default=(8, 4)),
    )
    return _decoder(f, moe, interleaved=f.flag("rope_interleave", True))


def _decoder(f: Fields, moe: MoeConfig, interleaved: bool) -> ModelConfig:
    nope, rope_dim, value = (f.count(name) for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    if f.count("head_dim", rope_dim) != rope_dim:
        raise f.error("head_dim", f"must be qk_rope_head_dim ({rope_dim}), the rotated part of a head, or absent")
    bias = f.flag("attention_bias", False)
    f.refuse("mlp_bias", False)
    c = decoder_config(f, head_dim=rope_dim, qkv_bias=bias, o_bias=bias)
    assert c.rope is not None, "the shared reader was asked for one"
    mla = MlaConfig(
        q_lora_rank=0 if f.get("q_lora_rank") is None else f.count("q_lora_rank"),
        kv_lora_rank=f.count("kv_lora_rank"),
        qk_nope_head_dim=nope,
        qk_rope_head_dim=rope_dim,
        v_head_dim=value,
        softmax_scale=_softmax_scale(c.rope, nope + rope_dim),
    )
    return dataclasses.replace(
        c,
        num_kv_heads=1,  # the latent: config.json has the number that keys and values are expanded to
        head_dim=mla.qk_head_dim,
        rope=dataclasses.replace(c.rope, interleaved=interleaved),
        mla=mla,
        moe=moe if any(moe.sparse) else None,
    )


def _softmax_scale(rope: RopeConfig, qk_head_dim: int) -> float:
    """YaRN's sharpening of the softmax for long contexts goes by mscale_all_dim, over all dimensions of a head; what
    is left for cosines and sines (mscale / mscale_all_dim) is in the rotary table."""
    growth = 1.0
    if rope.type == "yarn" and rope.mscale_all_dim and rope.factor > 1:
        growth = 0.1 * rope.mscale_all_dim * math.log(rope.factor) + 1.0
    return qk_head_dim**-0.5 * growth**2


def _experts(f: Fields, scaling: float, num_dense: int, num_shared: int) -> MoeConfig:
    """What both versions share. The arguments are each version's own where config.json has none: the factor of routed
    experts, layers without experts at the beginning, shared experts."""
    num_experts, top_k = read_experts(f, "n_routed_experts")
    size, every = f.count("moe_intermediate_size"), f.count("moe_layer_freq", 1)
    first = num_dense if (given := f.get("first_k_dense_replace")) is None else given
    if isinstance(first, bool) or not isinstance(first, int) or first < 0:
        raise f.error("first_k_dense_replace", "must be an integer of at least 0")
    return MoeConfig(
        num_experts=num_experts,
        top_k=top_k,
        intermediate_size=size,
        sparse=tuple(layer >= first and layer % every == 0 for layer in range(f.count("num_hidden_layers"))),
        shared_intermediate_size=size * f.count("n_shared_experts", num_shared),
        scaling=f.number("routed_scaling_factor", scaling),
        names=MoeNames(shared="shared_experts"),
    )
