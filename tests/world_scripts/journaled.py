"""Run by torchrun: a batch script with a journal, which kills itself in the middle of its first runs.

torchrun ... journaled.py MODEL RESULTS.json JOURNAL NUM_KILLS
"""

import dataclasses
import json
import os
import signal
import sys
from pathlib import Path

from infer import LLM, RequestOutput, SamplingParams
from infer.journal import Journal
from infer.request import Request

ADDED_BEFORE_DEATH = 5


class Dying(Journal):
    """Dies with its process once it has taken in a few prompts more: some on the disk, some not yet."""

    num_added = 0

    def add(self, request: Request, output: RequestOutput) -> None:
        super().add(request, output)
        self.num_added += 1
        if self.num_added == ADDED_BEFORE_DEATH - 1:
            self.flush()
        if self.num_added == ADDED_BEFORE_DEATH:
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    model, results, journal, num_kills = sys.argv[1:]
    if int(os.environ["TORCHELASTIC_RESTART_COUNT"]) < int(num_kills):
        import infer.llm

        infer.llm.Journal = Dying  # type: ignore[misc]
    llm = LLM(model, journal=journal, max_num_seqs=4, kv_cache_memory_bytes="16M", num_threads=1)
    prompts = [[10 + i, 20 + i, 30 + i] for i in range(24)]
    params = [SamplingParams(temperature=i % 2, max_tokens=4 + i % 5) for i in range(24)]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    Path(results).write_text(json.dumps([dataclasses.asdict(output) for output in outputs]))


main()
