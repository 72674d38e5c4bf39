"""--compile gives the tokens that are given without it, at layouts with and without sums over ranks."""

import itertools

import pytest
from checkpoints import VOCAB_SIZE, make_prompts
from world_scripts.jobs import Job, Run
from worlds import run_jobs

from infer.request import SamplingParams

PROMPTS = make_prompts(VOCAB_SIZE, (1, 7, 40, 90))
PARAMS = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tp", "pp", "model"),
    [
        (1, 1, "llama"),
        (1, 1, "qwen3"),
        (2, 1, "mistral"),
        (1, 2, "llama31"),
        (1, 1, "gpt2"),
        (1, 2, "gemma2"),
        (2, 1, "olmo2"),
        (1, 1, "gpt-neox"),
        (2, 1, "qwen2_moe"),
        (1, 1, "deepseek_v3"),
    ],
)
def test_compiled_stages_give_the_same_tokens(tp, pp, model, checkpoint_dirs, tmp_path):
    """In a batch of all prompts, some in chunks, and alone: one row, and one sequence, are shapes of their own."""
    llm = {
        "model": str(checkpoint_dirs[model]), "dtype": "float32", "tensor_parallel_size": tp,
        "pipeline_parallel_size": pp, "max_model_len": 128, "max_num_batched_tokens": 32,
        "num_gpu_blocks_override": 64, "num_threads": 1, "disable_log_stats": True,
    }  # fmt: skip
    params = [PARAMS] * len(PROMPTS)
    runs = [Run(name="mixed", prompts=PROMPTS, params=params)]
    runs.append(Run(name="alone", prompts=PROMPTS, params=params, alone=True))
    jobs = [Job(name="plain", llm=llm, runs=runs)]
    jobs += [Job(name=name, llm={**llm, "compile": True}, runs=runs) for name in ("compiled", "compiled again")]
    found = run_jobs(jobs, tmp_path, ranks=tp * pp, timeout=280, torchrun=tp * pp > 1)
    for name, compiled in itertools.product(("mixed", "alone"), ("compiled", "compiled again")):
        pairs = zip(found["plain"].runs[name], found[compiled].runs[name], strict=True)
        for number, (before, after) in enumerate(pairs):
            (a,), (b,) = before.choices, after.choices
            assert a.token_ids == b.token_ids, f"{name}, prompt {number}"
            for x, y in zip(a.logprobs, b.logprobs, strict=True):
                for token, (logprob, _) in x.items():
                    assert abs(logprob - y[token][0]) < 5e-4
