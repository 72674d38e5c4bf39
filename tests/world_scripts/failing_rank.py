"""The server, on whose rank 1 loading fails: torchrun ... failing_rank.py KIND ARGUMENTS.

KIND: "error" raises a ValueError, "crash" ends the process without a word.
"""

import os
import sys
from typing import Any

from infer import launch
from infer.serve.server import run

ENV = launch.RankEnv.from_environ()
launch.exit_if_failed_before(ENV)
kind = sys.argv.pop(1)


def failing_load(*args: Any) -> None:
    if kind == "crash":
        os._exit(9)
    raise ValueError("model.safetensors: tensor model.norm.weight went up in smoke")


if os.environ["RANK"] == "1":
    from infer.engine import startup

    startup.load_weights = failing_load
run(ENV)
