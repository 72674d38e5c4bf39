"""The harness of the torchrun tests: what hangs is ended whole, and what it said is told."""

import subprocess

import pytest
import worlds
from worlds import SCRIPTS, WorldTimeout, marked_processes, run_world


@pytest.mark.parametrize(("torchrun", "timeout"), [(False, 3), pytest.param(True, 20, marks=pytest.mark.slow)])
def test_a_world_that_hangs_is_ended_with_all_its_processes(torchrun, timeout, monkeypatch):
    marks, popen = [], subprocess.Popen
    monkeypatch.setattr(
        worlds.subprocess, "Popen", lambda *a, **k: marks.append(k["env"][worlds.MARK]) or popen(*a, **k)
    )
    with pytest.raises(WorldTimeout, match=rf"(?s)did not end within {timeout} s.*waiting for nothing"):
        run_world(SCRIPTS / "hang.py", ranks=1, torchrun=torchrun, timeout=timeout)
    assert len(marks) == 1 and marked_processes(marks[0]) == []


def test_what_each_rank_wrote_is_kept_apart():
    result = run_world(SCRIPTS / "say_rank.py", "word", ranks=2, timeout=60, restarts=1)
    assert result.returncode != 0
    told = [(log.attempt, log.rank, log.stdout.split(), log.stderr.split()) for log in result.ranks]
    assert told == [
        (attempt, rank, ["out", str(rank), "word"], ["err", str(rank)]) for attempt in (0, 1) for rank in (0, 1)
    ]
