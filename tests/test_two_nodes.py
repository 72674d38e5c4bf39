"""Two nodes on one machine: network namespaces joined by a veth pair, a torchrun agent in each."""

import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import SMOLLM2
from worlds import MARK, ROOT, kill_marked, one_at_a_time

ADDRESSES = ("10.77.0.1", "10.77.0.2")
GENERATE = ROOT / "scripts" / "generate.py"


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=20)


@pytest.fixture
def nodes() -> Iterator[list[str]]:
    """The names of two namespaces that reach each other; n0's interface is v0, n1's is v1."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("needs iproute2 and root for network namespaces")
    names = [f"infer-{os.getpid()}-{i}" for i in range(2)]
    try:
        for name in names:
            _ip("netns", "add", name)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces are not to be had here: {error.stderr.decode().strip()}")
    try:
        _ip("link", "add", "v0", "netns", names[0], "type", "veth", "peer", "name", "v1", "netns", names[1])
        for i, name in enumerate(names):
            _ip("-n", name, "addr", "add", f"{ADDRESSES[i]}/24", "dev", f"v{i}")
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "link", "set", f"v{i}", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, timeout=20)


@pytest.mark.slow
def test_a_script_over_two_nodes(nodes: list[str], tmp_path: Path) -> None:
    """Two ranks on each of two nodes, tp 2 and pp 2, give what one process gives."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("The capital of France is\nOnce upon a time\nTwo plus two is\n")
    script = [str(GENERATE), str(prompts), "--model", str(SMOLLM2), "--max-tokens", "16", "--dtype", "float32"]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    alone = subprocess.run([sys.executable, *script], capture_output=True, text=True, timeout=120, env=environ)
    assert alone.returncode == 0, alone.stderr

    mark = uuid.uuid4().hex
    agents = []
    with one_at_a_time():
        try:
            for i, name in enumerate(nodes):
                command = ["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run"]
                command += ["--nnodes", "2", "--node-rank", str(i), "--master-addr", ADDRESSES[0]]
                command += ["--master-port", "29517", "--nproc-per-node", "2", *script, "--pipeline-parallel-size", "2"]
                env = {**environ, "GLOO_SOCKET_IFNAME": f"v{i}", MARK: mark}
                agents.append(
                    subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
                )
            outputs = [agent.communicate(timeout=150) for agent in agents]
        finally:
            kill_marked(mark)
    report = "\n".join(f"node {i}\n{out}\n{err}" for i, (out, err) in enumerate(outputs))
    assert [agent.returncode for agent in agents] == [0, 0], report
    assert outputs[0][0] == alone.stdout, report
