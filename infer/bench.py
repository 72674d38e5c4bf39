"""python -m infer.bench: how fast this machine runs a model, offline.

    python -m infer.bench throughput --model DIR --input-len 128 --output-len 128 --concurrency 1 8 32
    torchrun --nproc-per-node 2 -m infer.bench latency --model DIR -pp 2 --batch-size 8

throughput: N requests at once, random prompts, greedy, end tokens ignored; output tokens per second, prefill included.
latency: seconds of one batch from submission to its last token, to its first token, and between tokens.
"""

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from infer import launch
from infer.config import EngineConfig, Parser, add_flags, from_args


def main() -> None:
    env = None
    try:
        env = launch.RankEnv.from_environ()
        launch.exit_if_failed_before(env)
        launch.set_parent_death_signal(env)
        if env.rank != 0:
            from infer.process import Process

            Process.join(env)
        args = parse(sys.argv[1:])
        report = {"throughput": throughput, "latency": latency}[args.command](args)
        if args.output_json:
            Path(args.output_json).write_text(json.dumps(report, indent=2) + "\n")
    except ValueError as error:
        launch.fail(str(error), env)


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line. Raises ValueError."""
    parser = Parser(prog="python -m infer.bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    for name in ("throughput", "latency"):
        sub = commands.add_parser(name)
        add_flags(sub, EngineConfig)
        sub.add_argument("--input-len", type=_positive, default=128, help="tokens of each prompt (default: 128)")
        sub.add_argument("--output-len", type=_positive, default=128, help="tokens generated (default: 128)")
        sub.add_argument("--output-json", help="file for the figures")
        if name == "throughput":
            sub.add_argument("--concurrency", type=_positive, nargs="+", default=[1, 8, 32], help="requests at once")
            sub.add_argument("--repeats", type=_positive, default=2, help="runs of each; the best counts (default: 2)")
        else:
            sub.add_argument("--batch-size", type=_positive, default=8, help="requests at once (default: 8)")
            sub.add_argument("--num-iters-warmup", type=int, default=1, help="runs not counted (default: 1)")
            sub.add_argument("--num-iters", type=_positive, default=5, help="runs counted (default: 5)")
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return value


def throughput(args: argparse.Namespace) -> dict[str, Any]:
    """Output tokens per second for each concurrency, the best of a few runs."""
    runs = []
    with _build(args) as bench:
        bench.run(2, 99)  # first use of everything
        for count in args.concurrency:
            before = bench.llm.engine.pipeline_time()
            seconds = min(bench.run(count, repeat).total for repeat in range(args.repeats))
            rate = count * args.output_len / seconds
            run = {"concurrency": count, "output_tokens_per_second": round(rate, 1), "seconds": round(seconds, 3)}
            pipeline = bench.llm.engine.pipeline_time().since(before)
            if len(pipeline.busy) > 1:
                run["pipeline_bubble"] = round(pipeline.bubble, 3)
            print(f"{count:>4} requests: {rate:8.1f} output tokens/s" + _bubble_words(run), flush=True)
            runs.append(run)
    return {"model": args.model, "input_len": args.input_len, "output_len": args.output_len, "runs": runs}


def _bubble_words(run: dict[str, Any]) -> str:
    return f", pipeline bubble {100 * run['pipeline_bubble']:.1f}%" if "pipeline_bubble" in run else ""


def latency(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a batch: to the end, to the first token of all, and between tokens."""
    with _build(args) as bench:
        for repeat in range(args.num_iters_warmup):
            bench.run(args.batch_size, 1000 + repeat)
        timings = [bench.run(args.batch_size, repeat) for repeat in range(args.num_iters)]
    report: dict[str, Any] = {"model": args.model, "batch_size": args.batch_size}
    for name in ("total", "first_token", "between_tokens"):
        values = [getattr(timing, name) for timing in timings]
        report[name] = {"median": statistics.median(values), "min": min(values), "max": max(values)}
        print(f"{name.replace('_', ' '):>15}: {statistics.median(values) * 1e3:9.2f} ms "
              f"({min(values) * 1e3:.2f} to {max(values) * 1e3:.2f})", flush=True)  # fmt: skip
    return report


class _Timing:
    """Seconds of one run: in all, until every request had its first token, and per token after that."""

    def __init__(self, total: float, first_token: float, output_len: int):
        self.total, self.first_token = total, first_token
        self.between_tokens = (total - first_token) / max(1, output_len - 1)


class _Bench:
    def __init__(self, args: argparse.Namespace):
        from infer.llm import LLM

        self._args = args
        config = from_args(args, EngineConfig)
        self.llm = LLM(**vars(config))

    def __enter__(self) -> "_Bench":
        return self

    def __exit__(self, *exception: object) -> None:
        self.llm.close()

    def run(self, count: int, repeat: int) -> _Timing:
        """One run of `count` requests at once, straight on the engine."""
        from infer.request import Request, SamplingParams

        args, engine = self._args, self.llm.engine
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
        started = time.perf_counter()
        first = started
        for request in requests:
            engine.submit(request)
        while engine.has_work:
            for output in engine.step():
                if output.request_id in waiting:
                    waiting.discard(output.request_id)
                    first = time.perf_counter()
        return _Timing(time.perf_counter() - started, first - started, args.output_len)


def _build(args: argparse.Namespace) -> _Bench:
    longest = args.input_len + args.output_len
    bench = _Bench(args)
    if longest > bench.llm.engine.max_model_len:
        bench.llm.close()
        raise ValueError(f"--input-len + --output-len is {longest}; the model takes {bench.llm.engine.max_model_len}")
    return bench


if __name__ == "__main__":
    main()
