"""The whole engine on a GPU: against transformers and itself on the CPU, graphs against eager, ranks that share it.

Everything is float32 unless it says otherwise. Sums differ in their last digits between devices and batch sizes, so
where two tokens are nearer than NEAR_TIE either may be taken; what follows is then another text, and not compared.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import RECIPES, VOCAB_SIZE, Reference, build_checkpoint, make_prompts, write_tokenizer
from safetensors.torch import save_file
from world_scripts.jobs import Job, JobResult, Run, read_results, write_json
from worlds import SCRIPTS, Result, run_world

from infer import LLM
from infer.config import EngineConfig
from infer.layers.declare import declared
from infer.models.config import load_model_config
from infer.models.decoder import Stage
from infer.parallel.groups import alone
from infer.request import SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch.cuda.is_available() is false: no GPU here"),
]

NEAR_TIE = 1e-3
TOLERANCE = 2e-3  # of log-probabilities
NUM_TOKENS = 24
PROMPTS = make_prompts(VOCAB_SIZE, (1, 5, 17, 40, 63, 90, 33, 8, 21))
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=2, prompt_logprobs=0)
DRAWN = SamplingParams(temperature=0.9, top_p=0.9, max_tokens=NUM_TOKENS, ignore_eos=True, seed=4)
RUNS = [
    Run(name="mixed", prompts=PROMPTS, params=[GREEDY] * len(PROMPTS)),  # prompts come in chunks while others decode
    Run(name="alone", prompts=PROMPTS[:4], params=[GREEDY] * 4, alone=True),
    Run(name="drawn", prompts=PROMPTS, params=[DRAWN] * len(PROMPTS)),
]
CAPTURED = "captured the CUDA graph of"


def random_checkpoint(path: Path) -> Path:
    """A small Llama with random weights, written without transformers, which the machine may lack."""
    sizes = {**RECIPES["llama"].config, "vocab_size": VOCAB_SIZE, "max_position_embeddings": 512}
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "eos_token_id": 1, **sizes}))
    c = load_model_config(path, EngineConfig(model=str(path)))
    meta = torch.device("meta")
    stage = Stage(c, range(c.num_layers), alone(), is_first=True, is_last=True, dtype=torch.float32, device=meta)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        source.name: torch.randn(source.shape, generator=generator) * 0.2 + (1.0 if spec.init == "ones" else 0.0)
        for _, spec in declared(stage)
        for source in spec.sources
    }
    save_file(tensors, path / "model.safetensors")
    write_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("gpu") / "llama")


def job(name: str, model: Path, **llm: object) -> Job:
    common = {
        "model": str(model), "dtype": "float32", "max_model_len": 256, "max_num_batched_tokens": 64,
        "num_gpu_blocks_override": 300, "disable_log_stats": True,
    }  # fmt: skip
    return Job(name=name, llm={**common, **llm}, runs=RUNS)


def run(jobs: list[Job], directory: Path, ranks: int = 1, on_cpu: bool = False) -> tuple[dict[str, JobResult], Result]:
    """The results by name, and the world's own words."""
    asked, answered = directory / "jobs.json", directory / "results.json"
    write_json(str(asked), jobs)
    env = {"CUDA_VISIBLE_DEVICES": ""} if on_cpu else None
    program = SCRIPTS / "run_jobs.py"
    result = run_world(program, asked, answered, ranks=ranks, timeout=240, env=env, torchrun=ranks > 1)
    assert result.returncode == 0, result.report()
    return read_results(str(answered)), result


@pytest.fixture(scope="module")
def on_cpu(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, JobResult]:
    """What the same program gives without a GPU, in float32 and in bfloat16."""
    jobs = [job("float32", model_dir), job("bfloat16", model_dir, dtype="bfloat16")]
    return run(jobs, tmp_path_factory.mktemp("cpu"), on_cpu=True)[0]


@pytest.fixture(scope="module")
def on_gpu(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, JobResult], str]:
    """One engine after the other in one process on the GPU; and the process's log."""
    jobs = [
        job("graphs", model_dir),
        job("eager", model_dir, enforce_eager=True),
        job("few sequences", model_dir, max_num_seqs=3),
        job("bfloat16", model_dir, dtype="bfloat16"),
    ]
    results, result = run(jobs, tmp_path_factory.mktemp("gpu-jobs"))
    return results, result.rank_stderr


def assert_same_text(actual: JobResult, expected: JobResult) -> None:
    for name in ("mixed", "alone"):
        for number, (ours, theirs) in enumerate(zip(actual.runs[name], expected.runs[name], strict=True)):
            (a,), (b,) = ours.choices, theirs.choices
            for at, (token, wanted) in enumerate(zip(a.token_ids, b.token_ids, strict=True)):
                logprobs = sorted((logprob for logprob, _ in b.logprobs[at].values()), reverse=True)
                if token != wanted:
                    assert logprobs[0] - logprobs[1] < NEAR_TIE, f"{name}, prompt {number}, token {at}"
                    break
                assert abs(a.logprobs[at][token][0] - b.logprobs[at][token][0]) < TOLERANCE
    drawn = zip(actual.runs["drawn"], expected.runs["drawn"], strict=True)
    same = [a.choices[0].token_ids == b.choices[0].token_ids for a, b in drawn]
    assert sum(same) >= len(same) - 1, "more than one random text differs"


def prompt_errors(actual: JobResult, expected: JobResult) -> float:
    """Mean difference of the log-probabilities of the prompts' tokens."""
    differences = [
        abs(next(iter(a.values()))[0] - next(iter(b.values()))[0])
        for ours, theirs in zip(actual.runs["mixed"], expected.runs["mixed"], strict=True)
        for a, b in zip(ours.prompt_logprobs[1:], theirs.prompt_logprobs[1:], strict=True)
    ]
    return float(np.mean(differences))


# ----------------------------------------------------------------------------------------------------- one rank


def test_graphs_give_what_the_cpu_gives(on_gpu, on_cpu):
    results, log = on_gpu
    assert log.count(CAPTURED) >= 3, log
    assert_same_text(results["graphs"], on_cpu["float32"])


def test_graphs_give_what_eager_gives(on_gpu):
    results, log = on_gpu
    assert "CUDA graphs are off: --enforce-eager" in log
    assert_same_text(results["graphs"], results["eager"])


def test_a_largest_bucket_of_three_sequences(on_gpu, on_cpu):
    results, log = on_gpu
    assert f"{CAPTURED} 3 sequences" in log
    assert_same_text(results["few sequences"], on_cpu["float32"])


def test_bfloat16_is_as_near_to_float32_as_on_the_cpu(on_gpu, on_cpu):
    """Prompts in bfloat16 go through FlashAttention, which float32 never sees."""
    usual = prompt_errors(on_cpu["bfloat16"], on_cpu["float32"])
    assert usual > 0 and prompt_errors(on_gpu[0]["bfloat16"], on_cpu["float32"]) < 2 * usual


def test_compiled_stages_give_what_the_cpu_gives(model_dir, on_cpu, tmp_path):
    results, result = run([job("compiled", model_dir, compile=True)], tmp_path)
    assert "torch.compile took" in result.rank_stderr and CAPTURED in result.rank_stderr
    assert_same_text(results["compiled"], on_cpu["float32"])


def test_a_closed_engine_gives_its_memory_back(model_dir):
    """All but what a process keeps for good, such as the workspaces of cuBLAS, which the first one leaves."""
    reserved = []
    for _ in range(3):
        with LLM(model=str(model_dir), max_model_len=256, max_num_seqs=8, kv_cache_memory_bytes=1 << 30) as llm:
            llm.generate(PROMPTS, [DRAWN] * len(PROMPTS), use_tqdm=False)
            assert torch.cuda.memory_reserved() > 1 << 30
        reserved.append(torch.cuda.memory_reserved())
    assert reserved[0] < 1 << 28 and max(reserved) == reserved[0], reserved


# --------------------------------------------------------------------------------------- ranks that share the GPU


def test_two_tensor_parallel_ranks_share_the_gpu(model_dir, on_cpu, tmp_path):
    results, result = run([job("tp", model_dir, tensor_parallel_size=2)], tmp_path, ranks=2)
    assert "ranks share a GPU" in result.rank_stderr and CAPTURED not in result.rank_stderr
    assert_same_text(results["tp"], on_cpu["float32"])


def test_two_stages_share_the_gpu(model_dir, on_cpu, tmp_path):
    results, result = run([job("pp", model_dir, pipeline_parallel_size=2)], tmp_path, ranks=2)
    for log in result.ranks:
        assert CAPTURED in log.stderr, result.report()
    assert_same_text(results["pp"], on_cpu["float32"])


# -------------------------------------------------------------------------------------------------- transformers


def test_greedy_equals_transformers(tmp_path):
    """Of every family; one has heads that no CUDA kernel covers, and runs the references."""
    pytest.importorskip("transformers", reason="transformers is not installed: the CPU's own results stand in for it")
    paths = {name: build_checkpoint(name, tmp_path / name) for name in RECIPES}
    (tmp_path / "run").mkdir()
    results, _ = run([job(name, path) for name, path in paths.items()], tmp_path / "run")
    for name, path in paths.items():
        reference, completions = Reference(path), results[name].runs["mixed"]
        for prompt, completion in zip(PROMPTS, completions, strict=True):
            (choice,) = completion.choices
            rows = reference.score(prompt, choice.token_ids).rows()
            taken = rows[np.arange(NUM_TOKENS), choice.token_ids]
            assert (rows.max(-1) - taken).max() < NEAR_TIE, f"{name}: a token is not the likeliest"
            ours = [choice.logprobs[at][token][0] for at, token in enumerate(choice.token_ids)]
            np.testing.assert_allclose(ours, taken, atol=TOLERANCE, rtol=0, err_msg=name)
