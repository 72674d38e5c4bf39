"""serve: any OpenAI endpoint under load, with the flags and figures of `vllm bench serve`. No torch here."""

import argparse
import asyncio
import collections
import math
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from tqdm import tqdm

from infer.bench.client import TIMEOUT, Outcome, first_model, stream
from infer.bench.report import natural, percentile, positive, write_json
from infer.tables import table

ENDPOINTS = {"openai": "/v1/completions", "openai-chat": "/v1/chat/completions"}
LOWEST_TOKEN_ID = 100  # below stand most models' special tokens
RETOKENIZE_ROUNDS = 10


@dataclass(frozen=True)
class Metric:
    """A latency in a report: its name in words, and where an outcome has it."""

    words: str
    values: Callable[[Outcome], list[float]]


METRICS = {
    "ttft": Metric("time to first token", lambda o: [o.first]),
    "tpot": Metric("time per output token, after the first", lambda o: _known(o.per_output_token)),
    "itl": Metric("inter-token latency", lambda o: o.gaps),
    "e2el": Metric("end-to-end latency", lambda o: [o.last]),
}


def _known(value: float | None) -> list[float]:
    return [] if value is None else [value]


# ---------------------------------------------------------------------------------------------- the command line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `serve`."""
    add = parser.add_argument
    add("--backend", choices=tuple(ENDPOINTS), default="openai", help="completions or chat (default: openai)")
    add("--base-url", help="such as http://127.0.0.1:8000 (default: from --host and --port)")
    add("--host", default="127.0.0.1", help="address of the server (default: 127.0.0.1)")
    add("--port", type=positive, default=8000, help="port of the server (default: 8000)")
    add("--endpoint", help="route (default: the backend's, such as /v1/completions)")
    add("--model", help="name of the model in requests (default: the first of /v1/models)")
    add("--tokenizer", help="directory with tokenizer.json: prompts become text (default: they are token ids)")
    add("--dataset-name", type=_dataset, default="random", help="random: the only one so far")
    add("--num-prompts", type=positive, default=1000, help="requests in all (default: 1000)")
    add("--request-rate", type=_rate, default=math.inf, help="requests sent per second (default: inf, all at once)")
    add("--burstiness", type=_above_zero, default=1.0, help="shape of the gamma-distributed gaps; 1: Poisson arrivals")
    add("--max-concurrency", type=positive, help="most requests open at once (default: no limit)")
    add("--num-warmups", type=natural, default=1, help="requests before the measurement, not counted (default: 1)")
    add("--random-input-len", type=positive, default=1024, help="tokens of each prompt (default: 1024)")
    add("--random-output-len", type=positive, default=128, help="most tokens of each reply (default: 128)")
    add("--random-range-ratio", type=_share, default=0.0, help="lengths vary by this share, both ways (default: 0)")
    add("--random-vocab-size", type=positive, default=1000, help="ids without --tokenizer lie below (default: 1000)")
    add("--seed", type=natural, default=0, help="of the prompts and arrivals (default: 0)")
    add("--ignore-eos", action="store_true", help="replies of full length (an extension that vLLM has, too)")
    add("--temperature", type=_temperature, default=0.0, help="default: 0, greedy")
    add("--percentile-metrics", type=_metrics, default="ttft,tpot,itl,e2el", help="default: ttft,tpot,itl,e2el")
    add("--metric-percentiles", type=_percentiles, default="50,90,99", help="default: 50,90,99")
    add("--disable-tqdm", action="store_true", help="no progress bar")
    add("--save-result", action="store_true", help="write the figures to a JSON file")
    add("--result-dir", help="directory of that file (default: the current one)")
    add("--result-filename", help="its name (default: made from backend, rate, model and date)")


def _dataset(text: str) -> str:
    if text != "random":
        raise argparse.ArgumentTypeError(f"{text!r} is not supported; random is the only dataset so far")
    return text


def _number(text: str, low: float, high: float, what: str, *, open_low: bool = False) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not low <= value <= high or (open_low and value == low):
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
    return value


def _rate(text: str) -> float:
    return _number(text, 0, math.inf, "a rate over 0, or inf", open_low=True)


def _above_zero(text: str) -> float:
    return _number(text, 0, 1e6, "a number over 0", open_low=True)


def _share(text: str) -> float:
    return _number(text, 0, 0.999, "a share from 0 to below 1")


def _temperature(text: str) -> float:
    return _number(text, 0, 100, "a temperature of at least 0")


def _metrics(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in METRICS:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {','.join(METRICS)}")
    return names


def _percentiles(text: str) -> list[float]:
    return [_number(part, 0, 100, "a percentage, such as 99 in 50,90,99") for part in text.split(",")]


def run(args: argparse.Namespace) -> int:
    """Runs the measurement; returns the exit status, which is 1 if every request failed. Raises ValueError."""
    if not args.save_result and (args.result_dir or args.result_filename):
        raise ValueError("--result-dir and --result-filename need --save-result (or use --output-json FILE)")
    saved = _result_path(args) if args.save_result and args.result_filename else None
    report = asyncio.run(Load(args).run())
    print(summary(report, args), flush=True)
    write_json(args.output_json, report)
    if args.save_result:
        saved = saved or _result_path(args, report)
        write_json(saved, report)
        print(f"Saved to {saved}")
    return 0 if report["completed"] else 1


def _result_path(args: argparse.Namespace, report: dict[str, Any] | None = None) -> Path:
    """Where --save-result writes. Raises ValueError where there is no such directory."""
    directory = Path(args.result_dir or ".")
    if not directory.is_dir():
        raise ValueError(f"--result-dir {directory} is not a directory")
    if report is None:
        return directory / args.result_filename
    model = report["model_id"].rpartition("/")[2]
    limit = f"-concurrency{args.max_concurrency}" if args.max_concurrency else ""
    return directory / f"{args.backend}-{args.request_rate:g}qps{limit}-{model}-{report['date']}.json"


# -------------------------------------------------------------------------------------------------------- the load


@dataclass(frozen=True)
class Sample:
    """One request to send: its prompt as text or token ids, how long it is, and how long the reply may become."""

    prompt: str | list[int]
    prompt_len: int
    output_len: int


class Prompts:
    """Random prompts, the same for the same seed. With a tokenizer they are text."""

    def __init__(self, args: argparse.Namespace):
        self._args = args
        self._random = random.Random(args.seed)
        self._tokenizer = None
        if args.tokenizer is not None:
            from infer.serve.text import Tokenizer

            self._tokenizer = Tokenizer.load(args.tokenizer)
        elif args.backend == "openai-chat":
            raise ValueError("--backend openai-chat needs --tokenizer DIR, because a chat's messages are text")
        self._vocab_size = self._tokenizer.vocab_size if self._tokenizer else args.random_vocab_size

    def next(self) -> Sample:
        """Another prompt, of the asked length as near as the tokenizer allows."""
        length, output_len = self._length(self._args.random_input_len), self._length(self._args.random_output_len)
        ids = self._ids(length)
        if self._tokenizer is None:
            return Sample(ids, length, output_len)
        for _ in range(RETOKENIZE_ROUNDS):  # neighbours merge when they are text: fill up or cut until it fits
            text = self._tokenizer.decode(ids)
            ids = self._tokenizer.encode(text, add_special_tokens=False)
            if len(ids) == length:
                break
            ids = ids[:length] + self._ids(length - len(ids))
        return Sample(text, len(ids), output_len)

    def _ids(self, count: int) -> list[int]:
        low = min(LOWEST_TOKEN_ID, self._vocab_size // 2)
        return [self._random.randrange(low, self._vocab_size) for _ in range(count)]

    def _length(self, middle: int) -> int:
        ratio = self._args.random_range_ratio
        return max(1, self._random.randint(math.floor(middle * (1 - ratio)), math.ceil(middle * (1 + ratio))))


class Load:
    """The requests of one measurement, sent at their rate and counted."""

    def __init__(self, args: argparse.Namespace):
        self._args = args
        self._base_url = (args.base_url or f"http://{_bracketed(args.host)}:{args.port}").rstrip("/")
        if not self._base_url.startswith(("http://", "https://")):
            raise ValueError(f"--base-url must begin with http:// or https://, not {self._base_url!r}")
        endpoint = args.endpoint or ENDPOINTS[args.backend]
        self._url = f"{self._base_url}/{endpoint.lstrip('/')}"
        self._prompts = Prompts(args)
        self._model = args.model

    async def run(self) -> dict[str, Any]:
        """The figures, as `vllm bench serve` names them. Raises ValueError if no request can be made at all."""
        args = self._args
        key = os.environ.get("OPENAI_API_KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        connector = aiohttp.TCPConnector(limit=args.max_concurrency or 0)
        async with aiohttp.ClientSession(connector=connector, timeout=TIMEOUT, headers=headers) as session:
            self._session = session
            self._model = self._model or await first_model(session, self._base_url)
            for _ in range(args.num_warmups):
                warmup = await self._send(self._prompts.next())
                if warmup.error is not None:
                    raise ValueError(f"the first request to {self._url} failed: {warmup.error}")
            samples = [self._prompts.next() for _ in range(args.num_prompts)]
            started = time.perf_counter()
            outcomes = await self._send_all(samples)
            duration = time.perf_counter() - started
        return self._report(outcomes, duration)

    async def _send_all(self, samples: list[Sample]) -> list[Outcome]:
        """Sends each at its time, counted from the first, so that a late one does not delay those after it."""
        args = self._args
        gaps = random.Random(f"arrivals {args.seed}")  # independent of the prompts'
        slots = asyncio.Semaphore(args.max_concurrency or len(samples))
        started, due, tasks = time.perf_counter(), 0.0, []
        with tqdm(total=len(samples), desc="Requests", disable=args.disable_tqdm, file=sys.stderr) as bar:

            async def send(sample: Sample) -> Outcome:
                async with slots:
                    outcome = await self._send(sample)
                bar.update()
                return outcome

            async with asyncio.TaskGroup() as group:
                for sample in samples:
                    wait = started + due - time.perf_counter()
                    if wait > 0:
                        await asyncio.sleep(wait)
                    tasks.append(group.create_task(send(sample)))
                    if args.request_rate != math.inf:
                        due += gaps.gammavariate(args.burstiness, 1 / (args.request_rate * args.burstiness))
        return [task.result() for task in tasks]

    async def _send(self, sample: Sample) -> Outcome:
        return await stream(self._session, self._url, self._body(sample), sample.prompt_len)

    def _body(self, sample: Sample) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self._model,
            "temperature": self._args.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self._args.backend == "openai-chat":
            body["messages"] = [{"role": "user", "content": sample.prompt}]
            body["max_completion_tokens"] = sample.output_len
        else:
            body["prompt"] = sample.prompt
            body["max_tokens"] = sample.output_len
        if self._args.ignore_eos:
            body["ignore_eos"] = True
        return body

    def _report(self, outcomes: list[Outcome], duration: float) -> dict[str, Any]:
        args, good = self._args, [outcome for outcome in outcomes if outcome.error is None]
        num_input, num_output = sum(o.prompt_tokens for o in good), sum(o.output_tokens for o in good)
        report: dict[str, Any] = {
            "date": time.strftime("%Y%m%d-%H%M%S"),
            "backend": args.backend,
            "model_id": self._model,
            "url": self._url,
            "num_prompts": args.num_prompts,
            "random_input_len": args.random_input_len,
            "random_output_len": args.random_output_len,
            "request_rate": args.request_rate if args.request_rate != math.inf else "inf",
            "burstiness": args.burstiness,
            "max_concurrency": args.max_concurrency,
            "duration": duration,
            "completed": len(good),
            "failed": len(outcomes) - len(good),
            "failures": dict(collections.Counter(o.error for o in outcomes if o.error is not None).most_common()),
            "total_input_tokens": num_input,
            "total_output_tokens": num_output,
            "request_throughput": len(good) / duration,
            "output_throughput": num_output / duration,
            "total_token_throughput": (num_input + num_output) / duration,
        }
        for name in args.percentile_metrics:
            milliseconds = [1e3 * value for outcome in good for value in METRICS[name].values(outcome)]
            report |= _statistics(name, milliseconds, args.metric_percentiles)
        return report


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _statistics(name: str, milliseconds: list[float], percents: list[float]) -> dict[str, float | None]:
    """None where there are no values, such as gaps between tokens when each reply is one token."""
    found: dict[str, float | None] = {
        f"mean_{name}_ms": statistics.fmean(milliseconds) if milliseconds else None,
        f"median_{name}_ms": statistics.median(milliseconds) if milliseconds else None,
        f"std_{name}_ms": statistics.pstdev(milliseconds) if milliseconds else None,
    }
    for percent in percents:
        found[f"p{percent:g}_{name}_ms"] = percentile(milliseconds, percent) if milliseconds else None
    return found


# ------------------------------------------------------------------------------------------------------- the table


def summary(report: dict[str, Any], args: argparse.Namespace) -> str:
    """The report for a terminal."""
    lines = [
        f"{report['completed']} of {report['num_prompts']} requests to {report['url']} in {report['duration']:.2f} s",
        f"Request throughput: {report['request_throughput']:.2f} requests/s",
        f"Output throughput: {report['output_throughput']:.1f} tokens/s ({report['total_output_tokens']:,} tokens)",
        f"Total throughput: {report['total_token_throughput']:.1f} tokens/s "
        f"({report['total_input_tokens']:,} tokens in)",
    ]
    for reason, count in report["failures"].items():
        lines.append(f"{count} failed: {reason}")
    columns = ["mean", "std", *(f"p{percent:g}" for percent in args.metric_percentiles)]
    rows = [
        [METRICS[name].words, *(_cell(report[f"{column}_{name}_ms"]) for column in columns)]
        for name in args.percentile_metrics
    ]
    return "\n".join(lines) + "\n" + table(["milliseconds", *columns], rows)


def _cell(milliseconds: float | None) -> str:
    return "-" if milliseconds is None else f"{milliseconds:.2f}"
