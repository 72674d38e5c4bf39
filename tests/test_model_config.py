"""config.json -> ModelConfig: the names of old and new transformers, overrides, and errors."""

import json
from pathlib import Path
from typing import Any

import pytest

from infer.config import EngineConfig
from infer.models import FAMILIES
from infer.models.config import ModelConfig, load_model_config

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 1000,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}
LLAMA31 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


def load(
    path: Path, fields: dict[str, Any], *, dtype: str = "auto", overrides: dict[str, Any] | None = None
) -> ModelConfig:
    (path / "config.json").write_text(json.dumps(fields))
    return load_model_config(path, EngineConfig(model=str(path), dtype=dtype, hf_overrides=overrides))


def qwen(name: str, **fields: Any) -> dict[str, Any]:
    return LLAMA | {"architectures": [name]} | fields


def test_old_and_new_names_mean_the_same(tmp_path: Path) -> None:
    old = LLAMA | {"torch_dtype": "bfloat16", "rope_theta": 5e5, "rope_scaling": LLAMA31 | {"rope_type": "llama3"}}
    older = LLAMA | {"torch_dtype": "bfloat16", "rope_theta": 5e5, "rope_scaling": LLAMA31 | {"type": "llama3"}}
    new = LLAMA | {"dtype": "bfloat16", "rope_parameters": LLAMA31 | {"rope_type": "llama3", "rope_theta": 5e5}}
    expected = load(tmp_path, new)
    assert expected.dtype == "bfloat16"
    assert (expected.rope.type, expected.rope.theta, expected.rope.factor) == ("llama3", 5e5, 8.0)
    assert expected.rope.original_max_position == 64
    assert load(tmp_path, old) == load(tmp_path, older) == expected


def test_defaults_where_config_is_silent(tmp_path: Path) -> None:
    sparse = {name: value for name, value in LLAMA.items() if name not in ("num_key_value_heads", "hidden_act")}
    c = load(tmp_path, sparse | {"rope_scaling": None, "head_dim": None})
    assert (c.num_kv_heads, c.head_dim, c.activation, c.dtype) == (8, 8, "silu", "float32")
    assert (c.rope.type, c.rope.theta, c.window, c.tie_embeddings) == ("default", 10000.0, (0, 0, 0, 0), False)
    assert c.eos_token_ids == ()


@pytest.mark.parametrize(
    ("stored", "dtype", "expected"),
    [
        ("float16", "auto", "float16"),
        ("torch.bfloat16", "auto", "bfloat16"),
        ("bfloat16", "float32", "float32"),
        ("float64", "float32", "float32"),
        (None, "auto", "float32"),
        (None, "bfloat16", "bfloat16"),
    ],
)
def test_dtype(tmp_path: Path, stored: str | None, dtype: str, expected: str) -> None:
    assert load(tmp_path, LLAMA | {"torch_dtype": stored}, dtype=dtype).dtype == expected


def test_families_differ_where_they_should(tmp_path: Path) -> None:
    llama = load(tmp_path, LLAMA | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True})
    assert (llama.qkv_bias, llama.o_bias, llama.mlp_bias, llama.tie_embeddings) == (True, True, True, True)
    qwen2 = load(tmp_path, qwen("Qwen2ForCausalLM"))
    assert (qwen2.qkv_bias, qwen2.o_bias, qwen2.qk_norm, qwen2.head_dim) == (True, False, "none", 8)
    qwen3 = load(tmp_path, qwen("Qwen3ForCausalLM"))
    assert (qwen3.qkv_bias, qwen3.o_bias, qwen3.qk_norm, qwen3.head_dim) == (False, False, "head", 128)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"sliding_window": 32}, (32,) * 4),
        ({"sliding_window": None}, (0,) * 4),
        ({}, (4096,) * 4),
    ],
)
def test_mistral_window(tmp_path: Path, fields: dict[str, Any], expected: tuple[int, ...]) -> None:
    assert load(tmp_path, LLAMA | {"architectures": ["MistralForCausalLM"]} | fields).window == expected


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"use_sliding_window": False, "sliding_window": 32, "max_window_layers": 1}, (0, 0, 0, 0)),
        ({"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 3}, (0, 0, 0, 32)),
        ({"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 0}, (32, 32, 32, 32)),
        ({"use_sliding_window": True, "sliding_window": 32}, (0, 0, 0, 0)),
        ({"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}, (0, 0, 0, 0)),
        ({"use_sliding_window": True, "max_window_layers": 0}, (4096,) * 4),
        (
            {
                "use_sliding_window": True,
                "sliding_window": 32,
                "max_window_layers": 3,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            (32, 0, 32, 0),
        ),
    ],
)
def test_qwen_window(tmp_path: Path, fields: dict[str, Any], expected: tuple[int, ...]) -> None:
    assert load(tmp_path, qwen("Qwen2ForCausalLM", **fields)).window == expected


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        # As Qwen 2.5's instructions have it.
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}, 1024),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}, 256),
        ({"rope_type": "yarn", "original_max_position_embeddings": 64}, 256),
        ({"rope_type": "linear", "factor": 4.0}, 256),
        (LLAMA31 | {"rope_type": "llama3"}, 256),
    ],
)
def test_positions_of_a_scaled_rope(tmp_path: Path, fields: dict[str, Any], expected: int) -> None:
    assert load(tmp_path, qwen("Qwen2ForCausalLM", rope_scaling=fields)).max_position == expected


def test_yarn_beyond_max_position_embeddings_is_as_in_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    import torch
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

    from infer.layers.rotary import Rotary

    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
    c = load(tmp_path, qwen("Qwen2ForCausalLM", rope_scaling=scaling, rope_theta=1e6, model_type="qwen2"))
    theirs = Qwen2RotaryEmbedding(transformers.AutoConfig.from_pretrained(tmp_path))
    cos, sin = theirs(torch.zeros(1), torch.arange(1024)[None])
    ours = Rotary(c.rope, c.max_position, torch.device("cpu")).cos_sin
    half = c.rope.dim // 2
    torch.testing.assert_close(ours, torch.cat((cos[0, :, :half], sin[0, :, :half]), dim=-1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["Qwen2ForCausalLM", "Qwen3ForCausalLM"])
def test_dual_chunk_attention_ends_where_it_would_begin(tmp_path: Path, name: str) -> None:
    chunks = {"chunk_size": 64, "local_size": 8, "original_max_position_embeddings": 128}
    assert load(tmp_path, qwen(name, dual_chunk_attention_config=chunks)).max_position == 128
    assert load(tmp_path, qwen(name)).max_position == 256


def test_end_tokens(tmp_path: Path) -> None:
    assert load(tmp_path, LLAMA | {"eos_token_id": 2}).eos_token_ids == (2,)
    generation = tmp_path / "generation_config.json"
    generation.write_text('{"eos_token_id": [7, 9, 7]}')
    assert load(tmp_path, LLAMA | {"eos_token_id": 2}).eos_token_ids == (7, 9)
    assert load(tmp_path, LLAMA | {"eos_token_id": 2}, overrides={"eos_token_id": 3}).eos_token_ids == (3,)
    generation.write_text("{}")
    assert load(tmp_path, LLAMA | {"eos_token_id": [2, 5]}).eos_token_ids == (2, 5)
    generation.write_text('{"eos_token_id": 1000}')
    with pytest.raises(ValueError, match=r"generation_config.json: eos_token_id is 1000; it must be .* under 1000"):
        load(tmp_path, LLAMA)
    generation.write_text("{")
    with pytest.raises(ValueError, match=r"generation_config.json is not valid JSON"):
        load(tmp_path, LLAMA)


def test_overrides(tmp_path: Path) -> None:
    new = LLAMA | {"dtype": "bfloat16", "rope_parameters": LLAMA31 | {"rope_type": "llama3", "rope_theta": 5e5}}
    assert load(tmp_path, new, overrides={"num_hidden_layers": 2}).num_layers == 2
    # Old names reach what the file says with new ones.
    assert load(tmp_path, new, overrides={"torch_dtype": "float16"}).dtype == "float16"
    c = load(tmp_path, new, overrides={"rope_theta": 7e5})
    assert (c.rope.type, c.rope.theta) == ("llama3", 7e5)
    c = load(tmp_path, new, overrides={"rope_scaling": {"rope_type": "linear", "factor": 2.0}})
    assert (c.rope.type, c.rope.theta, c.rope.factor, c.rope.low_freq_factor) == ("linear", 5e5, 2.0, 1.0)
    assert load(tmp_path, new, overrides={"rope_scaling": None}).rope.type == "default"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            {"num_hidden_layer": 2},
            "num_hidden_layer has no effect on LlamaForCausalLM; did you mean num_hidden_layers?",
        ),
        ({"rope_scaling": {"factor": 2.0}}, "factor has no effect"),
        ({"sliding_window": 8}, "sliding_window has no effect"),
    ],
)
def test_an_override_that_nothing_reads_is_refused(tmp_path: Path, overrides: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match="hf_overrides") as caught:
        load(tmp_path, LLAMA, overrides=overrides)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"architectures": ["LamaForCausalLM"]}, "LamaForCausalLM is not supported; the nearest is LlamaForCausalLM"),
        ({"architectures": ["Zzz"]}, ", ".join(FAMILIES)),
        ({"architectures": None}, "architectures is missing"),
        ({"architectures": []}, "architectures is []"),
        ({"hidden_size": None}, "hidden_size is missing; it must be a positive integer"),
        ({"hidden_size": "64"}, "hidden_size is '64'; it must be a positive integer"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3; it must divide num_attention_heads (8)"),
        ({"num_attention_heads": 7, "num_key_value_heads": 7}, "hidden_size is 64; it must be a multiple"),
        ({"head_dim": 7}, "head_dim is 7; it must be even"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'; it must be one of silu"),
        ({"rms_norm_eps": -1}, "rms_norm_eps is -1"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'; it must be true or false"),
        ({"dtype": "float64"}, "dtype is 'float64'; it cannot be used as it is; choose --dtype"),
        (
            {"rope_scaling": {"rope_type": "xpos", "factor": 2}},
            "rope_type is 'xpos'; it must be one of default, linear",
        ),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_parameters.factor is missing"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "rope_parameters.low_freq_factor is missing"),
        ({"rope_scaling": "llama3"}, "rope_scaling must be an object or null"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            "must not differ by layer (full_attention)",
        ),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config (method gptq)"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'"),
    ],
)
def test_a_field_that_is_wrong_is_named(tmp_path: Path, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError) as caught:
        load(tmp_path, LLAMA | fields)
    assert words in str(caught.value)
    assert str(tmp_path / "config.json") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_layer_types_of_the_wrong_length(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"layer_types is .* a list of 4 of full_attention and sliding_attention"):
        load(tmp_path, qwen("Qwen3ForCausalLM", layer_types=["full_attention"]))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "is not valid JSON"),
        (b"[]", "must hold a JSON object, not list"),
        (b"\xff\xfe", "is not valid JSON"),
        (None, "is missing; --model must be"),
    ],
)
def test_missing_or_corrupt_config(tmp_path: Path, content: bytes | None, words: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError) as caught:
        load_model_config(tmp_path, EngineConfig(model=str(tmp_path)))
    assert str(tmp_path / "config.json") in str(caught.value)
    assert words in str(caught.value)
