"""throughput and latency: the engine alone, without HTTP, beside the limit of the hardware."""

import argparse
import contextlib
import random
import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch

from infer.bench.limits import Hardware, Limit, Model
from infer.bench.machine import measure
from infer.bench.report import write_json
from infer.config import EngineConfig, from_args
from infer.engine.loop import Engine
from infer.engine.startup import check
from infer.launch import RankEnv
from infer.process import Process
from infer.request import Request, SamplingParams
from infer.tables import table


def run(args: argparse.Namespace) -> int:
    """Runs the command on rank 0; returns the exit status. Raises ValueError for what does not fit the model."""
    with open_engine(from_args(args, EngineConfig), f"-m infer.bench {args.command}") as engine:
        bench = Bench(engine, args)
        report = bench.throughput() if args.command == "throughput" else bench.latency()
    write_json(args.output_json, report)
    return 0


@contextlib.contextmanager
def open_engine(config: EngineConfig, program: str) -> Iterator[Engine]:
    """An engine over all ranks, closed on leaving. It has no tokenizer: prompts are random token ids.

    program: as Topology.resolve has it. Raises ValueError for what cannot be built.
    """
    process = Process.join(RankEnv.from_environ())
    check(config, process.world.size, program)
    engine = process.build_engine(config)
    try:
        yield engine
    finally:
        engine.close()
        process.engine = None


class Timing:
    """Seconds of one run: in all, until every request had its first token, and per token after that."""

    def __init__(self, total: float, first_token: float, output_len: int):
        self.total, self.first_token = total, first_token
        self.between_tokens = (total - first_token) / max(1, output_len - 1)


class Bench:
    """An engine with nothing else to do. Raises ValueError where the requests do not fit the model."""

    def __init__(self, engine: Engine, args: argparse.Namespace):
        self._engine, self._args, self._env = engine, args, RankEnv.from_environ()
        longest = args.input_len + args.output_len
        if longest > self._engine.max_model_len:
            raise ValueError(f"--input-len + --output-len is {longest}; the model takes {self._engine.max_model_len}")
        self._model = Model.of(self._engine.model_config)
        self._hardware: Hardware | None = None

    # ------------------------------------------------------------------ the commands

    def throughput(self) -> dict[str, Any]:
        """Output tokens per second for each concurrency, the best of a few runs."""
        args, runs = self._args, []
        self._run(2, 99)  # first use of everything
        for count in args.concurrency:
            self._measure()
            before = self._engine.pipeline_time()
            timing = min((self._run(count, repeat) for repeat in range(args.repeats)), key=lambda timing: timing.total)
            pipeline = self._engine.pipeline_time().since(before)
            run = {
                "concurrency": count,
                "output_tokens_per_second": round(count * args.output_len / timing.total, 1),
                "seconds": round(timing.total, 3),
                "seconds_to_first_tokens": round(timing.first_token, 3),
            }
            if len(pipeline.busy) > 1:
                run["pipeline_bubble"] = round(pipeline.bubble, 3)
            runs.append(run)
            print(f"{count} requests: {run['output_tokens_per_second']} output tokens/s", file=sys.stderr, flush=True)
        self._measure()
        for run in runs:
            limit = self._limit(run["concurrency"])
            run["limit_output_tokens_per_second"] = round(run["concurrency"] * args.output_len / limit.total, 1)
            run["limit_seconds_to_first_tokens"] = round(limit.prefill, 4)
            run["share_of_limit"] = round(run["output_tokens_per_second"] / run["limit_output_tokens_per_second"], 3)
        self._print_throughput(runs)
        return {**self._about(), "runs": runs}

    def _print_throughput(self, runs: list[dict[str, Any]]) -> None:
        self._print_heading(f"Output tokens per second, prefill included; best of {self._args.repeats}")
        has_stages = "pipeline_bubble" in runs[0]
        header = ["requests", "tokens/s", "limit", "share", "seconds", "to first tokens", "limit"]
        rows = []
        for run in runs:
            row = [
                str(run["concurrency"]),
                f"{run['output_tokens_per_second']:.1f}",
                f"{run['limit_output_tokens_per_second']:.1f}",
                f"{100 * run['share_of_limit']:.0f}%",
                f"{run['seconds']:.2f}",
                f"{run['seconds_to_first_tokens']:.3f}",
                f"{run['limit_seconds_to_first_tokens']:.3f}",
            ]
            rows.append([*row, f"{100 * run['pipeline_bubble']:.1f}%"] if has_stages else row)
        print(table([*header, "pipeline bubble"] if has_stages else header, rows), flush=True)

    def latency(self) -> dict[str, Any]:
        """Seconds of a batch: to the end, until all have their first token, and between tokens."""
        args = self._args
        for repeat in range(args.num_iters_warmup):
            self._run(args.batch_size, 1000 + repeat)
        self._measure()
        timings = [self._run(args.batch_size, repeat) for repeat in range(args.num_iters)]
        self._measure()
        limit = self._limit(args.batch_size)
        limits = {
            "total": limit.total,
            "first_token": limit.prefill,
            "between_tokens": limit.decode / max(1, args.output_len - 1),
        }
        report: dict[str, Any] = {**self._about(), "batch_size": args.batch_size}
        rows = []
        for name, least in limits.items():
            values = [getattr(timing, name) for timing in timings]
            median = statistics.median(values)
            report[name] = {"median": median, "min": min(values), "max": max(values), "limit": least}
            figures = [f"{1e3 * value:.2f}" for value in (median, min(values), max(values), least)]
            rows.append([name.replace("_", " "), *figures, f"{100 * least / median:.0f}%" if median else "-"])
        self._print_heading(f"Milliseconds of a batch of {args.batch_size}, {args.num_iters} runs")
        print(table(["", "median", "min", "max", "limit", "share"], rows), flush=True)
        return report

    # ------------------------------------------------------------------ the parts

    def _about(self) -> dict[str, Any]:
        args, hardware = self._args, self._hardware
        assert hardware is not None
        config = self._engine.config
        return {
            "model": args.model,
            "dtype": hardware.dtype,
            "tensor_parallel_size": self._env.world_size // config.pipeline_parallel_size,
            "pipeline_parallel_size": config.pipeline_parallel_size,
            "input_len": args.input_len,
            "output_len": args.output_len,
            "hardware": {
                "name": hardware.name,
                "description": hardware.words,
                "bytes_read_per_second": round(hardware.bandwidth),
                "matrix_operations_per_second": round(hardware.rate),
            },
            "torch": torch.__version__,
        }

    def _print_heading(self, what: str) -> None:
        print(f"{self._hardware}")
        print(f"{what}; {self._args.input_len} tokens in, {self._args.output_len} out")

    def _measure(self) -> None:
        """Measures the hardware while the engine is idle; the best of all times counts."""
        dtype = getattr(torch, self._engine.model_config.dtype)
        self._hardware = measure(self._engine.built.runner.device, dtype, self._env).best(self._hardware)

    def _limit(self, count: int) -> Limit:
        assert self._hardware is not None
        return self._model.run(self._hardware, count, self._args.input_len, self._args.output_len)

    def _run(self, count: int, repeat: int) -> Timing:
        """One run of `count` requests at once, straight on the engine. No two runs share a prompt."""
        args, engine = self._args, self._engine
        rng = random.Random(1000 * repeat + count)
        low, high = min(100, engine.model_config.vocab_size // 2), min(49000, engine.model_config.vocab_size)
        params = SamplingParams(temperature=0, max_tokens=args.output_len, ignore_eos=True)
        requests = [
            Request(
                request_id=f"{repeat}-{count}-{i}",
                prompt_token_ids=[rng.randrange(low, high) for _ in range(args.input_len)],
                params=params,
                seed=0,
            )
            for i in range(count)
        ]
        waiting = {request.request_id for request in requests}
        started = first = time.perf_counter()
        for request in requests:
            engine.submit(request)
        while engine.has_work:
            for output in engine.step():
                if output.request_id in waiting:
                    waiting.discard(output.request_id)
                    first = time.perf_counter()
        return Timing(time.perf_counter() - started, first - started, args.output_len)
