"""The models there are: config.json's architecture -> the reader that turns it into a ModelConfig. No torch here."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from infer.models.config import ModelConfig, RopeConfig, load_model_config
from infer.models.fields import Fields
from infer.models.llama import read_llama
from infer.models.mistral import read_mistral
from infer.models.mixtral import read_mixtral
from infer.models.qwen import read_qwen2, read_qwen3
from infer.models.qwen_moe import read_qwen2_moe, read_qwen3_moe

__all__ = ["FAMILIES", "Family", "ModelConfig", "RopeConfig", "load_model_config", "reader_of"]

Reader = Callable[[Fields], ModelConfig]


@dataclass(frozen=True)
class Family:
    """read: config.json's fields -> ModelConfig. models: well-known members, for people."""

    read: Reader
    models: str


FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(read_llama, "Llama 2, 3, 3.1, 3.2, 3.3; SmolLM2"),
    "MistralForCausalLM": Family(read_mistral, "Mistral 7B, Nemo, Small"),
    "Qwen2ForCausalLM": Family(read_qwen2, "Qwen 2, 2.5"),
    "Qwen3ForCausalLM": Family(read_qwen3, "Qwen 3 (dense)"),
    "MixtralForCausalLM": Family(read_mixtral, "Mixtral 8x7B, 8x22B"),
    "Qwen2MoeForCausalLM": Family(read_qwen2_moe, "Qwen 1.5 MoE A2.7B, Qwen 2 57B-A14B"),
    "Qwen3MoeForCausalLM": Family(read_qwen3_moe, "Qwen 3 30B-A3B, 235B-A22B"),
}


def reader_of(architecture: str, file: Path) -> Reader:
    """The reader of an architecture. Raises ValueError that lists the known ones; file: where the name stood."""
    if architecture in FAMILIES:
        return FAMILIES[architecture].read
    near = difflib.get_close_matches(architecture, FAMILIES, n=1)
    hint = f"; the nearest is {near[0]}" if near else ""
    raise ValueError(f"{file}: architecture {architecture} is not supported{hint}; supported are {', '.join(FAMILIES)}")
