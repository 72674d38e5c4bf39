"""One frozen EngineConfig. Its fields are the command line's engine flags and LLM's arguments. No torch here."""

import argparse
import dataclasses
import difflib
import json
import math
import os
import re
from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from typing import Any

from infer.request import MAX_LOGPROBS

DTYPES = ("auto", "bfloat16", "float16", "float32")
LOAD_FORMATS = ("auto", "safetensors", "dummy")
POLICIES = ("fcfs", "priority")


TOOL_CALL_PARSERS = ("hermes", "llama3_json", "mistral", "qwen3_coder", "pythonic")
REASONING_PARSERS = ("deepseek_r1", "qwen3")


def _flag(default: Any, help: str, *short: str, parse: Any = None, choices: Sequence[str] | None = None) -> Any:
    return field(default=default, metadata={"help": help, "short": short, "parse": parse, "choices": choices})


def _list(metavar: str, help: str, *, parse: Any = None, secret: bool = False) -> Any:
    """A flag with several values. parse: what becomes of one, a string or a tuple of them. secret: not in the repr."""
    metadata = {"help": help, "short": (), "parse": parse, "choices": None, "metavar": metavar}
    return field(default=None, repr=not secret, metadata=metadata)


def _size(text: str) -> int:
    """Bytes: 4096, 512M, 1.5G (powers of 1024)."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
    number, unit = (text[:-1], units[text[-1].upper()]) if text[-1:].upper() in units else (text, 1)
    try:
        return int(float(number) * unit)
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write 4096, 512M or 1.5G") from None


def _partition(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of layer counts such as 9,11,10") from None


def _overrides(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object")
    return value


def _origins(text: str) -> tuple[str, ...]:
    """One origin, or a JSON list of them, as vLLM takes it."""
    if not text.startswith("["):
        return (text.rstrip("/"),)
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from None
    if not all(isinstance(value, str) for value in values):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of strings")
    return tuple(value.rstrip("/") for value in values)


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Everything that decides how the engine is built; `LLM(**kwargs)` takes the same names. None: choose for me."""

    model: str = _flag(None, "directory of a Hugging Face checkpoint, or a Hub id")
    tokenizer: str | None = _flag(None, "directory or Hub id of the tokenizer (default: the model's)")
    revision: str | None = _flag(None, "branch, tag or commit of the Hub repository")
    download_dir: str | None = _flag(None, "where Hub downloads are kept (default: the Hub's cache)")
    trust_remote_code: bool = _flag(False, "refused: code from a checkpoint is never run, and no model here needs any")
    load_format: str = _flag("auto", "dummy: random weights from config.json alone", choices=LOAD_FORMATS)
    hf_overrides: dict[str, Any] | None = _flag(None, "JSON object laid over config.json", parse=_overrides)
    dtype: str = _flag("auto", "of weights and activations; auto: the checkpoint's", choices=DTYPES)
    seed: int = _flag(
        0,
        "of dummy weights, and of a script's requests without a seed of their own; a server draws a fresh one for each",
    )
    max_model_len: int | None = _flag(None, "longest prompt + output in tokens (default: the model's)", parse=int)

    tensor_parallel_size: int | None = _flag(
        None, "ranks a layer is split over (default: world / pp)", "-tp", parse=int
    )
    enable_expert_parallel: bool = _flag(
        False, "the ranks of a layer share out whole experts, instead of splitting each (mixture of experts)"
    )
    pipeline_parallel_size: int = _flag(1, "stages the layers are split over", "-pp")
    pipeline_layer_partition: tuple[int, ...] | None = _flag(
        None, "layers of each stage, such as 9,11,10 (default: balanced)", parse=_partition
    )
    distributed_timeout_seconds: int = _flag(1800, "longest wait for another rank inside one step")
    disable_custom_all_reduce: bool = _flag(
        False, "sums and hidden states of CPU ranks on one host go through gloo, not through shared memory"
    )
    num_threads: int | None = _flag(None, "CPU threads of each rank (default: cores / ranks on the host)", parse=int)

    gpu_memory_utilization: float = _flag(0.9, "share of each GPU's memory to use")
    kv_cache_memory_bytes: int | None = _flag(
        None, "bytes of KV cache per rank, such as 4G (default: what is free, as the logs say)", parse=_size
    )
    num_gpu_blocks_override: int | None = _flag(None, "number of KV blocks, whatever memory there is", parse=int)
    block_size: int = _flag(16, "tokens a KV block holds")
    enable_prefix_caching: bool = _flag(True, "reuse the KV blocks of equal prompt beginnings")

    max_num_seqs: int = _flag(256, "most requests running at once")
    max_num_batched_tokens: int = _flag(2048, "most tokens in one batch")
    enable_chunked_prefill: bool = _flag(True, "split prompts that do not fit a batch over several")
    scheduling_policy: str = _flag(
        "fcfs",
        "order of waiting requests: first come, first served, or by the requests' priority, the lowest first",
        choices=POLICIES,
    )
    enforce_eager: bool = _flag(False, "CUDA graphs off: every op is launched on its own; a CPU runs so anyway")
    compile: bool = _flag(
        False, "torch.compile the layers when batches first run, which takes a while (CPU: weights stay unpacked)"
    )
    disable_log_stats: bool = _flag(False, "do not log throughput every 10 s")

    def __post_init__(self) -> None:
        if not isinstance(self.model, str) or not self.model:
            raise ValueError(f"model must be a directory or a Hub id, not {self.model!r}")
        for name, choices in (
            ("dtype", DTYPES), ("load_format", LOAD_FORMATS), ("scheduling_policy", POLICIES),
        ):  # fmt: skip
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}")
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be a positive integer, not {value!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ValueError(f"seed must be an integer, not {self.seed!r}")
        share = self.gpu_memory_utilization
        if not isinstance(share, (int, float)) or not 0 < share <= 1:
            raise ValueError(f"gpu_memory_utilization must be over 0 and at most 1, not {share!r}")
        for name in (
            "enable_prefix_caching", "enable_chunked_prefill", "disable_log_stats", "disable_custom_all_reduce",
            "enforce_eager", "compile", "trust_remote_code", "enable_expert_parallel",
        ):  # fmt: skip
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, not {getattr(self, name)!r}")
        if self.trust_remote_code:
            raise ValueError(
                "trust_remote_code must be false: code from a checkpoint is never run, since it could do anything on "
                "every host that serves the model; no model of `python -m infer.models` needs it, so leave it out"
            )
        if self.pipeline_layer_partition is not None:
            self._check_partition(self.pipeline_layer_partition)

    def _check_partition(self, partition: tuple[int, ...]) -> None:
        if len(partition) != self.pipeline_parallel_size or any(count < 1 for count in partition):
            raise ValueError(
                f"pipeline_layer_partition must be {self.pipeline_parallel_size} positive layer counts "
                f"(one a stage), not {','.join(map(str, partition))}"
            )

    @classmethod
    def from_kwargs(cls, **kwargs: Any) -> "EngineConfig":
        """Builds a config; an unknown name is an error that offers the nearest one."""
        names = [f.name for f in dataclasses.fields(cls)]
        for name in kwargs:
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1)
                hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(names)}"
                raise ValueError(f"unknown argument {name!r}; {hint}")
        for f in dataclasses.fields(cls):  # what the command line takes as text, a script may give as text
            if f.metadata["parse"] in (_partition, _size) and isinstance(kwargs.get(f.name), str):
                try:
                    kwargs[f.name] = f.metadata["parse"](kwargs[f.name])
                except argparse.ArgumentTypeError as error:
                    raise ValueError(f"{f.name}: {error}") from None
        for name in ("model", "tokenizer", "download_dir"):
            if isinstance(kwargs.get(name), os.PathLike):
                kwargs[name] = os.fspath(kwargs[name])
        if isinstance(kwargs.get("pipeline_layer_partition"), list):
            kwargs["pipeline_layer_partition"] = tuple(kwargs["pipeline_layer_partition"])
        return cls(**kwargs)


_POSITIVE = (
    "tensor_parallel_size", "pipeline_parallel_size", "max_model_len", "distributed_timeout_seconds", "num_threads",
    "kv_cache_memory_bytes", "num_gpu_blocks_override", "block_size", "max_num_seqs", "max_num_batched_tokens",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """The HTTP endpoint of rank 0. Raises ValueError for what does not fit or contradicts itself."""

    host: str = _flag("127.0.0.1", "address to listen on (0.0.0.0: all)")
    port: int = _flag(8000, "port to listen on (0: any free one)")
    uds: str | None = _flag(None, "listen on a Unix socket at this path, instead of on --host and --port")
    ssl_keyfile: str | None = _flag(None, "private key of the certificate, in PEM form, without a password")
    ssl_certfile: str | None = _flag(None, "certificate and its chain in PEM form; with it the server speaks HTTPS")
    api_key: tuple[str, ...] | None = _list(
        "KEY", "keys that clients must send as a bearer token; --api-key-file or INFER_API_KEY keep them out of ps",
        secret=True,
    )  # fmt: skip
    api_key_file: str | None = _flag(None, "file with one key a line; empty lines and lines with # are skipped")
    allowed_origins: tuple[str, ...] | None = _list(
        "ORIGIN", "origins whose pages may call the server from a browser (CORS); *: any (default: none)",
        parse=_origins,
    )  # fmt: skip
    root_path: str = _flag("", "path prefix under which a proxy shows the server; routes answer with and without it")
    served_model_name: tuple[str, ...] | None = _list(
        "NAME", "names clients may use; the first is shown in replies (default: base name of --model)"
    )
    chat_template: str | None = _flag(None, "a Jinja file, or the template itself (default: the checkpoint's)")
    response_role: str = _flag("assistant", "role of the messages in chat replies")
    enable_auto_tool_choice: bool = _flag(False, "let the model decide to call tools; needs --tool-call-parser")
    tool_call_parser: str | None = _flag(None, "the model's way to write tool calls", choices=TOOL_CALL_PARSERS)
    reasoning_parser: str | None = _flag(None, "the model's way to mark its reasoning", choices=REASONING_PARSERS)
    generation_config: str = _flag(
        "auto", "sampling defaults: auto: the checkpoint's; vllm: none; or a directory with generation_config.json"
    )
    max_logprobs: int = _flag(20, "largest logprobs, top_logprobs and prompt_logprobs a request may ask for")
    max_num_queued_reqs: int = _flag(
        2048, "prompts that may wait for their first token; with more, requests are refused with 429"
    )
    max_body_bytes: int = _flag(8 << 20, "largest request body, such as 8M", parse=_size)
    max_connections: int = _flag(4096, "open connections; further ones are refused with 503")
    request_timeout: float | None = _flag(
        None, "seconds after which a request that is not done ends with an error (default: none)", parse=float
    )
    restart_deadline: float = _flag(
        120.0, "under torchrun: seconds without an engine, or a sign of one that starts, until the server gives up"
    )
    shutdown_timeout: float = _flag(
        25.0, "seconds that requests under way have to finish once the server is told to end (torchrun kills after 30)"
    )
    enable_log_requests: bool = _flag(False, "log a line a request: id, route, tokens, parameters; never its text")
    enable_request_id_headers: bool = _flag(False, "every reply has an X-Request-Id header, the client's own or a new")
    metrics_prefix: str = _flag("infer:", "what names of metrics begin with; vllm: suits dashboards made for vLLM")
    config: str | None = _flag(None, "YAML file of flags: `max-model-len: 4096`; flags given here win over it")

    def __post_init__(self) -> None:
        if not 0 <= self.max_logprobs <= MAX_LOGPROBS:
            raise ValueError(f"max_logprobs must be from 0 to {MAX_LOGPROBS}, not {self.max_logprobs}")
        for name in ("max_num_queued_reqs", "max_body_bytes", "max_connections"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be a positive integer, not {getattr(self, name)}")
        if self.request_timeout is not None and not 0 < self.request_timeout < math.inf:
            raise ValueError(f"request_timeout must be a positive number of seconds, not {self.request_timeout:g}")
        if not 0 < self.restart_deadline < math.inf:
            raise ValueError(f"restart_deadline must be a positive number of seconds, not {self.restart_deadline:g}")
        if not 0 <= self.shutdown_timeout < math.inf:
            raise ValueError(f"shutdown_timeout must be a number of seconds, not {self.shutdown_timeout:g}")
        for name, choices in (("tool_call_parser", TOOL_CALL_PARSERS), ("reasoning_parser", REASONING_PARSERS)):
            if getattr(self, name) not in (None, *choices):
                raise ValueError(f"{name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}")
        if self.enable_auto_tool_choice and self.tool_call_parser is None:
            known = ", ".join(TOOL_CALL_PARSERS)
            raise ValueError(f"--enable-auto-tool-choice needs --tool-call-parser, one of {known}")
        if self.ssl_keyfile is not None and self.ssl_certfile is None:
            raise ValueError("--ssl-keyfile needs --ssl-certfile, the certificate that belongs to the key")
        if not re.fullmatch(r"[a-zA-Z_:][a-zA-Z0-9_:]*", self.metrics_prefix):
            raise ValueError(f"metrics_prefix must be of letters, digits, _ and :, not {self.metrics_prefix!r}")
        self._check_texts()

    def _check_texts(self) -> None:
        # "{" and "}" would make a pattern of it; what a proxy sends is compared character by character.
        if self.root_path and not re.fullmatch(r"(/[A-Za-z0-9._~-]+)+", self.root_path):
            raise ValueError(f"root_path must be a path such as /llm, with no slash at its end, not {self.root_path!r}")
        if self.served_model_name is not None and not all(self.served_model_name):
            raise ValueError("served_model_name must hold names, not an empty one")
        if not self.response_role:
            raise ValueError("response_role must be a role such as assistant, not empty")
        for key in self.api_key or ():
            check_api_key(key, "api_key")
        for origin in self.allowed_origins or ():
            if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s]+|null", origin):
                raise ValueError(f"allowed_origins must hold * or origins such as https://example.org, not {origin!r}")


def check_api_key(key: str, where: str) -> None:
    """Raises ValueError, which never tells the key, unless it can travel in an HTTP header."""
    if not key or not all("!" <= char <= "~" for char in key):
        raise ValueError(f"{where} holds a key that is empty or has other characters than visible ASCII ones")


def add_flags(parser: argparse.ArgumentParser, config_class: type, names: Container[str] | None = None) -> None:
    """Adds one flag per field of the config class, or of its fields of these names: `--max-model-len`, and
    `--no-enable-...` for switches."""
    for f in dataclasses.fields(config_class):
        if names is not None and f.name not in names:
            continue
        flags = ["--" + f.name.replace("_", "-"), *f.metadata["short"]]
        untold = f.default is None or isinstance(f.default, bool) or f.default == ""
        help = f.metadata["help"] + ("" if untold else f" (default: {f.default})")
        parse = f.metadata["parse"] or (type(f.default) if f.default is not None else str)
        if isinstance(f.default, bool):
            parser.add_argument(*flags, action=argparse.BooleanOptionalAction, default=f.default, help=help)
        elif "metavar" in f.metadata:
            parser.add_argument(
                *flags, action=_Collect, type=parse, nargs="+", metavar=f.metadata["metavar"], help=help
            )
        else:
            required, choices = f.name == "model", f.metadata["choices"]
            parser.add_argument(*flags, type=parse, default=f.default, choices=choices, required=required, help=help)


class _Collect(argparse.Action):
    """All the values of all times a flag is given, as one tuple; a default (a config file's) is not among them."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: Any = None
    ) -> None:
        given = namespace.__dict__.setdefault("given_lists", {}).setdefault(self.dest, [])
        for value in values:
            given.extend(value if isinstance(value, tuple) else [value])
        setattr(namespace, self.dest, tuple(given))


def from_args(args: argparse.Namespace, config_class: type) -> Any:
    """The config whose fields stand in parsed arguments; those that were given no flag keep their defaults. Raises
    ValueError for values that do not fit."""
    names = [f.name for f in dataclasses.fields(config_class)]
    return config_class(**{name: getattr(args, name) for name in names if hasattr(args, name)})


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one ValueError, so that every rank's caller decides who prints it; for an
    unknown flag it names the nearest."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            name = unknown[0].partition("=")[0]
            known = self._option_string_actions.keys() - {"--help"}
            near = difflib.get_close_matches(name, sorted(known), n=1)
            self.error(f"unrecognized arguments: {' '.join(unknown)}" + (f"; did you mean {near[0]}?" if near else ""))
        return found

    def error(self, message: str) -> Any:
        raise ValueError(f"{message}; --help lists every option")
