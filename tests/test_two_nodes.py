"""A script over two nodes."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from nodes import two_nodes
from serving import SMOLLM2
from worlds import ROOT, python_path

GENERATE = ROOT / "scripts" / "generate.py"


@pytest.mark.slow
def test_a_script_over_two_nodes(tmp_path: Path) -> None:
    """Two ranks on each of two nodes, tp 2 and pp 2, give what one process gives."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("The capital of France is\nOnce upon a time\nTwo plus two is\n")
    script = [str(GENERATE), str(prompts), "--model", str(SMOLLM2), "--max-tokens", "16", "--dtype", "float32"]
    environ = {**os.environ, "PYTHONPATH": python_path(ROOT)}
    alone = subprocess.run([sys.executable, *script], capture_output=True, text=True, timeout=120, env=environ)
    assert alone.returncode == 0, alone.stderr

    with two_nodes() as nodes:
        agents = [nodes.start(i, *script, "--pipeline-parallel-size", "2") for i in range(2)]
        deadline = time.monotonic() + 150
        statuses = [agent.wait(deadline - time.monotonic()) for agent in agents]
        assert statuses == [0, 0]
        assert nodes.log(0, "stdout") == alone.stdout
        for i in range(2):
            assert f"gloo uses the interface v{i} (10.77.0.{i + 1}), which leads to 10.77.0.1" in nodes.log(i)


@pytest.mark.slow
def test_a_user_s_error_ends_both_nodes(tmp_path: Path) -> None:
    """Only rank 0 reads the command line; the other node learns of its end, and nobody starts again and again."""
    with two_nodes() as nodes:
        arguments = ["-m", "infer.serve", "--model", tmp_path / "missing"]
        agents = [nodes.start(i, *arguments, ranks=1, restarts=3) for i in range(2)]
        deadline = time.monotonic() + 90
        assert all(agent.wait(deadline - time.monotonic()) for agent in agents)
        assert nodes.log(0).count("infer: error: ") == 1 and "missing" in nodes.log(0)
        assert "infer: error: " not in nodes.log(1)
