"""GLM-4.5, 4.6: Llama with part of a head rotated, and experts chosen as DeepSeek-V3 does behind its first layers."""

from dataclasses import replace

from infer.models.config import ModelConfig, decoder_config
from infer.models.fields import Fields
from infer.models.moe_config import MoeConfig, MoeNames, read_experts, read_grouping


def read_glm4_moe(f: Fields) -> ModelConfig:
    """The layers behind the last that predict further tokens (num_nextn_predict_layers) are not read."""
    c = decoder_config(
        f, num_kv_heads=8, partial_rotary=0.5, norm_eps=1e-5, qkv_bias=f.flag("attention_bias", False),
        qk_norm="head" if f.flag("use_qk_norm", False) else "none",
    )  # fmt: skip
    num_experts, top_k = read_experts(f, "n_routed_experts")
    size, first = f.count("moe_intermediate_size"), f.get("first_k_dense_replace")
    first = 1 if first is None else first
    if isinstance(first, bool) or not isinstance(first, int) or not 0 <= first < c.num_layers:
        raise f.error("first_k_dense_replace", f"must be an integer from 0 to {c.num_layers - 1}")
    moe = MoeConfig(
        num_experts=num_experts, top_k=top_k, intermediate_size=size,
        sparse=tuple(layer >= first for layer in range(c.num_layers)),
        shared_intermediate_size=size * f.count("n_shared_experts", 1), scoring="sigmoid", correction_bias=True,
        renormalize=f.flag("norm_topk_prob", True), scaling=f.number("routed_scaling_factor", 1.0),
        grouping=read_grouping(f, num_experts, top_k, "top2"), names=MoeNames(shared="shared_experts"),
    )  # fmt: skip
    return replace(c, moe=moe)
