"""The server, with a fault inside its steps: torchrun ... faulty_server.py KIND ARGUMENTS.

KIND: "memory=TOKEN": rank 1 finds no memory for a batch in which that token comes up. "batches": in each of the first
generations rank 0 sends the others something else than the batch that it runs itself.
"""

import os
import sys
from collections.abc import Callable

import numpy as np
import torch

from infer.engine import batch as messages
from infer.engine.batch import Batch, StepResult
from infer.engine.runner import Runner
from infer.launch import RankEnv, exit_if_failed_before, set_parent_death_signal
from infer.serve.server import run

BAD_STEP = 12
HEADER = 12  # words before the rows
GENERATION = int(os.environ["TORCHELASTIC_RESTART_COUNT"])


Run = Callable[[Runner, Batch], StepResult | None]


def short_of_memory(run: Run, token: int) -> Run:
    def fail_at_poison(runner: Runner, batch: Batch) -> StepResult | None:
        if token in batch.tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return run(runner, batch)

    return fail_at_poison


def wrong(encode: Callable[[Batch, int], np.ndarray]) -> Callable[[Batch, int], np.ndarray]:
    def encode_wrong(batch: Batch, generation: int) -> np.ndarray:
        words = encode(batch, generation)
        if batch.step == BAD_STEP and len(FAULTS) > GENERATION:
            FAULTS[GENERATION](batch, words)
        return words

    return encode_wrong


def unknown_token(batch: Batch, words: np.ndarray) -> None:
    words[HEADER + batch.rows.size] = 1 << 30


def wrong_step(batch: Batch, words: np.ndarray) -> None:
    words[3] += 1


def old_generation(batch: Batch, words: np.ndarray) -> None:
    words[2] -= 1


FAULTS = (unknown_token, wrong_step, old_generation)

ENV = RankEnv.from_environ()
exit_if_failed_before(ENV)
set_parent_death_signal(ENV)
kind, _, token = sys.argv.pop(1).partition("=")
if kind == "memory" and os.environ["RANK"] == "1":
    Runner.run = short_of_memory(Runner.run, int(token))  # type: ignore[method-assign]
if kind == "batches":
    messages.encode_batch = wrong(messages.encode_batch)
run(ENV)
