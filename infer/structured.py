"""Structured outputs: what a request asks for, as llguidance reads it. The frontend, LLM and the ranks share it.

No torch here. A grammar is untrusted input. Its text is bounded by StructuredOutputs; GrammarChecker compiles it first
where it can do no harm; and on the ranks LIMITS bound each step by counting, not by time, so that all come to one end.
"""

import contextlib
import hashlib
import json
import re
import subprocess
import sys
import threading
from collections import OrderedDict
from pathlib import Path
from typing import IO, Any, BinaryIO

import msgspec
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from infer.request import StructuredOutputs

# Of one grammar: fuel is spent on building its lexer (50,000 a millisecond) and on each mask (14,000 a millisecond);
# a state of the lexer takes 1 to 2 kB.
LIMITS = LLParserLimits(
    max_items_in_row=2000,
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=500_000,
    step_max_items=100_000,
    max_lexer_states=20_000,
    max_grammar_size=200_000,
    precompute_large_lexemes=False,
    verbose_errors=False,
)
MAX_CPU_SECONDS = 0.5  # for compiling a grammar and trying some tokens; what takes longer is refused
MAX_COUNTS = 20_000
MAX_CHECKED = 256  # grammars a checker remembers to be good
MAX_MESSAGE_CHARS = 500
# The larger number of {3}, {3,} and {3,5}. Possessive: giving back what was matched would take quadratic time.
_COUNT = re.compile(r"\{\s*+(?:\d++\s*+,\s*+)?(\d++)\s*+(?:,\s*+)?\}")
_SILENT = 0  # llguidance's log level
# The formats of strings that the compiler holds a text to. To JSON Schema any other is an annotation, such as the
# "password" and "file-path" that pydantic writes.
FORMATS = frozenset({"date", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "time", "uri", "uuid"})
_NAMED_SCHEMAS = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
_VALUES = frozenset({"const", "enum", "default", "examples"})  # no schemas, whatever they look like


def grammar_text(structured: StructuredOutputs) -> str:
    """The grammar as llguidance takes it. Raises ValueError for what is no JSON schema; all else its compiler finds."""
    if structured.regex is not None:
        return LLMatcher.grammar_from_regex(structured.regex)
    if structured.choice is not None:
        # Lark's strings are JSON's, but for the one control character that JSON lets stand.
        texts = [json.dumps(text).replace("\x7f", "\\u007f") for text in dict.fromkeys(structured.choice)]
        choices = " | ".join(texts)
        return LLMatcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {choices}")
    if structured.grammar is not None:
        return LLMatcher.grammar_from_lark(structured.grammar)
    overrides: dict[str, Any] = {}
    if structured.disable_any_whitespace:
        overrides["whitespace_flexible"] = False
    if structured.whitespace_pattern is not None:
        overrides["whitespace_pattern"] = structured.whitespace_pattern
    schema = _compilable(structured.json) if isinstance(structured.json, str) else '{"type": "object"}'
    return LLMatcher.grammar_from_json_schema(schema, overrides=overrides)  # type: ignore[arg-type]


def without_unknown_formats(schema: Any) -> Any:
    """A JSON schema without the formats that only describe. Raises RecursionError for one nested too deeply."""
    if isinstance(schema, list):
        return [without_unknown_formats(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    kept: dict[str, Any] = {}
    for key, value in schema.items():
        if key == "format" and isinstance(value, str) and value not in FORMATS:
            continue
        if key in _NAMED_SCHEMAS and isinstance(value, dict):
            kept[key] = {name: without_unknown_formats(item) for name, item in value.items()}
        else:
            kept[key] = value if key in _VALUES else without_unknown_formats(value)
    return kept


def _compilable(schema: str) -> str:
    """A schema's text as the compiler takes it; one that cannot be read is left for the compiler to refuse."""
    if '"format"' not in schema:
        return schema
    try:
        read = json.loads(schema)
        kept = without_unknown_formats(read)
        return schema if kept == read else json.dumps(kept)
    except (ValueError, RecursionError):
        return schema


def load_tokenizer(directory: Path, vocab_size: int | None = None) -> LLTokenizer:
    """The tokenizer that grammars are matched with. vocab_size: the model's, which is often padded beyond it.

    Raises ValueError where there is no tokenizer.json, or llguidance cannot read it.
    """
    file = directory / "tokenizer.json"
    if not file.is_file():
        raise ValueError(f"structured_outputs needs {file}, which does not exist; this tokenizer cannot be used for it")
    try:
        text = _without_limits(file.read_bytes())
        if vocab_size is not None:
            with contextlib.suppress(ValueError):  # the tokenizer has more tokens than the model
                return LLTokenizer(text, n_vocab=vocab_size)
        return LLTokenizer(text)
    except (ValueError, OSError) as error:
        raise ValueError(f"structured_outputs cannot use {file}: {_cut(str(error))}") from None


def compile_grammar(structured: StructuredOutputs, tokenizer: LLTokenizer) -> LLMatcher:
    """A matcher at the beginning of a text. Raises ValueError with llguidance's message for what cannot be compiled."""
    try:
        matcher = LLMatcher(tokenizer, grammar_text(structured), log_level=_SILENT, limits=LIMITS)
    except ValueError as error:
        raise ValueError(blame(structured, str(error))) from None
    if matcher.is_error():
        raise ValueError(blame(structured, matcher.get_error()))
    return matcher


class GrammarChecker:
    """Finds what is wrong with a request's structured outputs before the engine sees it. Safe in several threads.

    Compiles in a process of its own (grammar_worker.py), which this one starts when first needed.
    """

    def __init__(self, tokenizer_dir: Path):
        self._directory = tokenizer_dir
        self._worker: subprocess.Popen[bytes] | None = None
        self._working = threading.Lock()  # held by the one who talks to the worker
        self._checked: OrderedDict[bytes, None] = OrderedDict()  # digests; the first is the longest unused
        self._remembering = threading.Lock()

    def warm(self) -> None:
        """Starts the worker, which the first check does otherwise, and waits until it has read the tokenizer.

        Raises ValueError as load_tokenizer does.
        """
        with self._working:
            self._running_worker()

    def check(self, structured: StructuredOutputs) -> None:
        """Compiles it and tries some tokens, as the ranks will; one that was good lately is good at once.

        Blocks for milliseconds, for at most some seconds on a loaded machine, without the GIL. Raises ValueError with
        llguidance's message, or RuntimeError where the worker cannot run.
        """
        body = msgspec.msgpack.encode(structured)
        key = hashlib.sha256(body).digest()
        with self._remembering:
            if key in self._checked:
                self._checked.move_to_end(key)
                return
        _check_counts(structured)
        with self._working:
            error = self._ask(body)
        if error:
            raise ValueError(error)
        with self._remembering:
            self._checked[key] = None
            if len(self._checked) > MAX_CHECKED:
                self._checked.popitem(last=False)

    def close(self) -> None:
        """Ends the worker; another check would start it again."""
        with self._working:
            self._drop()

    def _ask(self, body: bytes) -> str:
        for _ in range(2):  # a worker that something killed meanwhile is replaced once
            worker = self._running_worker()
            assert worker.stdin is not None and worker.stdout is not None
            with contextlib.suppress(OSError):
                write_message(worker.stdin, body)
                if (reply := read_message(worker.stdout)) is not None:
                    return reply.decode()
            self._drop()
        raise RuntimeError("the process that checks grammars ended unexpectedly, twice")

    def _running_worker(self) -> "subprocess.Popen[bytes]":
        if self._worker is None:
            command = [sys.executable, "-m", "infer.grammar_worker", str(self._directory)]
            self._worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            assert self._worker.stdout is not None
            greeting = read_message(self._worker.stdout)
            if greeting is None or greeting:
                self._drop()
                if greeting is None:
                    raise RuntimeError("the process that checks grammars could not start")
                raise ValueError(greeting.decode())
        return self._worker

    def _drop(self) -> None:
        if self._worker is None:
            return
        worker, self._worker = self._worker, None
        for pipe in (worker.stdin, worker.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()
        worker.kill()  # it holds nothing that would be lost
        worker.wait()


def write_message(pipe: BinaryIO | IO[bytes], body: bytes | str) -> None:
    """A length and so many bytes."""
    data = body.encode() if isinstance(body, str) else body
    pipe.write(len(data).to_bytes(4, "little") + data)
    pipe.flush()


def read_message(pipe: BinaryIO | IO[bytes]) -> bytes | None:
    """The next one; None where the other end is closed."""
    head = pipe.read(4)
    if len(head) < 4:
        return None
    size = int.from_bytes(head, "little")
    data = pipe.read(size)
    return data if len(data) == size else None


def _check_counts(structured: StructuredOutputs) -> None:
    """Counts of repetition are worked out one by one, at a cost that no later limit sees in time: {1000} in a regular
    expression, a JSON schema's patterns or a grammar. Raises ValueError."""
    total = 0
    for text in (structured.regex, structured.grammar, structured.json, structured.whitespace_pattern):
        if isinstance(text, str):
            total += sum(int(count[:10]) for count in _COUNT.findall(text))
    if total > MAX_COUNTS:
        raise ValueError(blame(structured, f"its counts of repetition add up to {total}; at most {MAX_COUNTS} may"))


def blame(structured: StructuredOutputs, message: str) -> str:
    """A message of the compiler, with the field it is about."""
    return f"structured_outputs.{structured.kind}: {_cut(message)}"


def _cut(message: str) -> str:
    """A message of another library in one line of bounded length: it may quote what it was given."""
    line = " ".join(message.split())
    return line if len(line) <= MAX_MESSAGE_CHARS else f"{line[:MAX_MESSAGE_CHARS]}..."


def _without_limits(file: bytes) -> str:
    """A tokenizer.json without the truncation and padding that some carry from their training run."""
    parts = msgspec.json.decode(file, type=dict[str, msgspec.Raw])
    kept = {name: value for name, value in parts.items() if name not in ("truncation", "padding")}
    return msgspec.json.encode(kept).decode()
