"""The models there are: config.json's architecture -> the reader that turns it into a ModelConfig. No torch here."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infer.models.config import ModelConfig, RopeConfig, load_model_config
from infer.models.deepseek import read_deepseek_v2, read_deepseek_v3
from infer.models.fields import Fields
from infer.models.gemma import read_gemma, read_gemma2, read_gemma3, read_gemma3_text_part
from infer.models.glm import read_glm, read_glm4
from infer.models.glm_moe import read_glm4_moe
from infer.models.gpt2 import read_gpt2
from infer.models.gpt_neox import read_gpt_neox
from infer.models.granite import read_granite
from infer.models.llama import read_llama
from infer.models.mistral import read_mistral
from infer.models.mixtral import read_mixtral
from infer.models.olmo import read_olmo2, read_olmo3
from infer.models.olmoe import read_olmoe
from infer.models.opt import read_opt
from infer.models.phi import read_phi3
from infer.models.qwen import read_qwen2, read_qwen3
from infer.models.qwen_moe import read_qwen2_moe, read_qwen3_moe
from infer.models.recognize import unsupported
from infer.models.smollm3 import read_smollm3
from infer.models.starcoder2 import read_starcoder2

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
    "GPT2LMHeadModel": Family(
        read_gpt2,
        "GPT-2",
        ("openai-community/gpt2",),
        "LayerNorm; multi-head attention with biases; learned positions; MLP",
    ),
    "GPTNeoXForCausalLM": Family(
        read_gpt_neox,
        "GPT-NeoX, Pythia",
        ("EleutherAI/pythia-1.4b", "EleutherAI/gpt-neox-20b"),
        "LayerNorm, parallel residual; multi-head attention with biases; partial rotary; MLP",
    ),
    "GemmaForCausalLM": Family(
        read_gemma,
        "Gemma 1",
        ("google/gemma-2b-it",),
        "RMSNorm (1 + weight); grouped-query attention; rotary; gated MLP; embedding multiplier",
    ),
    "Gemma2ForCausalLM": Family(
        read_gemma2,
        "Gemma 2",
        ("google/gemma-2-2b-it", "google/gemma-2-27b-it"),
        "RMSNorm (1 + weight), sandwich norms; grouped-query attention, sliding window in some layers, soft caps; "
        "rotary; gated MLP; embedding multiplier",
    ),
    "Gemma3ForCausalLM": Family(
        read_gemma3,
        "Gemma 3 (text)",
        ("google/gemma-3-1b-it",),
        "RMSNorm (1 + weight), sandwich norms; grouped-query attention with q and k norms, sliding window in some "
        "layers; rotary, another in layers with a window; gated MLP; embedding multiplier",
    ),
    "Gemma3ForConditionalGeneration": Family(
        read_gemma3_text_part,
        "Gemma 3 (the text part of models that see)",
        ("google/gemma-3-4b-it", "google/gemma-3-27b-it"),
        "those of Gemma3ForCausalLM; images are not taken",
    ),
    "GlmForCausalLM": Family(
        read_glm,
        "GLM-4",
        ("THUDM/glm-4-9b-chat-hf",),
        "RMSNorm; grouped-query attention with biases; partial rotary, interleaved; gated MLP",
    ),
    "Glm4ForCausalLM": Family(
        read_glm4,
        "GLM-4-0414",
        ("THUDM/GLM-4-9B-0414", "THUDM/GLM-4-32B-0414"),
        "RMSNorm, sandwich norms; grouped-query attention with biases; partial rotary, interleaved; gated MLP",
    ),
    "Glm4MoeForCausalLM": Family(
        read_glm4_moe,
        "GLM-4.5, 4.5-Air, 4.6",
        ("zai-org/GLM-4.5-Air", "zai-org/GLM-4.6"),
        "RMSNorm; grouped-query attention with biases, q and k norms in some; partial rotary; gated experts behind the "
        "first layers, sigmoid routing with a correction bias, a shared expert",
        experts=True,
    ),
    "GraniteForCausalLM": Family(
        read_granite,
        "Granite 3.0 to 3.3",
        ("ibm-granite/granite-3.3-2b-instruct",),
        "RMSNorm; grouped-query attention; rotary; gated MLP; embedding, attention, residual and logit multipliers",
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
    "OlmoeForCausalLM": Family(
        read_olmoe,
        "OLMoE 1B-7B",
        ("allenai/OLMoE-1B-7B-0924-Instruct",),
        "RMSNorm; multi-head attention with norms over all of q and k; rotary; gated experts",
        experts=True,
    ),
    "OPTForCausalLM": Family(
        read_opt,
        "OPT (not 350m)",
        ("facebook/opt-125m", "facebook/opt-66b"),
        "LayerNorm; multi-head attention with biases; learned positions; MLP",
    ),
    "Olmo2ForCausalLM": Family(
        read_olmo2,
        "OLMo 2",
        ("allenai/OLMo-2-1124-7B-Instruct",),
        "RMSNorm, post-norms; multi-head attention with q and k norms over all heads; rotary; gated MLP",
    ),
    "Olmo3ForCausalLM": Family(
        read_olmo3,
        "OLMo 3",
        ("allenai/Olmo-3-7B-Instruct",),
        "RMSNorm, post-norms; multi-head attention with q and k norms over all heads, sliding window in some layers; "
        "rotary, another in layers with a window; gated MLP",
    ),
    "Phi3ForCausalLM": Family(
        read_phi3,
        "Phi-3, Phi-3.5, Phi-4, Phi-4-mini",
        ("microsoft/Phi-3.5-mini-instruct", "microsoft/phi-4"),
        "RMSNorm; grouped-query attention, sliding window; partial rotary, LongRoPE; gated MLP; fused tensors",
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
    "SmolLM3ForCausalLM": Family(
        read_smollm3,
        "SmolLM3",
        ("HuggingFaceTB/SmolLM3-3B",),
        "RMSNorm; grouped-query attention; rotary in some layers; gated MLP",
    ),
    "Starcoder2ForCausalLM": Family(
        read_starcoder2,
        "StarCoder 2",
        ("bigcode/starcoder2-3b", "bigcode/starcoder2-15b"),
        "LayerNorm; grouped-query attention with biases, sliding window; rotary; MLP",
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
