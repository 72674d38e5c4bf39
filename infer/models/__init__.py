"""The models there are: config.json's architecture -> the reader that turns it into a ModelConfig. No torch here."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infer.models.config import ModelConfig, RopeConfig, load_model_config
from infer.models.deepseek import read_deepseek_v2, read_deepseek_v3
from infer.models.fields import Fields
from infer.models.llama import read_llama
from infer.models.mistral import read_mistral
from infer.models.mixtral import read_mixtral
from infer.models.qwen import read_qwen2, read_qwen3
from infer.models.qwen_moe import read_qwen2_moe, read_qwen3_moe
from infer.models.recognize import unsupported

__all__ = ["FAMILIES", "Family", "ModelConfig", "RopeConfig", "load_model_config", "reader_of"]

Reader = Callable[[Fields], ModelConfig]


@dataclass(frozen=True)
class Family:
    """What is known of an architecture: its reader, and what people want to know of it (`python -m infer.models`).

    read         config.json's fields -> ModelConfig
    models       the models of it, by the names people use
    checkpoints  well-known ones on the Hub, owner/name
    blocks       what it is built of: norms; attention; positions; feed-forward; what else sets it apart
    experts      it has experts, which --enable-expert-parallel spreads over the tensor-parallel ranks

    Every family runs at every tensor- and pipeline-parallel size that leaves each rank a part of a layer.
    """

    read: Reader
    models: str
    checkpoints: tuple[str, ...]
    blocks: str
    experts: bool = False


# In alphabetical order, those of a family together.
FAMILIES: dict[str, Family] = {
    "DeepseekV2ForCausalLM": Family(
        read_deepseek_v2,
        "DeepSeek-V2, V2-Lite, V2.5; DeepSeek-Coder-V2",
        ("deepseek-ai/DeepSeek-V2-Lite-Chat", "deepseek-ai/DeepSeek-V2.5"),
        "RMSNorm; multi-head latent attention; rotary; 64 or 160 experts, 6 a token, and shared experts",
        experts=True,
    ),
    "DeepseekV3ForCausalLM": Family(
        read_deepseek_v3,
        "DeepSeek-V3, V3.1, R1 (converted to bfloat16)",
        ("deepseek-ai/DeepSeek-V3", "deepseek-ai/DeepSeek-R1"),
        "RMSNorm; multi-head latent attention; rotary; 256 experts, 8 a token, and a shared expert",
        experts=True,
    ),
    "LlamaForCausalLM": Family(
        read_llama,
        "Llama 2, 3, 3.1, 3.2, 3.3; SmolLM2; TinyLlama; Yi",
        ("meta-llama/Llama-3.1-8B-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        "RMSNorm; grouped-query attention; rotary; gated MLP",
    ),
    "MistralForCausalLM": Family(
        read_mistral,
        "Mistral 7B, Nemo, Small",
        ("mistralai/Mistral-7B-Instruct-v0.3", "mistralai/Mistral-Nemo-Instruct-2407"),
        "RMSNorm; grouped-query attention, sliding window; rotary; gated MLP",
    ),
    "MixtralForCausalLM": Family(
        read_mixtral,
        "Mixtral 8x7B, 8x22B",
        ("mistralai/Mixtral-8x7B-Instruct-v0.1", "mistralai/Mixtral-8x22B-Instruct-v0.1"),
        "RMSNorm; grouped-query attention, sliding window; rotary; gated experts",
        experts=True,
    ),
    "Qwen2ForCausalLM": Family(
        read_qwen2,
        "Qwen 2, 2.5; QwQ",
        ("Qwen/Qwen2.5-7B-Instruct",),
        "RMSNorm; grouped-query attention with biases, sliding window in some layers; rotary; gated MLP",
    ),
    "Qwen2MoeForCausalLM": Family(
        read_qwen2_moe,
        "Qwen 1.5 MoE A2.7B; Qwen 2 57B-A14B",
        ("Qwen/Qwen1.5-MoE-A2.7B-Chat", "Qwen/Qwen2-57B-A14B-Instruct"),
        "RMSNorm; grouped-query attention with biases, sliding window in some layers; rotary; gated experts in some "
        "layers or in all, with a shared expert behind a gate",
        experts=True,
    ),
    "Qwen3ForCausalLM": Family(
        read_qwen3,
        "Qwen 3 (dense)",
        ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-32B"),
        "RMSNorm; grouped-query attention with q and k norms, sliding window in some layers; rotary; gated MLP",
    ),
    "Qwen3MoeForCausalLM": Family(
        read_qwen3_moe,
        "Qwen 3 30B-A3B, 235B-A22B",
        ("Qwen/Qwen3-30B-A3B", "Qwen/Qwen3-235B-A22B"),
        "RMSNorm; grouped-query attention with q and k norms, sliding window; rotary; gated experts in some "
        "layers or in all",
        experts=True,
    ),
}


def reader_of(architecture: str, file: Path, auto_map: Any = None) -> Reader:
    """The reader of an architecture. Raises ValueError that lists the known ones; file: where the name stood.

    auto_map: config.json's, which names code in the checkpoint. It is never run, and not needed for an architecture
    that is known.
    """
    if architecture not in FAMILIES:
        raise unsupported(architecture, FAMILIES, file, auto_map)
    return FAMILIES[architecture].read
