"""startup: the server started as a user would, and how long each phase takes until the first token. No torch here."""

import argparse
import contextlib
import dataclasses
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from infer.bench.report import child_error, positive, write_json
from infer.config import EngineConfig, ServerConfig, add_flags, from_args
from infer.serve.timeline import read_line
from infer.tables import table

HOST = "127.0.0.1"
POLL_SECONDS = 0.01
END_SECONDS = 15.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `startup`: those of the engine, which the server gets, and a few of its own."""
    add_flags(parser, EngineConfig)
    parser.add_argument("--input-len", type=positive, default=16, help="tokens of the first prompt (default: 16)")
    parser.add_argument("--repeats", type=positive, default=3, help="starts, of which the median counts (default: 3)")
    parser.add_argument("--timeout", type=positive, default=600, help="seconds a start may take (default: 600)")


def run(args: argparse.Namespace) -> int:
    """Starts the server a few times; returns the exit status. Raises ValueError where it does not start."""
    config = from_args(args, EngineConfig)
    starts = []
    for repeat in range(args.repeats):
        with serving(config, args.timeout) as server:
            starts.append(_first_token(server, args.input_len))
        print(f"start {repeat + 1} of {args.repeats}: {starts[-1].total:.2f} s", file=sys.stderr, flush=True)
    report = _report(starts, config)
    _print(report)
    write_json(args.output_json, report)
    return 0


# ------------------------------------------------------------------------------------------------------ the server


@dataclass
class Server:
    """A server that has just become ready. Times are seconds since it was started.

    frontend_bound: its port took connections; ready: /health said 200.
    """

    process: subprocess.Popen[bytes]
    port: int
    log_path: Path
    started: float
    deadline: float
    frontend_bound: float = 0.0
    ready: float = 0.0

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def age(self) -> float:
        return time.perf_counter() - self.started

    def fail(self, what: str) -> NoReturn:
        """Raises ValueError with the server's own error, if it logged one."""
        raise child_error(what, self.log)


@contextlib.contextmanager
def serving(config: EngineConfig, timeout: float) -> Iterator[Server]:
    """A server of this config on a free port of 127.0.0.1, ready; ended on leaving. Raises ValueError if it fails."""
    port = free_port()
    command = [*launcher(config), "-m", "infer.serve", *to_flags(config), *to_flags(ServerConfig(host=HOST, port=port))]
    with tempfile.TemporaryDirectory(prefix="infer-bench-") as directory:
        log_path = Path(directory, "log")
        with open(log_path, "wb") as log:
            started = time.perf_counter()
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        server = Server(process, port, log_path, started, started + timeout)
        try:
            _await_ready(server)
            yield server
        finally:
            _end(process)


def to_flags(config: EngineConfig | ServerConfig) -> list[str]:
    """The command line that parses to this config."""
    flags = []
    for field in dataclasses.fields(config):
        name, value = field.name.replace("_", "-"), getattr(config, field.name)
        if value == field.default:
            continue
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        else:
            values = value if "metavar" in field.metadata else [value]  # a flag with several values, once for each
            # One word with "=": a value may begin with a dash.
            flags += [f"--{name}={_as_text(value)}" for value in values]
    return flags


def _as_text(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return json.dumps(value) if isinstance(value, dict) else str(value)


def launcher(config: EngineConfig) -> list[str]:
    """The command that a module runs with: Python for one rank, torchrun for several."""
    ranks = (config.tensor_parallel_size or 1) * config.pipeline_parallel_size
    if ranks == 1:
        return [sys.executable]
    rendezvous = ["--nnodes", "1", "--node-rank", "0", "--master-addr", HOST, "--master-port", str(free_port())]
    return [sys.executable, "-m", "torch.distributed.run", *rendezvous, "--nproc-per-node", str(ranks)]


def free_port() -> int:
    """A port of 127.0.0.1 that nobody has now."""
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        return int(listener.getsockname()[1])


def _await_ready(server: Server) -> None:
    while True:
        status = _health(server.port)
        if status is not None and not server.frontend_bound:
            server.frontend_bound = server.age()
        if status == 200:
            server.ready = server.age()
            return
        if server.process.poll() is not None:
            server.fail(f"the server ended with status {server.process.returncode} before it was ready")
        if time.perf_counter() > server.deadline:
            server.fail(f"the server was not ready after {server.age():.0f} s (--timeout)")
        time.sleep(POLL_SECONDS)


def _health(port: int) -> int | None:
    """The status of /health; 0 where a connection is taken but not answered yet, None where it is refused."""
    connection = http.client.HTTPConnection(HOST, port, timeout=1.0)
    try:
        connection.connect()
    except OSError:
        return None
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return 0
    finally:
        connection.close()


def _end(process: subprocess.Popen[bytes]) -> None:
    """Asks the server to end, then forces it. Its ranks and frontend end with the process started here."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


# ------------------------------------------------------------------------------------------------------ the phases


@dataclass
class Start:
    """One start. phases: what followed what, in seconds that add up to total. Marks: seconds since the start."""

    phases: list[tuple[str, float]]
    frontend_bound: float
    ready: float
    total: float


def _first_token(server: Server, input_len: int) -> Start:
    """Asks for one token, and puts together what was seen from here with what rank 0 says of itself."""
    body = {"prompt": list(range(2, 2 + input_len)), "max_tokens": 1, "temperature": 0, "ignore_eos": True}
    connection = http.client.HTTPConnection(HOST, server.port, timeout=max(1.0, server.deadline - time.perf_counter()))
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        text = response.read().decode("utf-8", "replace")
    except (OSError, http.client.HTTPException) as error:
        server.fail(f"the first request failed: {error}")
    finally:
        connection.close()
    total = server.age()
    if response.status != 200:
        server.fail(f"the first request failed: HTTP {response.status} {text[:300]}")
    inside = read_line(server.log)
    if not inside:
        server.fail('the server logged no line "Start-up took ..."')
    launching = server.ready - sum(seconds for _, seconds in inside)
    phases = [("launching", max(0.0, launching)), *inside, ("first token", total - server.ready)]
    return Start(phases, server.frontend_bound, server.ready, total)


def _report(starts: list[Start], config: EngineConfig) -> dict[str, Any]:
    """The start of the median total (the lower of two), so that its phases add up, and the totals of all."""
    middle = sorted(starts, key=lambda start: start.total)[(len(starts) - 1) // 2]
    return {
        "model": config.model,
        "tensor_parallel_size": config.tensor_parallel_size or 1,
        "pipeline_parallel_size": config.pipeline_parallel_size,
        "phases": {name: round(seconds, 3) for name, seconds in middle.phases},
        "frontend_bound": round(middle.frontend_bound, 3),
        "ready": round(middle.ready, 3),
        "total": round(middle.total, 3),
        "totals": [round(start.total, 3) for start in starts],
    }


def _print(report: dict[str, Any]) -> None:
    at, rows = 0.0, []
    for name, seconds in report["phases"].items():
        at += seconds
        rows.append([name, f"{seconds:.2f}", f"{at:.2f}"])
    print(table(["phase of rank 0", "seconds", "at"], rows))
    print(f"Frontend takes connections after {report['frontend_bound']:.2f} s, ready after {report['ready']:.2f} s")
    each = ", ".join(f"{total:.2f}" for total in report["totals"])
    print(f"Start to first token: {report['total']:.2f} s (median of {each} s)", flush=True)
