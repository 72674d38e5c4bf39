"""Qwen 1.5, 2 and 3 with a mixture of experts: their dense models, with experts in some layers or in all."""

import dataclasses

from infer.models.config import ModelConfig, decoder_config, layer_windows, sliding_window
from infer.models.fields import Fields
from infer.models.moe_config import MoeConfig, read_experts
from infer.models.qwen import within_trained_length


def read_qwen2_moe(f: Fields) -> ModelConfig:
    c = decoder_config(f, window=_alternating_window(f), qkv_bias=f.flag("qkv_bias", True))
    moe = _experts(f, c.num_layers)
    moe = dataclasses.replace(
        moe, shared_intermediate_size=f.count("shared_expert_intermediate_size"), shared_gated=True
    )
    return dataclasses.replace(c, moe=moe)


def read_qwen3_moe(f: Fields) -> ModelConfig:
    size = sliding_window(f) if f.flag("use_sliding_window", False) else 0
    bias = f.flag("attention_bias", False)
    c = decoder_config(f, window=(size,) * f.count("num_hidden_layers"), qkv_bias=bias, o_bias=bias, qk_norm="head")
    return within_trained_length(f, dataclasses.replace(c, moe=_experts(f, c.num_layers)))


def _experts(f: Fields, num_layers: int) -> MoeConfig:
    # Later versions of transformers write the number of Qwen 3's experts under the name that Mixtral has for it.
    name = "num_experts"
    if f.get(name) is None and f.get("num_local_experts") is not None:
        name = "num_local_experts"
    num_experts, top_k = read_experts(f, name)
    return MoeConfig(
        num_experts=num_experts, top_k=top_k, intermediate_size=f.count("moe_intermediate_size"),
        sparse=_sparse_layers(f, num_layers), renormalize=f.flag("norm_topk_prob", False),
    )  # fmt: skip


def _sparse_layers(f: Fields, num_layers: int) -> tuple[bool, ...]:
    """Every decoder_sparse_step-th layer, those of mlp_only_layers aside."""
    step, dense = f.count("decoder_sparse_step", 1), f.get("mlp_only_layers") or []
    if not isinstance(dense, list) or any(type(layer) is not int or not 0 <= layer < num_layers for layer in dense):
        raise f.error("mlp_only_layers", f"must be a list of layers, each from 0 to {num_layers - 1}")
    sparse = tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(num_layers))
    if not any(sparse):
        raise f.error("decoder_sparse_step", f"must leave a layer with experts among {num_layers}")
    return sparse


def _alternating_window(f: Fields) -> tuple[int, ...]:
    """sliding_window counts only with use_sliding_window, and in the layers that layer_types names, else in every
    second one of those before max_window_layers, the first included."""
    num_layers = f.count("num_hidden_layers")
    size = sliding_window(f) if f.flag("use_sliding_window", False) else 0
    before = f.count("max_window_layers", 28)
    return layer_windows(f, size, [size if layer % 2 == 0 and layer < before else 0 for layer in range(num_layers)])
