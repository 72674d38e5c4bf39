"""Run by torchrun, or alone: a batch script that has its whole world told to end in the middle of its work.

interrupted.py MODEL SIGNAL HOW

HOW: "with" and "plain" tell whether the LLM is a context manager. Prints "tidied up" when a `finally` has run.
"""

import os
import signal
import sys
import threading

from infer import LLM, SamplingParams

SECONDS = 2.0  # into the work; all of it would take minutes


def main() -> None:
    model, name, how = sys.argv[1:]
    number = signal.Signals[name]
    to = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else os.getpid()
    llm = LLM(model, num_gpu_blocks_override=2048, max_model_len=512, num_threads=1, dtype="float32")
    threading.Timer(SECONDS, os.kill, (to, number)).start()
    try:
        if how == "with":
            with llm:
                work(llm)
        else:
            work(llm)
    finally:
        print("tidied up", flush=True)


def work(llm: LLM) -> None:
    prompts = [[10 + i % 900, 20] for i in range(5000)]
    llm.generate(prompts, SamplingParams(max_tokens=500, ignore_eos=True), use_tqdm=False)


main()
