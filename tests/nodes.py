"""Two nodes on one machine: namespaces of the network, of processes and of the host's name, with a torchrun in each.

The nodes share the machine's files and memory, but no rank can see a process of the other node, reach its shared memory
or signal it; and between them there is one link, which can be cut.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from worlds import MARK, ROOT, kill_marked, one_at_a_time, python_path

ADDRESSES = ("10.77.0.1", "10.77.0.2")  # inside the namespaces, where there are no others
MASTER_PORT = 29517


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=20)


@dataclass
class Nodes:
    """names: of the network namespaces. directory: for logs and temporary files. mark: of all their processes."""

    names: tuple[str, ...]
    directory: Path
    mark: str

    def start(
        self, index: int, *program: object, ranks: int = 2, restarts: int = 0, env: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """torchrun on a node. What it writes is appended to that node's log, for standard output and error each.

        The process returned is the parent of torchrun, with its exit status, and takes it along if it is killed.
        """
        temporary = self.directory / f"tmp{index}"
        temporary.mkdir(exist_ok=True)
        environ = {**os.environ, "PYTHONPATH": python_path(ROOT), MARK: self.mark, "TMPDIR": str(temporary)}
        environ.pop("GLOO_SOCKET_IFNAME", None)  # the program finds the interface itself
        command = ["ip", "netns", "exec", self.names[index]]
        command += ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--uts"]
        command += ["sh", "-c", f'hostname node{index} && exec "$@"', "sh"]
        command += [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(index)]
        command += ["--master-addr", ADDRESSES[0], "--master-port", str(MASTER_PORT), "--nproc-per-node", str(ranks)]
        command += ["--max-restarts", str(restarts), "--monitor-interval", "0.1", *map(str, program)]
        with open(self.log_path(index, "stdout"), "ab") as out, open(self.log_path(index, "stderr"), "ab") as err:
            return subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env={**environ, **(env or {})}, cwd=ROOT,
                start_new_session=True,
            )  # fmt: skip

    def log_path(self, index: int, stream: str) -> Path:
        return self.directory / f"node{index}.{stream}"

    def log(self, index: int, stream: str = "stderr") -> str:
        path = self.log_path(index, stream)
        return path.read_text(errors="replace") if path.exists() else ""

    def report(self) -> str:
        streams = [(i, stream) for i in range(len(self.names)) for stream in ("stdout", "stderr")]
        return "\n".join(f"--- node {i} {stream}\n{self.log(i, stream)}" for i, stream in streams)

    def cut(self) -> None:
        """Nothing gets from one node to the other any more, and nobody is told."""
        ip("-n", self.names[1], "link", "set", "v1", "down")

    def heal(self) -> None:
        ip("-n", self.names[1], "link", "set", "v1", "up")


@contextlib.contextmanager
def two_nodes() -> Iterator[Nodes]:
    """Skips the test where there can be none. One world runs at a time. Nothing is left of it."""
    if shutil.which("ip") is None or shutil.which("unshare") is None or os.geteuid() != 0:
        pytest.skip("needs root, iproute2 and util-linux for namespaces")
    mark = uuid.uuid4().hex
    names = tuple(f"infer-{mark[:8]}-{i}" for i in range(2))
    with one_at_a_time(), tempfile.TemporaryDirectory(prefix="infer-nodes-") as directory:
        nodes = Nodes(names, Path(directory), mark)
        try:
            _connect(names)
            yield nodes
        except BaseException:
            print(nodes.report())
            raise
        finally:
            kill_marked(mark)
            for name in names:
                subprocess.run(["ip", "netns", "delete", name], capture_output=True, timeout=20)


def _connect(names: tuple[str, ...]) -> None:
    try:
        for name in names:
            ip("netns", "add", name)
        subprocess.run(["unshare", "--pid", "--fork", "--mount-proc", "--uts", "true"], check=True, capture_output=True)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"namespaces are not to be had here: {error.stderr.decode().strip()}")
    ip("link", "add", "v0", "netns", names[0], "type", "veth", "peer", "name", "v1", "netns", names[1])
    for i, name in enumerate(names):
        ip("-n", name, "addr", "add", f"{ADDRESSES[i]}/24", "dev", f"v{i}")
        ip("-n", name, "link", "set", "lo", "up")
        ip("-n", name, "link", "set", f"v{i}", "up")
