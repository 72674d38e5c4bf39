"""Worlds in which every family runs at one layout: which layouts there are, and what each world does.

They run at LAYOUTS_ALWAYS, and at one of the other layouts, whose turn it is. The day decides, so that three days cover
all; it is printed with the tests, and INFER_TEST_LAYOUT=3x1 repeats it. INFER_TEST_LAYOUT=all takes them all.
"""

import datetime
import os
from pathlib import Path

from checkpoints import CORE, RECIPES, make_prompts
from recipes import VOCAB_SIZE
from world_scripts.jobs import Job, Run

from infer.request import SamplingParams

LAYOUTS_ALWAYS = [(1, 1), (2, 2)]  # (tp, pp)
LAYOUTS_IN_TURN = [(2, 1), (1, 2), (3, 1)]
NUM_TOKENS = 64
PROMPTS = make_prompts(VOCAB_SIZE, (1, 5, 33, 70))
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=3, prompt_logprobs=2)
# All prompts but the last fit one batch; that one is computed in two chunks, the first of them beside other prompts.
MAX_BATCHED_TOKENS = 48
MAX_MODEL_LEN = 160


def layouts() -> list[tuple[int, int]]:
    """Those that this run of the tests has. Raises ValueError for an INFER_TEST_LAYOUT that is none of them."""
    wanted = _wanted()
    names = {f"{tp}x{pp}": (tp, pp) for tp, pp in LAYOUTS_IN_TURN}
    if wanted == "all":
        return LAYOUTS_ALWAYS + LAYOUTS_IN_TURN
    if wanted and wanted not in names:
        raise ValueError(f"INFER_TEST_LAYOUT is {wanted!r}; it must be all, {', '.join(names)}")
    today = datetime.datetime.now(datetime.UTC).date().toordinal()
    return [*LAYOUTS_ALWAYS, names[wanted] if wanted else LAYOUTS_IN_TURN[today % len(LAYOUTS_IN_TURN)]]


def families(tp: int) -> list[str]:
    """Those that run with so many tensor-parallel ranks: expert parallelism says nothing where there is one.

    The core ones run in test_parity.py, at every layout; here only with all layouts, for the sake of time.
    """
    spread = {name for name, recipe in RECIPES.items() if (recipe.engine or {}).get("enable_expert_parallel")}
    left_out = (spread if tp == 1 else set()) | (set() if _wanted() == "all" else set(CORE))
    return [name for name in RECIPES if name not in left_out]


def _wanted() -> str:
    return os.environ.get("INFER_TEST_LAYOUT", "")


def family_job(name: str, path: Path, tp: int, pp: int) -> Job:
    engine = {
        "model": str(path), "dtype": "float32", "tensor_parallel_size": tp, "pipeline_parallel_size": pp,
        "max_model_len": MAX_MODEL_LEN, "max_num_batched_tokens": MAX_BATCHED_TOKENS, "num_gpu_blocks_override": 64,
        "disable_log_stats": True, "num_threads": 1, **(RECIPES[name].engine or {}),
    }  # fmt: skip
    return Job(name=name, llm=engine, runs=[Run(name="greedy", prompts=PROMPTS, params=[GREEDY] * len(PROMPTS))])
