"""Mixtral: Mistral with a mixture of experts in every layer (Jiang et al., 2024)."""

import dataclasses

from infer.models.config import ModelConfig, decoder_config
from infer.models.fields import Fields
from infer.models.moe_config import MoeConfig, MoeNames, read_experts

NAMES = MoeNames(block="block_sparse_moe", gate="w1", up="w3", down="w2")


def read_mixtral(f: Fields) -> ModelConfig:
    # Unlike Mistral's, an absent sliding window is none.
    size = f.count("sliding_window") if f.get("sliding_window") is not None else 0
    c = decoder_config(f, num_kv_heads=8, window=(size,) * f.count("num_hidden_layers"), rope_theta=1e6, norm_eps=1e-5)
    num_experts, top_k = read_experts(f, "num_local_experts")
    moe = MoeConfig(
        num_experts=num_experts, top_k=top_k, intermediate_size=c.intermediate_size, sparse=(True,) * c.num_layers,
        renormalize=True, names=NAMES,
    )  # fmt: skip
    return dataclasses.replace(c, moe=moe)
