"""The config.json of well-known checkpoints: what is read from them, the sizes that were published, what is refused."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from infer.config import EngineConfig
from infer.layers.declare import declared
from infer.models.config import ModelConfig, load_model_config
from infer.models.decoder import Stage

# As they lie on the Hub, without what describes training alone.
GPT2 = {
    "architectures": ["GPT2LMHeadModel"], "activation_function": "gelu_new", "bos_token_id": 50256,
    "eos_token_id": 50256, "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768,
    "n_head": 12, "n_layer": 12, "n_positions": 1024, "vocab_size": 50257,
}  # fmt: skip
OPT = {
    "architectures": ["OPTForCausalLM"], "_remove_final_layer_norm": False, "activation_function": "relu",
    "bos_token_id": 2, "do_layer_norm_before": True, "eos_token_id": 2, "ffn_dim": 3072, "hidden_size": 768,
    "max_position_embeddings": 2048, "model_type": "opt", "num_attention_heads": 12, "num_hidden_layers": 12,
    "pad_token_id": 1, "torch_dtype": "float16", "vocab_size": 50272, "word_embed_proj_dim": 768,
}  # fmt: skip
PYTHIA = {
    "architectures": ["GPTNeoXForCausalLM"], "bos_token_id": 0, "eos_token_id": 0, "hidden_act": "gelu",
    "hidden_size": 2048, "intermediate_size": 8192, "layer_norm_eps": 1e-05, "max_position_embeddings": 2048,
    "model_type": "gpt_neox", "num_attention_heads": 16, "num_hidden_layers": 24, "rotary_emb_base": 10000,
    "rotary_pct": 0.25, "tie_word_embeddings": False, "torch_dtype": "float16", "use_parallel_residual": True,
    "vocab_size": 50304,
}  # fmt: skip
GEMMA2 = {
    "architectures": ["Gemma2ForCausalLM"], "attention_bias": False, "attn_logit_softcapping": 50.0,
    "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": 1, "final_logit_softcapping": 30.0,
    "head_dim": 256, "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2304, "intermediate_size": 9216, "max_position_embeddings": 8192, "model_type": "gemma2",
    "num_attention_heads": 8, "num_hidden_layers": 26, "num_key_value_heads": 4, "pad_token_id": 0,
    "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "sliding_window": 4096,
    "torch_dtype": "bfloat16", "vocab_size": 256000,
}  # fmt: skip
GEMMA3 = {
    "architectures": ["Gemma3ForCausalLM"], "attention_bias": False, "attn_logit_softcapping": None,
    "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": [1, 106], "final_logit_softcapping": None,
    "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152, "intermediate_size": 6912,
    "max_position_embeddings": 32768, "model_type": "gemma3_text", "num_attention_heads": 4, "num_hidden_layers": 26,
    "num_key_value_heads": 1, "pad_token_id": 0, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 512,
    "sliding_window_pattern": 6, "torch_dtype": "bfloat16", "vocab_size": 262144,
}  # fmt: skip
GEMMA3_4B = {
    "architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 255999, "eos_token_id": [1, 106],
    "image_token_index": 262144, "model_type": "gemma3", "mm_tokens_per_image": 256, "torch_dtype": "bfloat16",
    "text_config": {
        "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
    },
    "vision_config": {"hidden_size": 1152, "image_size": 896, "model_type": "siglip_vision_model"},
}  # fmt: skip
PHI3 = {
    "architectures": ["Phi3ForCausalLM"], "auto_map": {"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"},
    "bos_token_id": 1, "eos_token_id": 32000, "hidden_act": "silu", "hidden_size": 3072, "intermediate_size": 8192,
    "max_position_embeddings": 131072, "model_type": "phi3", "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 32, "original_max_position_embeddings": 4096, "pad_token_id": 32000,
    "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 262144, "tie_word_embeddings": False,
    "rope_scaling": {"long_factor": [2.0] * 48, "short_factor": [1.0] * 48, "type": "longrope"},
    "torch_dtype": "bfloat16", "attention_bias": False, "vocab_size": 32064,
}  # fmt: skip
PHI4_MINI = PHI3 | {
    "num_attention_heads": 24, "num_key_value_heads": 8, "partial_rotary_factor": 0.75, "tie_word_embeddings": True,
    "vocab_size": 200064, "eos_token_id": 199999,
}  # fmt: skip
STARCODER2 = {
    "architectures": ["Starcoder2ForCausalLM"], "bos_token_id": 0, "eos_token_id": 0,
    "hidden_act": "gelu_pytorch_tanh", "hidden_size": 3072, "intermediate_size": 12288,
    "max_position_embeddings": 16384, "mlp_type": "default", "model_type": "starcoder2", "norm_epsilon": 1e-05,
    "norm_type": "layer_norm", "num_attention_heads": 24, "num_hidden_layers": 30, "num_key_value_heads": 2,
    "rope_theta": 999999.4420358813, "sliding_window": 4096, "torch_dtype": "float32", "use_bias": True,
    "vocab_size": 49152,
}  # fmt: skip
GRANITE = {
    "architectures": ["GraniteForCausalLM"], "attention_bias": False, "attention_multiplier": 0.015625,
    "bos_token_id": 0, "embedding_multiplier": 12.0, "eos_token_id": 0, "hidden_act": "silu", "hidden_size": 2048,
    "intermediate_size": 8192, "logits_scaling": 8.0, "max_position_embeddings": 131072, "mlp_bias": False,
    "model_type": "granite", "num_attention_heads": 32, "num_hidden_layers": 40, "num_key_value_heads": 8,
    "residual_multiplier": 0.22, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000000.0,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "vocab_size": 49159,
}  # fmt: skip
OLMO2 = {
    "architectures": ["Olmo2ForCausalLM"], "attention_bias": False, "eos_token_id": 100257, "hidden_act": "silu",
    "hidden_size": 4096, "intermediate_size": 11008, "max_position_embeddings": 4096, "model_type": "olmo2",
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "rope_theta": 500000, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "vocab_size": 100352,
}  # fmt: skip
GLM4 = {
    "architectures": ["Glm4ForCausalLM"], "attention_bias": True, "eos_token_id": [151329, 151336, 151338],
    "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 13696,
    "max_position_embeddings": 32768, "model_type": "glm4", "num_attention_heads": 32, "num_hidden_layers": 40,
    "num_key_value_heads": 2, "pad_token_id": 151329, "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 151552,
}  # fmt: skip
SMOLLM3 = {
    "architectures": ["SmolLM3ForCausalLM"], "attention_bias": False, "eos_token_id": 128012, "hidden_act": "silu",
    "hidden_size": 2048, "intermediate_size": 11008, "layer_types": ["full_attention"] * 36,
    "max_position_embeddings": 65536, "max_window_layers": 28, "mlp_bias": False, "model_type": "smollm3",
    "no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0] * 9, "num_attention_heads": 16,
    "num_hidden_layers": 36, "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_scaling": None,
    "rope_theta": 5000000.0, "sliding_window": None, "torch_dtype": "bfloat16", "use_sliding_window": False,
    "vocab_size": 128256,
}  # fmt: skip

# Parameters, a tied head not counted twice; the text part alone of a model that sees.
PUBLISHED = [
    (GPT2, 124_439_808),
    (OPT, 125_239_296),
    (PYTHIA, 1_414_647_808),
    (GEMMA2, 2_614_341_888),
    (GEMMA3, 999_885_952),
    (GEMMA3_4B, 3_880_263_168),
    (PHI3, 3_821_079_552),
    (PHI4_MINI, 3_836_021_760),
    (STARCODER2, 3_030_371_328),
    (GRANITE, 2_533_539_840),
    (OLMO2, 7_298_617_344),
    (GLM4, 9_400_279_040),
    (SMOLLM3, 3_075_098_624),
]
ONE_RANK = SimpleNamespace(index=0, size=1)


def load(path: Path, fields: dict[str, Any], **overrides: Any) -> ModelConfig:
    (path / "config.json").write_text(json.dumps(fields))
    return load_model_config(path, EngineConfig(model=str(path), hf_overrides=overrides or None))


def refused(path: Path, fields: dict[str, Any], *texts: str) -> None:
    with pytest.raises(ValueError) as error:
        load(path, fields)
    for text in texts:
        assert text in str(error.value), error.value


@pytest.mark.parametrize(("fields", "expected"), PUBLISHED, ids=[f["architectures"][0] for f, _ in PUBLISHED])
def test_the_parameters_add_up_to_the_published_size(fields, expected, tmp_path):
    c = load(tmp_path, fields)
    stage = Stage(
        c, range(c.num_layers), ONE_RANK, is_first=True, is_last=True, dtype=torch.bfloat16,
        device=torch.device("meta"),
    )  # fmt: skip
    assert sum(spec.local_numel for _, spec in declared(stage)) + skipped_positions(c) == expected


def skipped_positions(c: ModelConfig) -> int:
    """Parameters that are in the checkpoint and never looked at."""
    return c.positions.skipped * c.hidden_size if c.positions else 0


def test_gemma2_alternates(tmp_path):
    c = load(tmp_path, GEMMA2)
    assert c.window[:4] == (4096, 0, 4096, 0) and len(c.window) == 26
    assert (c.norm, c.residual, c.activation, c.tie_embeddings) == ("rms_plus_one", "sandwich", "gelu_tanh", True)
    assert (c.attention_soft_cap, c.logit_soft_cap, c.attention_scale) == (50.0, 30.0, 1 / 16)
    assert c.embed_scale == 48.0 and c.rope == c.rope_of(0) == c.rope_of(1)
    silent = {name: value for name, value in GEMMA2.items() if "softcapping" not in name}
    assert (load(tmp_path, silent).attention_soft_cap, load(tmp_path, silent).logit_soft_cap) == (50.0, 30.0)
    off = load(tmp_path, GEMMA2 | {"attn_logit_softcapping": None, "final_logit_softcapping": None})
    assert (off.attention_soft_cap, off.logit_soft_cap) == (0.0, 0.0)


def test_gemma3_has_two_tables(tmp_path):
    c = load(tmp_path, GEMMA3)
    assert c.window[:7] == (512,) * 5 + (0, 512)
    assert (c.rope_of(0).theta, c.rope_of(5).theta) == (1e4, 1e6)
    assert (c.qk_norm, c.attention_soft_cap, c.logit_soft_cap, c.eos_token_ids) == ("head", 0.0, 0.0, (1, 106))
    sections = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    names = ("rope_local_base_freq", "rope_scaling", "rope_theta", "sliding_window_pattern")
    new = {name: value for name, value in GEMMA3.items() if name not in names}
    kinds = [*["sliding_attention"] * 5, "full_attention"] * 4 + ["sliding_attention"] * 2
    new |= {"rope_parameters": sections, "layer_types": kinds}
    assert load(tmp_path, new) == load(tmp_path, GEMMA3 | {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}})


def test_the_text_part_of_gemma3(tmp_path):
    c = load(tmp_path, GEMMA3_4B)
    assert (c.vocab_size, c.num_heads, c.num_kv_heads, c.head_dim, c.max_position) == (262208, 8, 4, 256, 131072)
    assert c.architecture == "Gemma3ForConditionalGeneration" and c.dtype == "bfloat16"
    assert (c.rope.type, c.rope.factor, c.local_rope.type, c.local_rope.theta) == ("linear", 8.0, "default", 1e4)
    refused(tmp_path, GEMMA3_4B | {"text_config": {"hidden_size": 2560}}, "text_config.num_hidden_layers is missing")
    assert c.tie_embeddings and not load(tmp_path, GEMMA3_4B | {"tie_word_embeddings": False}).tie_embeddings


def test_gemma1_means_tanh_when_it_says_gelu(tmp_path):
    fields = {name: value for name, value in GEMMA2.items() if name != "hidden_activation"}
    c = load(tmp_path, fields | {"architectures": ["GemmaForCausalLM"], "hidden_act": "gelu"})
    assert (c.activation, c.residual, c.embed_scale, c.window[0]) == ("gelu_tanh", "pre", 48.0, 0)


def test_phi3_lengths(tmp_path):
    c = load(tmp_path, PHI3)
    assert (c.rope.type, c.rope.factor, c.rope.original_max_position, c.rope.dim) == ("longrope", 32.0, 4096, 96)
    assert c.rope.long_factor == (2.0,) * 48 and c.window[0] == 262144
    mini = load(tmp_path, PHI4_MINI)
    assert (mini.head_dim, mini.rope.dim, mini.num_kv_heads) == (128, 96, 8)
    scaling = PHI3["rope_scaling"]
    assert load(tmp_path, PHI3 | {"rope_scaling": scaling | {"type": "su"}}).rope == c.rope
    refused(tmp_path, PHI3 | {"rope_scaling": scaling | {"type": "yarn"}}, "rope_type is 'yarn'", "'longrope'")
    refused(tmp_path, PHI3 | {"rope_scaling": scaling | {"long_factor": [1.0] * 47}}, "long_factor", "48 positive")


def test_granite_factors(tmp_path):
    c = load(tmp_path, GRANITE)
    assert (c.embed_scale, c.attention_scale, c.residual_scale, c.logit_scale) == (12.0, 0.015625, 0.22, 0.125)


def test_smollm3_layers_without_rotation(tmp_path):
    c = load(tmp_path, SMOLLM3)
    assert c.nope_layers == frozenset(range(3, 36, 4)) and c.rope_of(3) is None and c.rope_of(4).theta == 5e6
    silent = {name: value for name, value in SMOLLM3.items() if not name.startswith("no_rope")}
    assert load(tmp_path, silent) == c
    refused(tmp_path, SMOLLM3 | {"no_rope_layers": [1, 0]}, "no_rope_layers is [1, 0]", "list of 36")


def test_rotations_of_part_of_a_head(tmp_path):
    pythia, glm = load(tmp_path, PYTHIA), load(tmp_path, GLM4)
    assert (pythia.rope.dim, pythia.head_dim, pythia.rope.interleaved) == (32, 128, False)
    assert (glm.rope.dim, glm.head_dim, glm.rope.interleaved) == (64, 128, True)
    assert load(tmp_path, PYTHIA | {"use_parallel_residual": False}).residual == "pre"


def test_fields_of_gpt2_go_by_their_own_names(tmp_path):
    c = load(tmp_path, GPT2)
    assert (c.hidden_size, c.num_layers, c.num_heads, c.intermediate_size) == (768, 12, 12, 3072)
    assert (c.rope, c.positions.rows, c.positions.skipped, c.max_position) == (None, 1024, 0, 1024)
    assert load(tmp_path, GPT2, n_inner=100).intermediate_size == 100
    refused(tmp_path, GPT2 | {"n_embd": 770}, "n_embd is 770", "multiple of")
    with pytest.raises(ValueError, match="hidden_size has no effect on GPT2LMHeadModel"):
        load(tmp_path, GPT2, hidden_size=64)


@pytest.mark.parametrize(
    ("fields", "change"),
    [
        (GEMMA2, {"use_bidirectional_attention": True}),
        (GEMMA3, {"use_bidirectional_attention": True}),
        (GEMMA3, {"sliding_window": None}),
        (GPT2, {"scale_attn_by_inverse_layer_idx": True}),
        (GPT2, {"add_cross_attention": True}),
        (OPT, {"do_layer_norm_before": False}),  # 350m
        (OPT, {"word_embed_proj_dim": 512}),
        (OPT, {"_remove_final_layer_norm": True}),
        (OPT, {"layer_norm_elementwise_affine": False}),
        (GEMMA2, {"hidden_activation": "relu"}),
        (OLMO2, {"rope_scaling": {"rope_type": "proportional"}}),
    ],
    ids=lambda value: next(iter(value)) if len(value) == 1 else value["architectures"][0],
)
def test_what_would_change_the_computation_is_refused(fields, change, tmp_path):
    load(tmp_path, fields)
    (name,) = change
    refused(tmp_path, fields | change, "rope_type" if name == "rope_scaling" else name)
