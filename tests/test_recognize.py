"""What is recognized and what is refused, by name and with a reason: architectures, code, quantized weights."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from infer.config import EngineConfig
from infer.models import FAMILIES
from infer.models.config import ModelConfig, load_model_config
from infer.parallel.placement import Source
from infer.weights import Checkpoint

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 100, "hidden_size": 16, "num_hidden_layers": 1,
    "num_attention_heads": 2, "intermediate_size": 24, "max_position_embeddings": 64,
}  # fmt: skip
MAP = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}


def load(path: Path, fields: dict[str, Any], overrides: dict[str, Any] | None = None) -> ModelConfig:
    (path / "config.json").write_text(json.dumps(LLAMA | fields))
    return load_model_config(path, EngineConfig(model=str(path), hf_overrides=overrides))


def refusal(path: Path, fields: dict[str, Any]) -> str:
    with pytest.raises(ValueError) as caught:
        load(path, fields)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    return message


@pytest.mark.parametrize(
    ("architecture", "nearest"),
    [
        ("LamaForCausalLM", "LlamaForCausalLM"),
        ("LlamaForSequenceClassification", "LlamaForCausalLM"),
        ("MistralModel", "MistralForCausalLM"),
        ("Qwen3VLForConditionalGeneration", "Qwen3ForCausalLM"),
    ],
)
def test_the_nearest_architecture_is_named(tmp_path: Path, architecture: str, nearest: str) -> None:
    message = refusal(tmp_path, {"architectures": [architecture]})
    assert f"architecture {architecture} is not supported; the nearest is {nearest};" in message
    assert ", ".join(FAMILIES) in message and "python -m infer.models" in message


def test_a_common_ending_makes_no_two_architectures_near(tmp_path: Path) -> None:
    message = refusal(tmp_path, {"architectures": ["ZzzForCausalLM"]})
    assert "nearest" not in message and ", ".join(FAMILIES) in message


def test_code_of_a_checkpoint_is_refused_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "modeling_own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    message = refusal(tmp_path, {"architectures": ["OwnForCausalLM"], "auto_map": MAP})
    assert "code of its own" in message and "configuration_own.OwnConfig" in message and "never run" in message
    assert not (tmp_path / "ran").exists()


def test_code_beside_a_known_architecture_is_not_needed(tmp_path: Path) -> None:
    (tmp_path / "modeling_own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert load(tmp_path, {"auto_map": MAP}) == load(tmp_path, {})
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("quantization", "method"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, "awq, 4 bits"),
        ({"quant_method": "gptq", "bits": 8}, "gptq, 8 bits"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
        ({"quant_method": "compressed-tensors", "format": "int-quantized"}, "compressed-tensors, int-quantized"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "modelopt, NVFP4"),
        ({"load_in_4bit": False, "load_in_8bit": True}, "bitsandbytes, 8 bits"),
        ({"quant_method": "bitsandbytes", "_load_in_4bit": True, "load_in_8bit": False}, "bitsandbytes, 4 bits"),
        ({"bits": 3}, "not named, 3 bits"),
        ("yes", "not named"),
    ],
)
@pytest.mark.parametrize("place", ["quantization_config", "compression_config", "text_config.quantization_config"])
def test_quantization_is_refused_by_its_method(tmp_path: Path, quantization: Any, method: str, place: str) -> None:
    fields: dict[str, Any] = {place: quantization}
    if place.startswith("text_config."):
        fields = {"text_config": {"quantization_config": quantization}}
    message = refusal(tmp_path, fields)
    assert f"{place} (method {method}): quantized checkpoints are not supported; use the original" in message


@pytest.mark.parametrize(
    ("file", "content", "method"),
    [
        ("hf_quant_config.json", {"quantization": {"quant_algo": "FP8"}}, "modelopt, FP8"),
        ("quantize_config.json", {"bits": 4, "group_size": 128}, "gptq, 4 bits"),
        ("quant_config.json", {"w_bit": 4}, "awq, 4 bits"),
    ],
)
def test_quantization_told_beside_the_config_is_refused(tmp_path: Path, file: str, content: Any, method: str) -> None:
    (tmp_path / file).write_text(json.dumps(content))
    assert f"{file} (method {method}): quantized" in refusal(tmp_path, {})


def test_a_quantization_that_is_null_is_none(tmp_path: Path) -> None:
    assert load(tmp_path, {"quantization_config": None}) == load(tmp_path, {})
    fields = {"quantization_config": {"quant_method": "fp8"}}
    assert load(tmp_path, fields, {"quantization_config": None}) == load(tmp_path, {})


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("model.layers.0.self_attn.q_proj.qweight", "GPTQ or AWQ"),
        ("model.layers.0.mlp.down_proj.weight_scale_inv", "FP8 in blocks"),
        ("model.layers.0.mlp.down_proj.weight_scale", "FP8 or INT8"),
        ("model.layers.0.mlp.down_proj.weight_packed", "compressed-tensors"),
        ("model.layers.0.mlp.down_proj.weight.absmax", "bitsandbytes 4 bits"),
        ("model.layers.0.mlp.down_proj.SCB", "bitsandbytes INT8"),
        ("model.layers.0.mlp.experts.gate_up_proj_blocks", "MXFP4"),
    ],
)
@pytest.mark.parametrize("with_index", [False, True])
def test_tensors_of_quantized_checkpoints_are_refused(tmp_path: Path, name: str, method: str, with_index: bool) -> None:
    """Where config.json says nothing."""
    save_file({"model.norm.weight": torch.ones(4), name: torch.ones(4)}, tmp_path / "model.safetensors")
    if with_index:
        file = tmp_path / "model.safetensors"
        file.rename(tmp_path / "a.safetensors")
        weight_map = dict.fromkeys(("model.norm.weight", name), "a.safetensors")
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    wanted = rf"{re.escape(name)} is a tensor of a quantized checkpoint \({method}\); quantized checkpoints are not"
    with pytest.raises(ValueError, match=wanted):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("dtype", "words"),
    [
        (torch.float8_e4m3fn, "dtype F8_E4M3 (FP8), which is not supported"),
        (torch.int8, "dtype I8 (INT8)"),
        (torch.uint8, "dtype U8 (4 or 8 bits, packed)"),
        (torch.int32, "dtype I32 (GPTQ or AWQ, packed)"),
        (torch.bool, "dtype BOOL, which is not supported; supported are F64, F32, F16, BF16"),
    ],
)
def test_element_types_are_refused_by_name(tmp_path: Path, dtype: torch.dtype, words: str) -> None:
    save_file({"model.norm.weight": torch.ones(4).to(dtype)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError) as caught:
        Checkpoint(tmp_path).check(Source("model.norm.weight", (4,), (range(4),)))
    assert "tensor model.norm.weight has" in str(caught.value) and words in str(caught.value)
