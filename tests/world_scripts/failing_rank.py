"""The server, on whose rank 1 loading fails: torchrun ... failing_rank.py KIND ARGUMENTS.

KIND: "error" raises a ValueError, "crash" ends the process without a word.
"""

import os
import sys
from typing import Any

from infer.engine import startup
from infer.serve.__main__ import main

kind = sys.argv.pop(1)


def failing_load(*args: Any) -> None:
    if kind == "crash":
        os._exit(9)
    raise ValueError("model.safetensors: tensor model.norm.weight went up in smoke")


if os.environ["RANK"] == "1":
    startup.load_weights = failing_load
main()
