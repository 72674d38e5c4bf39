"""Latent attention: DeepSeek's models against transformers at every layout, what each rank keeps and reads."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import transformers
from checkpoints import VOCAB_SIZE, build_checkpoint, make_prompts
from recipes_mla import SPLIT_EXPERTS
from test_model import CPU, Meeting, ThreadGroup, build_stages, read_config, run_layout
from torch import Tensor
from world_scripts.jobs import Job, Run
from worlds import run_jobs

from infer import native
from infer.cache import pages
from infer.config import EngineConfig
from infer.engine import tape
from infer.layers.attention import ForwardContext
from infer.layers.mla import LatentAttention, LatentExpansion
from infer.models.config import ModelConfig, load_model_config
from infer.models.decoder import Stage
from infer.parallel.groups import alone
from infer.quant import PackedHeads
from infer.request import SamplingParams
from infer.weights import Checkpoint, load_weights

LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2), (3, 1), (5, 1)]  # (tp, pp)
LENGTHS = (41, 23)  # what run_layout runs
needs_native = pytest.mark.skipif(not native.is_loaded(), reason="the native kernels are not built")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("latent")
    return {name: build_checkpoint(name, root / name) for name in SPLIT_EXPERTS}


def fill(path: Path, stage: Stage) -> None:
    load_weights(stage, Checkpoint(path))
    stage.pack()


# ------------------------------------------------------------------------------------------- against transformers


@pytest.mark.parametrize("name", SPLIT_EXPERTS)
def test_logits_equal_transformers_at_every_layout(name: str, checkpoints: dict[str, Path]) -> None:
    """Whole and chunked prompts and single tokens, mixed; attention in the absorbed form against the expanded one."""
    path = checkpoints[name]
    options = {"dtype": torch.float32, "experts_implementation": "eager"}  # as in checkpoints.Reference
    model = transformers.AutoModelForCausalLM.from_pretrained(path, **options).eval()
    sequences = [torch.tensor(prompt) for prompt in make_prompts(VOCAB_SIZE, LENGTHS)]
    with torch.no_grad():
        expected = [model(sequence.unsqueeze(0)).logits[0] for sequence in sequences]
    c = read_config(path)
    for tp, pp in LAYOUTS:
        got = run_layout(c, tp, pp, lambda stage: fill(path, stage), sequences)
        for mine, reference in zip(got, expected, strict=True):
            worst = (mine - reference).abs().max().item()
            assert worst < 1e-3, f"tp={tp} pp={pp}: logits differ by {worst}, of {reference.abs().max():.0f}"


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 2)])
def test_the_prefix_cache_holds_latents(tp: int, pp: int, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """The same tokens from a cache as without one, in chunks, with too few blocks, and alone."""
    prompts = make_prompts(VOCAB_SIZE, (5, 70, 33))
    params = [SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True, logprobs=1)] * len(prompts)
    runs = [Run(name="first", prompts=prompts, params=params), Run(name="again", prompts=prompts, params=params)]
    llm = {
        "model": str(checkpoints["deepseek_v3"]), "dtype": "float32", "tensor_parallel_size": tp,
        "pipeline_parallel_size": pp, "max_model_len": 96, "num_gpu_blocks_override": 64, "num_threads": 1,
        "disable_log_stats": True,
    }  # fmt: skip
    variants = {
        "cached": {}, "not cached": {"enable_prefix_caching": False}, "chunked": {"max_num_batched_tokens": 16},
        "few blocks": {"num_gpu_blocks_override": 9},
    }  # fmt: skip
    jobs = [Job(name=name, llm=llm | change, runs=runs) for name, change in variants.items()]
    found = run_jobs(jobs, tmp_path, ranks=tp * pp, timeout=120, torchrun=tp * pp > 1)
    plain = found["not cached"].runs["first"]
    assert [completion.num_cached_tokens for completion in found["cached"].runs["again"]] == [0, 64, 32]
    assert found["few blocks"].num_preemptions > 0
    for name in variants:
        for run in runs:
            for completion, expected in zip(found[name].runs[run.name], plain, strict=True):
                (ours,), (theirs,) = completion.choices, expected.choices
                assert ours.token_ids == theirs.token_ids, f"{name}, {run.name}"


# --------------------------------------------------------------------------------------------- what a rank holds


@pytest.mark.parametrize("tp", [1, 2, 5])
def test_every_rank_keeps_one_latent_a_token(tp: int, checkpoints: dict[str, Path]) -> None:
    c = read_config(checkpoints["deepseek_v3"])
    for index in range(tp):
        (stage,) = build_stages(c, ThreadGroup(Meeting(tp), index), 1, torch.device("meta"))
        assert stage.kv_bytes_per_token == 5 * (20 + 6) * 4, "of five layers: latent and rotated key, once"
        assert stage.kv_layout.values_in_keys
    memory = pages.allocate(3, 16, stage.kv_layout, 5, torch.float32, CPU)
    for keys, values in zip(memory.k, memory.v, strict=True):
        assert keys.shape == (3, 16, 1, 26) and values.shape == (3, 16, 1, 20)
        assert values.data_ptr() == keys.data_ptr()


@pytest.mark.parametrize("name", SPLIT_EXPERTS)
def test_ranks_share_out_the_heads(name: str, checkpoints: dict[str, Path]) -> None:
    """Of 5 heads over 3 ranks two hold 2. What each rank reads is what its heads, experts and layers are made of."""
    path = checkpoints[name]
    c = read_config(path)
    held, read = [], []
    for index in range(3):
        (stage,) = build_stages(c, ThreadGroup(Meeting(3), index), 1)
        checkpoint = Checkpoint(path)
        load_weights(stage, checkpoint)
        held.append([layer.attention.num_q for layer in stage.layers])
        read.append(checkpoint.bytes_read)
        assert checkpoint.bytes_read == stage.parameter_bytes
        expansions = [module for module in stage.modules() if isinstance(module, LatentExpansion)]
        assert [tuple(e.weight.shape) for e in expansions] == [(held[-1][0] * 22, 20)] * 5
    assert held == [[2] * 5, [2] * 5, [1] * 5]


def test_layers_that_predict_further_tokens_are_not_read(checkpoints: dict[str, Path]) -> None:
    """num_nextn_predict_layers of them stand behind the last in the official checkpoints."""
    path = checkpoints["deepseek_v3"]
    fields = json.loads((path / "config.json").read_text())
    assert fields["num_nextn_predict_layers"] == 1 and fields["num_hidden_layers"] == 5
    (stage,) = build_stages(read_config(path), ThreadGroup(Meeting(1), 0), 1, torch.device("meta"))
    names = {source.name for layer in stage.modules() for spec in getattr(layer, "specs", {}).values()
             for source in spec.sources}  # fmt: skip
    assert any(name.startswith("model.layers.4.") for name in names)
    assert not any(name.startswith("model.layers.5.") for name in names)


@needs_native
def test_packing_frees_the_loaded_form(checkpoints: dict[str, Path]) -> None:
    path = checkpoints["deepseek_v2"]
    (stage,) = build_stages(read_config(path), ThreadGroup(Meeting(1), 0), 1)
    fill(path, stage)
    for module in stage.modules():
        if isinstance(module, LatentExpansion):
            assert isinstance(module._absorb, PackedHeads) and module.weight.numel() == 0


# ----------------------------------------------------------------------------------------------------- recording


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SPLIT_EXPERTS)
def test_a_recorded_stage_gives_the_same_bits(name: str, dtype: torch.dtype, checkpoints: dict[str, Path]) -> None:
    c = dataclasses.replace(read_config(checkpoints[name]), dtype=str(dtype).removeprefix("torch."))
    stage = Stage(c, range(5), alone(), is_first=True, is_last=True, dtype=dtype, device=CPU)
    with torch.inference_mode():
        fill(checkpoints[name], stage)
        memory, copy = (pages.allocate(20, 4, stage.kv_layout, 5, dtype, CPU) for _ in range(2))
        forward = tape.record_stage(stage, memory)
        assert forward is not stage
        for rows, keys in (([1], [1]), ([1, 1, 1], [9, 1, 30]), ([7, 1, 12], [7, 20, 29]), ([40], [40])):
            x = torch.randint(0, VOCAB_SIZE, (sum(rows),))
            got, expected = (f(x, batch(m, rows, keys)) for f, m in ((forward, memory), (stage, copy)))
            assert torch.equal(got, expected)
        for ours, theirs in zip(memory.k, copy.k, strict=True):
            assert torch.equal(ours, theirs)


def batch(memory: pages.Pages, rows: list[int], keys: list[int]) -> ForwardContext:
    """Sequences with so many rows, the last of so many keys, in blocks of their own."""
    width = -(-max(keys) // 4)
    table = torch.arange(len(rows) * width, dtype=torch.int32).view(len(rows), width) % 20
    positions = torch.cat([torch.arange(k - r, k) for r, k in zip(rows, keys, strict=True)])
    owner = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(rows))
    return ForwardContext(
        positions=positions,
        slots=table[owner, positions // 4].long() * 4 + positions % 4,
        block_table=table,
        query_start=torch.tensor([0, *rows]).cumsum(0).int(),
        seq_lens=torch.tensor(keys, dtype=torch.int32),
        k_pages=memory.k,
        v_pages=memory.v,
    )


# ------------------------------------------------------------------------------------------------------- reading

LITE = {  # DeepSeek-V2-Lite's config.json
    "architectures": ["DeepseekV2ForCausalLM"], "attention_bias": False, "eos_token_id": 100001,
    "first_k_dense_replace": 1, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 10944,
    "kv_lora_rank": 512, "max_position_embeddings": 163840, "moe_intermediate_size": 1408, "moe_layer_freq": 1,
    "n_group": 1, "n_routed_experts": 64, "n_shared_experts": 2, "norm_topk_prob": False, "num_attention_heads": 16,
    "num_experts_per_tok": 6, "num_hidden_layers": 27, "num_key_value_heads": 16, "q_lora_rank": None,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096, "type": "yarn",
    },
    "rope_theta": 10000, "routed_scaling_factor": 1.0, "scoring_func": "softmax", "tie_word_embeddings": False,
    "topk_group": 1, "topk_method": "greedy", "torch_dtype": "bfloat16", "v_head_dim": 128, "vocab_size": 102400,
}  # fmt: skip
V3 = LITE | {
    "architectures": ["DeepseekV3ForCausalLM"], "q_lora_rank": 1536, "n_routed_experts": 256, "n_group": 8,
    "topk_group": 4, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "routed_scaling_factor": 2.5,
    "norm_topk_prob": True, "num_nextn_predict_layers": 1,
}  # fmt: skip


def load(path: Path, fields: dict[str, object]) -> ModelConfig:
    (path / "config.json").write_text(json.dumps(fields))
    return load_model_config(path, EngineConfig(model=str(path)))


def test_a_real_config(tmp_path: Path) -> None:
    c = load(tmp_path, LITE)
    assert c.mla is not None and c.moe is not None and c.rope is not None
    assert (c.mla.q_lora_rank, c.mla.latent_dim, c.mla.qk_head_dim, c.mla.v_head_dim) == (0, 576, 192, 128)
    assert c.mla.softmax_scale == pytest.approx(192**-0.5 * 1.2608041**2, rel=1e-6)  # 0.0707 * ln 40 + 1
    assert (c.rope.dim, c.rope.interleaved, c.max_position) == (64, True, 163840)
    assert c.moe.sparse == (False,) + (True,) * 26
    assert (c.moe.shared_intermediate_size, c.moe.top_k, c.moe.grouping, c.moe.scoring) == (2816, 6, None, "softmax")
    stage = Stage(c, range(27), alone(), is_first=True, is_last=True, dtype=torch.bfloat16, device=torch.device("meta"))
    routers = 26 * 64 * 2048 * 2  # held in float32
    assert (stage.parameter_bytes - routers) // 2 == 15_706_484_224, "the parameters of the published checkpoint"
    assert stage.kv_bytes_per_token == 27 * 576 * 2


def test_what_one_version_has_and_the_other_not(tmp_path: Path) -> None:
    c = load(tmp_path, V3)
    assert c.mla is not None and c.moe is not None and c.moe.grouping is not None
    assert (c.mla.q_lora_rank, c.moe.scoring, c.moe.correction_bias, c.moe.renormalize) == (1536, "sigmoid", True, True)
    assert (c.moe.grouping.num_groups, c.moe.grouping.top_groups, c.moe.grouping.score) == (8, 4, "top2")
    assert load(tmp_path, V3 | {"moe_layer_freq": 2}).moe.sparse[:5] == (False, False, True, False, True)
    assert load(tmp_path, V3 | {"first_k_dense_replace": 27}).moe is None
    assert load(tmp_path, V3 | {"rope_interleave": False}).rope.interleaved is False
    assert load(tmp_path, V3 | {"rope_scaling": None}).mla.softmax_scale == 192**-0.5


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        (LITE | {"norm_topk_prob": True}, "norm_topk_prob is True; it must be false"),
        (LITE | {"head_dim": 128}, r"head_dim is 128; it must be qk_rope_head_dim \(64\)"),
        (LITE | {"kv_lora_rank": None}, "kv_lora_rank is missing; it must be a positive integer"),
        (LITE | {"first_k_dense_replace": -1}, "first_k_dense_replace is -1; it must be an integer of at least 0"),
        (LITE | {"scoring_func": "sigmoid"}, "scoring_func is 'sigmoid'; it must be one of softmax"),
        (V3 | {"topk_method": "greedy"}, "topk_method is 'greedy'; it must be one of noaux_tc"),
        (V3 | {"quantization_config": {"quant_method": "fp8"}}, "fp8"),
        (V3 | {"qk_rope_head_dim": 63}, "must be even"),
    ],
)
def test_what_cannot_be_read_is_named(fields: dict[str, object], problem: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=problem):
        load(tmp_path, fields)


def test_yarn_sharpens_the_softmax(checkpoints: dict[str, Path]) -> None:
    """The parity above is worth something only if the scale matters."""
    path = checkpoints["deepseek_v2_lite"]
    c = read_config(path)
    assert c.mla is not None
    sequences: list[Tensor] = [torch.tensor(prompt) for prompt in make_prompts(VOCAB_SIZE, LENGTHS)]
    plain = dataclasses.replace(c, mla=dataclasses.replace(c.mla, softmax_scale=18**-0.5))
    a, b = (run_layout(config, 1, 1, lambda stage: fill(path, stage), sequences)[0] for config in (c, plain))
    assert (a - b).abs().max() > 1e-2


def test_the_layer_is_that_of_the_family(checkpoints: dict[str, Path]) -> None:
    (stage,) = build_stages(read_config(checkpoints["deepseek_v3_dense"]), ThreadGroup(Meeting(1), 0), 1)
    assert all(isinstance(layer.attention, LatentAttention) for layer in stage.layers)
    assert stage.config.moe is None
