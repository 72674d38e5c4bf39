"""Fused, transposed, reordered and shifted checkpoint tensors: each rank reads its part, under any of their names."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from infer.config import EngineConfig
from infer.layers.declare import declared
from infer.models.config import ModelConfig, load_model_config
from infer.models.decoder import Stage, balanced_layers
from infer.weights import Checkpoint, init_dummy_weights, load_weights

SIZES = {
    "vocab_size": 101, "hidden_size": 40, "num_hidden_layers": 2, "num_attention_heads": 5, "intermediate_size": 33,
    "max_position_embeddings": 64, "sliding_window": None,
}  # fmt: skip
GPT2_SIZES = {"vocab_size": 101, "n_embd": 40, "n_layer": 2, "n_head": 5, "n_inner": 33, "n_positions": 64}
OPT_SIZES = {name: value for name, value in SIZES.items() if name != "intermediate_size"} | {"ffn_dim": 33}
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {"architectures": ["GPT2LMHeadModel"], **GPT2_SIZES},
    "gpt-neox": {"architectures": ["GPTNeoXForCausalLM"], **SIZES},
    "opt": {"architectures": ["OPTForCausalLM"], **OPT_SIZES},
    "phi3": {"architectures": ["Phi3ForCausalLM"], **SIZES},
    "glm4": {"architectures": ["Glm4ForCausalLM"], **SIZES, "num_key_value_heads": 1, "head_dim": 8},
    "gemma3": {
        "architectures": ["Gemma3ForCausalLM"], **SIZES, "num_key_value_heads": 1, "head_dim": 8, "sliding_window": 8,
    },
    "olmo2": {"architectures": ["Olmo2ForCausalLM"], **SIZES, "num_key_value_heads": 1},
}


def read(name: str, path: Path) -> ModelConfig:
    (path / "config.json").write_text(json.dumps(CONFIGS[name]))
    return load_model_config(path, EngineConfig(model=str(path)))


def make_stages(c: ModelConfig, index: int = 0, tp: int = 1, pp: int = 1) -> list[Stage]:
    place = {"dtype": torch.float32, "device": torch.device("cpu")}
    group = SimpleNamespace(index=index, size=tp)
    return [
        Stage(c, layers, group, is_first=i == 0, is_last=i == pp - 1, **place)
        for i, layers in enumerate(balanced_layers(c, pp))
    ]


def whole_tensors(c: ModelConfig) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, by the name it is declared with: numbers that differ in every place."""
    generator = torch.Generator().manual_seed(0)
    shapes = {s.name: s.shape for stage in make_stages(c) for _, spec in declared(stage) for s in spec.sources}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def parameters(stage: Stage) -> list[Tensor]:
    return [parameter.clone() for parameter, _ in declared(stage)]


@pytest.mark.parametrize("name", CONFIGS)
def test_ranks_read_what_they_hold_and_no_more(name, tmp_path):
    c = read(name, tmp_path)
    tensors = whole_tensors(c)
    save_file(tensors, tmp_path / "model.safetensors")
    for tp, pp in ((1, 1), (2, 1), (3, 2), (5, 1)):
        for index in range(tp):
            for stage in make_stages(c, index, tp, pp):
                checkpoint = Checkpoint(tmp_path)
                load_weights(stage, checkpoint)
                assert checkpoint.bytes_read == stage.parameter_bytes


@pytest.mark.parametrize("name", CONFIGS)
def test_dummy_weights_are_the_same_model_at_every_layout(name, tmp_path):
    """What a rank makes is what it would read, were the whole tensors of that seed in a checkpoint."""
    c = read(name, tmp_path)
    tensors = {}
    for stage in make_stages(c):
        for _, spec in declared(stage):
            for source in spec.sources:
                whole = torch.empty(source.shape)
                _as_dummy(source.name, whole)
                tensors[source.name] = whole
    save_file(tensors, tmp_path / "model.safetensors")
    for tp, pp in ((1, 1), (3, 2)):
        for index in range(tp):
            for stage in make_stages(c, index, tp, pp):
                load_weights(stage, Checkpoint(tmp_path))
                read_ones = [(spec, parameter.clone()) for parameter, spec in declared(stage)]
                init_dummy_weights(stage, seed=3)
                for (spec, expected), (parameter, _) in zip(read_ones, declared(stage), strict=True):
                    if spec.init == "ones":
                        assert (parameter == 1).all()
                    else:
                        assert torch.equal(parameter, expected), spec.sources[0].name


def _as_dummy(name: str, out: Tensor) -> None:
    from infer.parallel.placement import Source
    from infer.weights import _fill_random

    _fill_random(Source(name, tuple(out.shape), tuple(map(range, out.shape))), out, seed=3)


@pytest.mark.parametrize(
    ("name", "ours", "theirs"),
    [
        ("gpt2", "transformer.", ""),  # as openai-community/gpt2 has them
        ("opt", "model.", ""),
        ("gpt-neox", "gpt_neox.", ""),
        ("gpt-neox", "embed_out.", "lm_head."),
        ("gemma3", "model.", "language_model.model."),  # as google/gemma-3-4b-it has them
        ("gemma3", "model.", "model.language_model."),
        ("phi3", "model.", ""),
    ],
)
def test_tensors_go_by_several_names(name, ours, theirs, tmp_path):
    c = read(name, tmp_path)
    tensors = whole_tensors(c)
    save_file(tensors, tmp_path / "model.safetensors")
    (stage,) = make_stages(c)
    load_weights(stage, Checkpoint(tmp_path))
    expected = parameters(stage)
    renamed = {theirs + key.removeprefix(ours) if key.startswith(ours) else key: t for key, t in tensors.items()}
    assert renamed.keys() != tensors.keys()
    save_file(renamed, tmp_path / "model.safetensors")
    (stage,) = make_stages(c)
    load_weights(stage, Checkpoint(tmp_path))
    for parameter, (loaded, _) in zip(expected, declared(stage), strict=True):
        assert torch.equal(parameter, loaded)


def test_a_norm_stored_less_one_is_kept_in_float32(tmp_path):
    c = read("gemma3", tmp_path)
    tensors = whole_tensors(c)
    save_file(tensors, tmp_path / "model.safetensors")
    (stage,) = make_stages(c)
    load_weights(stage, Checkpoint(tmp_path))
    assert torch.equal(stage.norm.weight, tensors["model.norm.weight"] + 1)
    low = Stage(
        c, range(2), SimpleNamespace(index=0, size=1), is_first=True, is_last=True, dtype=torch.bfloat16,
        device=torch.device("cpu"),
    )  # fmt: skip
    load_weights(low, Checkpoint(tmp_path))
    assert low.norm.weight.dtype == low.layers[0].attention.q_norm.weight.dtype == torch.float32
    assert torch.equal(low.norm.weight, stage.norm.weight)
    held = sum(parameter.numel() * parameter.element_size() for parameter in low.parameters())
    assert low.parameter_bytes == held
