"""Run by torchrun: tries engines that cannot be built, then builds one that can, all in one world.

    torchrun ... bad_engines.py ATTEMPTS.json RESULTS.json

ATTEMPTS: {name: {"llm": arguments, "fail": exception name or null}}; with "fail", rank 1 raises it while loading.
RESULTS: {name: [exception name, message, seconds]}, and what the good engine did under "good".
"""

import builtins
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from infer import LLM, SamplingParams
from infer.engine import startup


def main() -> None:
    with open(sys.argv[1]) as file:
        attempts = json.load(file)
    fail_on_rank_1([attempt.get("fail") for attempt in attempts.values()])
    results: dict[str, Any] = {}
    for name, attempt in attempts.items():
        if name == "good":
            results[name] = good(attempt["llm"])
        else:
            results[name] = error_of(lambda llm=attempt["llm"]: LLM(**llm).close())
    with open(sys.argv[2], "w") as file:
        json.dump(results, file)


def error_of(attempt: Callable[[], object]) -> list[Any]:
    started = time.monotonic()
    try:
        attempt()
    except Exception as error:
        return [type(error).__name__, str(error), time.monotonic() - started]
    return ["", "no error", time.monotonic() - started]


def fail_on_rank_1(failures: list[str | None]) -> None:
    """Makes loading fail on rank 1, once for each of the names there, in their order."""
    if os.environ.get("RANK") != "1":
        return
    load, left = startup.load_weights, [name for name in failures if name]

    def failing_load(*args: Any) -> None:
        if left:
            raise getattr(builtins, left.pop(0))("rank 1 has run out of luck")
        load(*args)

    startup.load_weights = failing_load


def good(arguments: dict[str, Any]) -> dict[str, Any]:
    """After all the failures: an engine that works, and what it refuses without harm."""
    llm, greedy = LLM(**arguments), SamplingParams(temperature=0.0, max_tokens=4)
    refused = {
        "second LLM": error_of(lambda: LLM(**arguments)),
        "long": error_of(lambda: llm.generate([[5], [5] * 64], greedy, use_tqdm=False)),
        "empty": error_of(lambda: llm.generate([[]], greedy, use_tqdm=False)),
        "token": error_of(lambda: llm.generate([5, 1009], greedy, use_tqdm=False)),
        "type": error_of(lambda: llm.generate([[5, "a"]], greedy, use_tqdm=False)),
        "keys": error_of(lambda: llm.generate([{"prompt": "a"}], greedy, use_tqdm=False)),
        "params": error_of(lambda: llm.generate([[5], [6]], [greedy], use_tqdm=False)),
        "bias": error_of(lambda: llm.generate([5], SamplingParams(logit_bias={1009: 1.0}), use_tqdm=False)),
    }
    (output,) = llm.generate([5, 6, 7], greedy, use_tqdm=False)
    llm.close()
    llm.close()  # twice is as good as once
    refused["closed"] = error_of(lambda: llm.generate([5], greedy, use_tqdm=False))
    return {"refused": refused, "token_ids": output.outputs[0].token_ids}


main()
