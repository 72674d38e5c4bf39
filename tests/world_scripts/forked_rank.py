"""A fork server that imports nothing, and whose ranks run the Python code of their first argument.

Where WAIT_FOR names a file, it takes as long to get ready as that is not there.
"""

import os
import sys
import time
from pathlib import Path

from infer import forkserver


def prepare() -> None:
    while (wanted := os.environ.get("WAIT_FOR")) and not Path(wanted).exists():
        time.sleep(0.005)


def run(env: object, task: object, imported: float) -> None:
    exec(sys.argv[1], {"env": env})


forkserver.main(prepare, run)
