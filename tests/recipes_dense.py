"""Recipes of the dense families beyond the core ones."""

from recipes import PAD, WINDOW, Recipe

NINE_HEADS = {"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 101}
FIVE_HEADS = {"hidden_size": 80, "num_attention_heads": 5, "num_key_value_heads": 1, "intermediate_size": 90}
GEMMA = {"num_hidden_layers": 5, "tie_word_embeddings": True, "pad_token_id": PAD, "sliding_window": WINDOW}
LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 32}

RECIPES: dict[str, Recipe] = {
    "llama-dynamic": Recipe(  # served at no more than its trained length
        "Llama",
        {
            **FIVE_HEADS, "num_hidden_layers": 4,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1000.0, "factor": 4.0},
        },
    ),
    "gemma": Recipe(
        "Gemma",
        {**NINE_HEADS, "num_hidden_layers": 4, "head_dim": 16, "tie_word_embeddings": True, "pad_token_id": PAD},
        norm_mean=0.0,
    ),
    "gemma2": Recipe(
        "Gemma2",
        {
            **GEMMA, **NINE_HEADS, "head_dim": 16, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 9.0,
        },
        norm_mean=0.0,
    ),
    "gemma3": Recipe(
        "Gemma3",
        {
            **GEMMA, **FIVE_HEADS, "head_dim": 18, "num_hidden_layers": 7, "query_pre_attn_scalar": 11,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
        norm_mean=0.0,
        config_class="Gemma3TextConfig",
    ),
    "glm": Recipe(
        "Glm",
        {**NINE_HEADS, "num_hidden_layers": 4, "head_dim": 12, "tie_word_embeddings": False, "pad_token_id": PAD},
    ),
    "glm4": Recipe(
        "Glm4",
        {**NINE_HEADS, "num_hidden_layers": 4, "head_dim": 12, "tie_word_embeddings": False, "pad_token_id": PAD},
    ),
    "gpt2": Recipe(
        "GPT2",
        {"n_embd": 70, "n_head": 7, "n_layer": 4, "n_inner": 150, "pad_token_id": PAD},
        model_class="GPT2LMHeadModel",
    ),
    "gpt-neox": Recipe(
        "GPTNeoX",
        {
            "hidden_size": 80, "num_attention_heads": 5, "num_hidden_layers": 4, "intermediate_size": 131,
            "tie_word_embeddings": False,
        },
    ),
    "gpt-neox-sequential": Recipe(
        "GPTNeoX",
        {
            "hidden_size": 72, "num_attention_heads": 3, "num_hidden_layers": 4, "intermediate_size": 70,
            "tie_word_embeddings": False, "use_parallel_residual": False, "attention_bias": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5},
        },
    ),
    "granite": Recipe(
        "Granite",
        {
            **NINE_HEADS, "num_hidden_layers": 5, "tie_word_embeddings": True, "embedding_multiplier": 1.7,
            "attention_multiplier": 0.21, "residual_multiplier": 0.6, "logits_scaling": 0.7,
        },
    ),
    "olmo2": Recipe("Olmo2", {**NINE_HEADS, "num_hidden_layers": 4, "pad_token_id": PAD}),
    "olmo2-one-kv": Recipe("Olmo2", {**FIVE_HEADS, "num_hidden_layers": 4, "pad_token_id": PAD}),
    "olmo3": Recipe(
        "Olmo3",
        {
            **NINE_HEADS, "num_hidden_layers": 5, "pad_token_id": PAD, "sliding_window": WINDOW,
            "rope_parameters": {
                "full_attention": {
                    "rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 128,
                },
                "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            },
        },
    ),
    "opt": Recipe(
        "OPT",
        {
            "hidden_size": 70, "num_attention_heads": 5, "num_hidden_layers": 4, "ffn_dim": 111, "pad_token_id": PAD,
            "init_std": 0.2, "word_embed_proj_dim": 70,
        },
    ),
    "phi3": Recipe(
        "Phi3",
        {
            **NINE_HEADS, "hidden_size": 144, "num_hidden_layers": 4, "pad_token_id": PAD, "sliding_window": WINDOW,
            "partial_rotary_factor": 0.75,
        },
    ),
    "phi3-longrope": Recipe(
        "Phi3",
        {
            **FIVE_HEADS, "num_hidden_layers": 4, "pad_token_id": PAD, "original_max_position_embeddings": 32,
            "rope_parameters": {
                **LONG, "short_factor": [1.0 + i / 8 for i in range(8)],
                "long_factor": [1.5 + i / 2 for i in range(8)],
            },
        },
    ),
    "smollm3": Recipe(
        "SmolLM3",
        {
            **NINE_HEADS, "num_hidden_layers": 5, "pad_token_id": PAD, "no_rope_layer_interval": 2,
            "tie_word_embeddings": True,
        },
    ),
    "starcoder2": Recipe(
        "Starcoder2",
        {**NINE_HEADS, "num_hidden_layers": 4, "sliding_window": WINDOW, "tie_word_embeddings": True},
    ),
}  # fmt: skip
