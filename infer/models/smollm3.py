"""SmolLM 3: Llama with layers that do not rotate."""

from dataclasses import replace

from infer.models.config import ModelConfig, decoder_config, layer_windows, sliding_window
from infer.models.fields import Fields


def read_smollm3(f: Fields) -> ModelConfig:
    """no_rope_layers has 1 for a layer that rotates, and 0 for one that does not."""
    num_layers, every = f.count("num_hidden_layers"), f.count("no_rope_layer_interval", 4)
    rotates = f.get("no_rope_layers")
    if rotates is None:
        rotates = [int((layer + 1) % every != 0) for layer in range(num_layers)]
    if not isinstance(rotates, list) or len(rotates) < num_layers or any(turn not in (0, 1) for turn in rotates):
        raise f.error("no_rope_layers", f"must be a list of {num_layers} of 0 and 1")
    nope = frozenset(layer for layer in range(num_layers) if not rotates[layer])
    window = None
    if f.flag("use_sliding_window", False) and f.get("sliding_window") is not None:
        size = sliding_window(f)
        window = layer_windows(f, size, default=[size if layer in nope else 0 for layer in range(num_layers)])
    bias = f.flag("attention_bias", False)
    c = decoder_config(
        f, num_kv_heads=4, window=window, rope_theta=2e6, tie_embeddings=True, qkv_bias=bias, o_bias=bias,
        mlp_bias=f.flag("mlp_bias", False),
    )  # fmt: skip
    return replace(c, nope_layers=nope)
