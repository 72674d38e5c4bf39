"""Recipes of the families that every layout test runs, with every sampling parameter."""

from recipes import WINDOW, Recipe

RECIPES = {
    "llama": Recipe(
        "Llama",
        {
            "hidden_size": 72, "num_hidden_layers": 5, "num_attention_heads": 9, "num_key_value_heads": 3,
            "intermediate_size": 101, "tie_word_embeddings": True,
        },
    ),
    "llama31": Recipe(
        "Llama",
        {
            "hidden_size": 80, "num_hidden_layers": 6, "num_attention_heads": 5, "num_key_value_heads": 1,
            "intermediate_size": 130, "tie_word_embeddings": False,
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
            },
        },
        max_shard_size="300KB",
    ),
    "mistral": Recipe(
        "Mistral",
        {
            "hidden_size": 72, "num_hidden_layers": 5, "num_attention_heads": 6, "num_key_value_heads": 2,
            "intermediate_size": 96, "tie_word_embeddings": False, "sliding_window": WINDOW,
        },
    ),
    "qwen2": Recipe(
        "Qwen2",
        {
            "hidden_size": 64, "num_hidden_layers": 5, "num_attention_heads": 4, "num_key_value_heads": 2,
            "intermediate_size": 89, "tie_word_embeddings": True, "use_sliding_window": False,
        },
    ),
    "qwen3": Recipe(
        "Qwen3",
        {
            "hidden_size": 60, "num_hidden_layers": 6, "num_attention_heads": 7, "num_key_value_heads": 7,
            "head_dim": 16, "intermediate_size": 75, "tie_word_embeddings": False,
        },
    ),
}  # fmt: skip
