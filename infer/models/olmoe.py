"""OLMoE: Llama with norms over the whole of q and k, and experts in every layer (Muennighoff et al., 2024)."""

import dataclasses

from infer.models.config import ModelConfig, decoder_config
from infer.models.fields import Fields
from infer.models.moe_config import MoeConfig, read_experts


def read_olmoe(f: Fields) -> ModelConfig:
    if f.get("clip_qkv") is not None:
        raise f.error("clip_qkv", "must be null: clipped projections are not supported")
    bias = f.flag("attention_bias", False)
    c = decoder_config(f, norm_eps=1e-5, qkv_bias=bias, o_bias=bias, qk_norm="all")
    num_experts, top_k = read_experts(f, "num_experts")
    moe = MoeConfig(
        num_experts=num_experts, top_k=top_k, intermediate_size=c.intermediate_size, sparse=(True,) * c.num_layers,
        renormalize=f.flag("norm_topk_prob", False),
    )  # fmt: skip
    return dataclasses.replace(c, moe=moe)
