"""Ranks as plain processes: torchrun would end the survivors before they have seen that a rank is gone."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from worlds import ROOT, free_port, one_at_a_time


def run_ranks(
    script: Path,
    directory: Path,
    scenario: str,
    ranks: int,
    *,
    timeout: float = 100,
    env: Mapping[str, str | list[str]] | None = None,
    killed: Collection[int] = (),
) -> tuple[dict[int, Any], str]:
    """What each rank reports (it writes DIRECTORY/RANK.json), by rank, and what all wrote to standard error.

    killed: the ranks that end by SIGKILL; all others must end well. env: variables, a list having one value a rank.
    """
    files_before = set(os.listdir("/dev/shm"))
    command = [sys.executable, str(script), scenario, str(directory)]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environ |= {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    deadline, processes = time.monotonic() + timeout, []
    with one_at_a_time(), open(directory / "stderr", "w+b") as errors:
        try:
            for rank in range(ranks):
                environ["RANK"] = str(rank)
                for name, value in (env or {}).items():
                    environ[name] = value[rank] if isinstance(value, list) else value
                processes.append(subprocess.Popen(command, env=environ, stderr=errors))
            statuses = [process.wait(max(0.1, deadline - time.monotonic())) for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.wait()
            said = Path(directory / "stderr").read_text()
            print(said)  # pytest shows it where a test fails
    assert statuses == [-signal.SIGKILL if rank in killed else 0 for rank in range(ranks)]
    assert set(os.listdir("/dev/shm")) <= files_before
    return {int(path.stem): json.loads(path.read_text()) for path in directory.glob("*.json")}, said
