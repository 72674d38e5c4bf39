"""Recipes of families with multi-head latent attention."""

from dataclasses import replace

from recipes import Recipe

_HEADS = {
    "hidden_size": 60, "num_hidden_layers": 5, "num_attention_heads": 5, "num_key_value_heads": 5, "kv_lora_rank": 20,
    "qk_nope_head_dim": 12, "qk_rope_head_dim": 6, "v_head_dim": 10, "intermediate_size": 77,
    "tie_word_embeddings": False,
}  # fmt: skip
_YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 64,
    "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 0.7,
}  # fmt: skip

SPLIT_EXPERTS = {
    # As V2-Lite: queries from the hidden state, any expert may be chosen.
    "deepseek_v2_lite": Recipe(
        "DeepseekV2",
        {
            **_HEADS, "q_lora_rank": None, "n_routed_experts": 7, "num_experts_per_tok": 3, "n_shared_experts": 2,
            "moe_intermediate_size": 19, "first_k_dense_replace": 1, "topk_method": "greedy",
            "rope_parameters": _YARN,
        },
    ),
    # As V2: experts within the best of some groups.
    "deepseek_v2": Recipe(
        "DeepseekV2",
        {
            **_HEADS, "q_lora_rank": 28, "n_routed_experts": 9, "num_experts_per_tok": 3, "n_shared_experts": 1,
            "moe_intermediate_size": 17, "first_k_dense_replace": 2, "topk_method": "group_limited_greedy",
            "n_group": 3, "topk_group": 2, "routed_scaling_factor": 4.0,
        },
    ),
    "deepseek_v3": Recipe(
        "DeepseekV3",
        {
            **_HEADS, "q_lora_rank": 28, "n_routed_experts": 16, "num_experts_per_tok": 3, "n_shared_experts": 1,
            "moe_intermediate_size": 17, "first_k_dense_replace": 1, "n_group": 4, "topk_group": 2,
            "routed_scaling_factor": 2.5, "attention_bias": True, "rope_parameters": _YARN,
        },
    ),
    # Without experts, and with its rotated dimensions in halves.
    "deepseek_v3_dense": Recipe(
        "DeepseekV3",
        {
            **_HEADS, "q_lora_rank": 28, "n_routed_experts": 4, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1,
            "first_k_dense_replace": 5, "rope_interleave": False,
        },
    ),
}  # fmt: skip

# Nine experts over two ranks, sixteen over three: uneven.
WHOLE_EXPERTS = {
    f"{name}_ep": replace(SPLIT_EXPERTS[name], engine={"enable_expert_parallel": True})
    for name in ("deepseek_v2", "deepseek_v3")
}

RECIPES: dict[str, Recipe] = {**SPLIT_EXPERTS, **WHOLE_EXPERTS}
