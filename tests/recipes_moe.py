"""Recipes of mixture-of-experts families. Three experts share out unevenly over two ranks."""

from dataclasses import replace

from recipes import WINDOW, Recipe

SPLIT_EXPERTS = {
    "glm4_moe": Recipe(
        "Glm4Moe",
        {
            "hidden_size": 72, "num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 2,
            "head_dim": 16, "intermediate_size": 83, "moe_intermediate_size": 22, "n_routed_experts": 10,
            "num_experts_per_tok": 3, "n_shared_experts": 2, "n_group": 5, "topk_group": 2, "first_k_dense_replace": 1,
            "routed_scaling_factor": 1.7, "attention_bias": True, "use_qk_norm": True, "tie_word_embeddings": False,
            "partial_rotary_factor": 0.5,
        },
    ),
    "mixtral": Recipe(
        "Mixtral",
        {
            "hidden_size": 72, "num_hidden_layers": 4, "num_attention_heads": 9, "num_key_value_heads": 3,
            "intermediate_size": 53, "num_local_experts": 3, "num_experts_per_tok": 2, "tie_word_embeddings": False,
        },
        max_shard_size="300KB",
    ),
    "olmoe": Recipe(
        "Olmoe",
        {
            "hidden_size": 56, "num_hidden_layers": 4, "num_attention_heads": 7, "num_key_value_heads": 7,
            "intermediate_size": 30, "num_experts": 6, "num_experts_per_tok": 4, "norm_topk_prob": False,
            "tie_word_embeddings": False,
        },
    ),
    "qwen2_moe": Recipe(
        "Qwen2Moe",
        {
            "hidden_size": 64, "num_hidden_layers": 5, "num_attention_heads": 4, "num_key_value_heads": 2,
            "intermediate_size": 89, "moe_intermediate_size": 37, "shared_expert_intermediate_size": 51,
            "num_experts": 7, "num_experts_per_tok": 3, "norm_topk_prob": False, "decoder_sparse_step": 2,
            "mlp_only_layers": [1], "tie_word_embeddings": False,
            "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 3,
        },
    ),
    "qwen3_moe": Recipe(
        "Qwen3Moe",
        {
            "hidden_size": 60, "num_hidden_layers": 4, "num_attention_heads": 5, "num_key_value_heads": 5,
            "head_dim": 16, "intermediate_size": 75, "moe_intermediate_size": 24, "num_experts": 5,
            "num_experts_per_tok": 2, "norm_topk_prob": True, "mlp_only_layers": [0], "tie_word_embeddings": True,
        },
    ),
}  # fmt: skip

# Of those whose experts share out unevenly or stand beside a shared one; test_moe.py tries all of them.
WHOLE_EXPERTS = {
    f"{name}_ep": replace(SPLIT_EXPERTS[name], engine={"enable_expert_parallel": True})
    for name in ("glm4_moe", "mixtral", "qwen2_moe")
}

RECIPES: dict[str, Recipe] = {**SPLIT_EXPERTS, **WHOLE_EXPERTS}
