"""suite: every benchmark on one model, each in processes of its own as a user would run it. No torch here."""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from infer.bench.report import child_error, positive, slug, write_json
from infer.bench.startup import launcher, serving, to_flags
from infer.config import EngineConfig
from infer.tables import markdown_table, table

TIMEOUT_SECONDS = 900
PROMPTS_PER_CLIENT = 3  # of the measurement over HTTP: each client sends so many requests, one after another
LAYOUTS = ((2, 1), (1, 2))  # (tp, pp), against one rank


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `suite`."""
    add = parser.add_argument
    add("--model", required=True, help="directory of a Hugging Face checkpoint, or a Hub id")
    add("--dtype", default="auto", help="of weights and activations (default: the checkpoint's)")
    add("--load-format", default="auto", help="dummy: random weights from config.json alone")
    add("--input-len", type=positive, default=128, help="tokens of each prompt (default: 128)")
    add("--output-len", type=positive, default=128, help="tokens generated (default: 128)")
    add("--concurrency", type=positive, nargs="+", default=[1, 8, 32], help="requests at once (default: 1 8 32)")
    add("--repeats", type=positive, default=1, help="runs of each throughput; the best counts (default: 1)")
    add("--starts", type=positive, default=3, help="starts of the server, of which the median counts (default: 3)")
    add("--output-dir", type=Path, help="writes the table to a file there, named after the CPU or GPU")


def run(args: argparse.Namespace) -> int:
    """Runs everything; returns the exit status. Raises ValueError, naming the command that failed."""
    if args.output_dir is not None and not args.output_dir.is_dir():
        raise ValueError(f"--output-dir {args.output_dir} is not a directory")
    with tempfile.TemporaryDirectory(prefix="infer-bench-") as directory:
        suite = Suite(args, Path(directory))
        offline = suite.throughput(1, 1)
        http = suite.http()
        layouts = {layout: suite.throughput(*layout) for layout in LAYOUTS}
        start = suite.startup()
    header, rows = _rows(offline, http, layouts, start)
    heading = _heading(offline)
    print(f"{heading}\n{table(header, rows, left=(0, 2))}", flush=True)
    if args.output_dir is not None:
        path = args.output_dir / f"{slug(offline['hardware']['name'])}.md"
        path.write_text(_page(args, offline, heading, header, rows))
        print(f"Written to {path}")
    report = {"offline": offline, "http": http, "layouts": [*layouts.values()], "startup": start}
    write_json(args.output_json, report)
    return 0


class Suite:
    """The commands of one suite. directory: for their figures."""

    def __init__(self, args: argparse.Namespace, directory: Path):
        self._args, self._directory = args, directory

    def _config(self, tp: int = 1, pp: int = 1) -> EngineConfig:
        args = self._args
        return EngineConfig(
            model=args.model,
            dtype=args.dtype,
            load_format=args.load_format,
            tensor_parallel_size=tp,
            pipeline_parallel_size=pp,
        )

    def throughput(self, tp: int, pp: int) -> dict[str, Any]:
        """The figures of `throughput` at a layout."""
        args, config = self._args, self._config(tp, pp)
        command = ["throughput", *to_flags(config), "--repeats", args.repeats, "--concurrency", *args.concurrency]
        command += ["--input-len", args.input_len, "--output-len", args.output_len]
        return self._measure(f"throughput, tp={tp} pp={pp}", launcher(config), command)

    def startup(self) -> dict[str, Any]:
        """The figures of `startup`."""
        command = ["startup", *to_flags(self._config()), "--repeats", self._args.starts]
        return self._measure("start-up", launcher(self._config()), command)

    def http(self) -> dict[int, dict[str, Any]]:
        """The figures of `serve` by concurrency, on one server."""
        args, found = self._args, {}
        self._say("starting the server")
        with serving(self._config(), TIMEOUT_SECONDS) as server:
            for count in args.concurrency:
                command = ["serve", "--base-url", server.url, "--ignore-eos", "--disable-tqdm", "--seed", count]
                command += ["--max-concurrency", count, "--num-prompts", PROMPTS_PER_CLIENT * count]
                command += ["--random-input-len", args.input_len, "--random-output-len", args.output_len]
                found[count] = self._measure(f"HTTP, {count} clients", [sys.executable], command)
        return found

    def _measure(self, what: str, launch: list[str], command: list[Any]) -> dict[str, Any]:
        """Runs `-m infer.bench COMMAND` and reads its JSON. Raises ValueError with what it said if it fails."""
        self._say(what)
        figures = self._directory / "figures.json"
        words = [*launch, "-m", "infer.bench", *map(str, command), "--output-json", str(figures)]
        try:
            done = subprocess.run(words, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            raise ValueError(f"{what}: no result after {TIMEOUT_SECONDS} s") from None
        if done.returncode != 0:
            raise child_error(f"{what} failed with status {done.returncode}", done.stderr)
        report: dict[str, Any] = json.loads(figures.read_text())
        return report

    def _say(self, what: str) -> None:
        print(f"{what} ...", file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------------- the table


def _rows(
    offline: dict[str, Any], http: dict[int, dict[str, Any]], layouts: dict[tuple[int, int], dict[str, Any]],
    start: dict[str, Any],
) -> tuple[list[str], list[list[str]]]:  # fmt: skip
    """The table's header and rows: a figure, and what it is a share of."""
    rows = []
    alone = {run["concurrency"]: run["output_tokens_per_second"] for run in offline["runs"]}
    for run in offline["runs"]:
        limit = f"{100 * run['share_of_limit']:.0f}% of the hardware's {run['limit_output_tokens_per_second']:.0f}"
        rows.append([_requests(run["concurrency"]), f"{run['output_tokens_per_second']:.1f} tokens/s", limit])
    for count, served in http.items():
        rate = served["output_throughput"]
        share = f"{100 * rate / alone[count]:.0f}% of offline"
        ttft = f"; first token {served['median_ttft_ms']:.0f} ms, p99 {served['p99_ttft_ms']:.0f} ms"
        failed = f"; {served['failed']} failed" if served["failed"] else ""
        rows.append([f"over HTTP, {_requests(count)}", f"{rate:.1f} tokens/s", share + ttft + failed])
    for (tp, pp), report in layouts.items():
        for run in report["runs"]:
            rate = run["output_tokens_per_second"]
            bubble = f"; bubble {100 * run['pipeline_bubble']:.0f}%" if "pipeline_bubble" in run else ""
            share = f"{100 * rate / alone[run['concurrency']]:.0f}% of one rank{bubble}"
            layout = f"TP={tp}" if tp > 1 else f"PP={pp}"
            rows.append([f"{layout}, {_requests(run['concurrency'])}", f"{rate:.1f} tokens/s", share])
    slowest = sorted(start["phases"].items(), key=lambda phase: -phase[1])[:3]
    words = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in slowest)
    rows.append(["start to first token", f"{start['total']:.2f} s", words])
    return ["what", "figure", "share"], rows


def _requests(count: int) -> str:
    return f"{count} request{'s' if count > 1 else ''}"


def _heading(offline: dict[str, Any]) -> str:
    hardware = offline["hardware"]
    return (
        f"{Path(offline['model']).name}, {offline['dtype']}, {offline['input_len']} tokens in, {offline['output_len']} "
        f"out, on {hardware['description']} ({hardware['bytes_read_per_second'] / 1e9:.1f} GB/s reads, "
        f"{hardware['matrix_operations_per_second'] / 1e9:,.0f} GFLOP/s), torch {offline['torch']}"
    )


def _page(
    args: argparse.Namespace, offline: dict[str, Any], heading: str, header: list[str], rows: list[list[str]]
) -> str:
    command = f"python -m infer.bench suite --model {args.model}"
    return f"# {offline['hardware']['name']}\n\n{heading}.\n\n    {command}\n\n{markdown_table(header, rows)}\n"
