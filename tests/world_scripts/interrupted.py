"""Run by torchrun, or alone: a batch script that has its whole world told to end in the middle of its work.

interrupted.py MODEL SIGNAL HOW

HOW: "with" and "plain" tell whether the LLM is a context manager; "building" does not wait until it is there. Prints
"tidied up" when a `finally` has run.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from infer import LLM, SamplingParams
from infer.engine import startup
from infer.weights import Checkpoint

SECONDS = 2.0  # into the work; all of it would take minutes


def main() -> None:
    model, name, how = sys.argv[1:]
    number = signal.Signals[name]
    to = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else os.getpid()
    if how == "building":
        startup.Checkpoint = told_to_end_while_it_loads(startup.Checkpoint, lambda: os.kill(to, number))
    try:
        llm = LLM(model, num_gpu_blocks_override=2048, max_model_len=512, num_threads=1, dtype="float32")
        threading.Timer(SECONDS, os.kill, (to, number)).start()
        if how == "with":
            with llm:
                work(llm)
        else:
            work(llm)
    finally:
        print("tidied up", flush=True)


def told_to_end_while_it_loads(made: Callable[[Path], Checkpoint], tell: Callable[[], None]) -> Any:
    """Opens checkpoints; at the second, which weights are loaded from (the first is for checks), the signal comes."""
    opened: list[Path] = []

    def open_checkpoint(path: Path) -> Checkpoint:
        opened.append(path)
        if len(opened) == 2:
            tell()
            time.sleep(60)  # until the signal ends this
        return made(path)

    return open_checkpoint


def work(llm: LLM) -> None:
    prompts = [[10 + i % 900, 20] for i in range(5000)]
    llm.generate(prompts, SamplingParams(max_tokens=500, ignore_eos=True), use_tqdm=False)


main()
