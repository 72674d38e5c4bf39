"""python -m infer.bench: how fast a model runs, and how fast it could.

    python -m infer.bench throughput --model DIR --input-len 128 --output-len 128 --concurrency 1 8 32
    torchrun --master-port 29501 --nproc-per-node 2 -m infer.bench latency --model DIR -pp 2 --batch-size 8
    python -m infer.bench serve --base-url http://127.0.0.1:8000 --num-prompts 64 --max-concurrency 8 --ignore-eos
    python -m infer.bench startup --model DIR -tp 2 --repeats 3
    python -m infer.bench suite --model DIR

throughput  N requests at once, random prompts, greedy, end tokens ignored: output tokens per second, prefill included,
            beside the limit of the hardware as measured on the spot.
latency     seconds of one batch: to its last token, to its first tokens, and between tokens.
serve       any OpenAI endpoint over HTTP: throughput, time to first token, between tokens, end to end; percentiles.
startup     starts the server as a user would and times each phase, to the first token.
suite       all of these on one model, as one table.
"""

import argparse
import sys

from infer import launch
from infer.bench import serve, startup, suite
from infer.bench.report import natural, output_file, positive
from infer.config import EngineConfig, Parser, add_flags

OFFLINE = ("throughput", "latency")  # these run on every rank of torchrun's world; the others are one process


def main() -> None:
    env = None
    try:
        env = launch.RankEnv.from_environ()
        launch.exit_if_failed_before(env)
        launch.set_parent_death_signal(env)
        argv = sys.argv[1:]
        if env.rank != 0:
            _follow(env, argv)
        args = parse(argv)
        if args.command not in OFFLINE and env.world_size > 1:
            raise ValueError(f"{args.command} is one process; start it with python -m infer.bench, without torchrun")
        status = _run(args)
    except ValueError as error:
        launch.fail(str(error), env)
    sys.exit(status)


def _follow(env: launch.RankEnv, argv: list[str]) -> None:
    """Any rank but 0, which reads the command line for all of them. Does not return."""
    if {"-h", "--help"} & set(argv):
        sys.exit(0)
    from infer.process import Process

    Process.join(env)


def _run(args: argparse.Namespace) -> int:
    if args.command == "serve":
        return serve.run(args)
    if args.command == "startup":
        return startup.run(args)
    if args.command == "suite":
        return suite.run(args)
    from infer.bench import offline  # imports torch, which a measurement over HTTP does without

    return offline.run(args)


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line. Raises ValueError."""
    parser = Parser(
        prog="python -m infer.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    for name in OFFLINE:
        sub = commands.add_parser(name)
        add_flags(sub, EngineConfig)
        sub.add_argument("--input-len", type=positive, default=128, help="tokens of each prompt (default: 128)")
        sub.add_argument("--output-len", type=positive, default=128, help="tokens generated (default: 128)")
        if name == "throughput":
            sub.add_argument("--concurrency", type=positive, nargs="+", default=[1, 8, 32], help="requests at once")
            sub.add_argument("--repeats", type=positive, default=2, help="runs of each; the best counts (default: 2)")
        else:
            sub.add_argument("--batch-size", type=positive, default=8, help="requests at once (default: 8)")
            sub.add_argument("--num-iters-warmup", type=natural, default=1, help="runs not counted (default: 1)")
            sub.add_argument("--num-iters", type=positive, default=5, help="runs counted (default: 5)")
    serve.add_arguments(commands.add_parser("serve"))
    startup.add_arguments(commands.add_parser("startup"))
    suite.add_arguments(commands.add_parser("suite"))
    for sub in commands.choices.values():
        sub.add_argument("--output-json", type=output_file, help="file for the figures")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
