"""The journal of a batch script: what LLM.generate has finished, for a later run of the same script. No torch here.

JSON lines. The first says what decides the results (the settings); each other one holds a finished prompt: its key, a
digest of everything else they depend on, and its outputs. Numbers that JSON lacks are NaN, Infinity and -Infinity.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

import infer
from infer.config import EngineConfig
from infer.jsonl import JsonLines, Line
from infer.outputs import CompletionOutput, Logprob, RequestOutput
from infer.request import FinishReason, Request

VERSION = 1
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")


class _Entry(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """One finished prompt."""

    key: str
    num_cached_tokens: int
    outputs: list[CompletionOutput]
    prompt_logprobs: list[dict[int, Logprob] | None] | None


class Journal:
    """Finished prompts on the disk. A run reads back those of the runs before it, and adds its own.

    A prompt is known by its token ids, its parameters, its seed and its number in the script: a script that asks for
    the same thing twice gets two results. Outputs stay on the disk until they are asked for. Raises ValueError for a
    file that is no journal, or one of another model or other settings.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self._file = JsonLines(path)
        self._places: dict[bytes, tuple[int, int]] = {}  # key -> offset and bytes of its line
        try:
            self._read(json.loads(msgspec.json.encode(settings)))  # as they will be read back
        except BaseException:
            self._file.close()
            raise

    def __len__(self) -> int:
        """Prompts that earlier runs finished."""
        return len(self._places)

    def recall(self, request: Request, output: RequestOutput) -> bool:
        """Fills in the output of a prompt that an earlier run finished; False where none has. Raises OSError."""
        place = self._places.get(_key(request))
        if place is None:
            return False
        entry = self._decode(self._file.read(*place))
        output.outputs, output.prompt_logprobs = entry.outputs, entry.prompt_logprobs
        output.num_cached_tokens, output.finished = entry.num_cached_tokens, True
        return True

    def add(self, request: Request, output: RequestOutput) -> None:
        """Writes a finished prompt down; flush() says when it is safe. One that failed is left for a later run."""
        if any(choice.finish_reason in (FinishReason.ERROR, FinishReason.ABORT) for choice in output.outputs):
            return
        entry = _Entry(
            key=_key(request).hex(), num_cached_tokens=output.num_cached_tokens, outputs=output.outputs,
            prompt_logprobs=output.prompt_logprobs,
        )  # fmt: skip
        self._append(msgspec.to_builtins(entry, str_keys=True))

    def flush(self) -> None:
        """Waits until all that was added is on the disk. Raises OSError."""
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def _append(self, value: dict[str, Any]) -> None:
        self._file.append(json.dumps(value, separators=(",", ":")).encode())

    def _read(self, settings: dict[str, Any]) -> None:
        lines = self._file.lines()
        first = next(lines, None)
        if first is None:
            self._append({"journal": VERSION, "settings": settings})
            self.flush()
            return
        self._check_settings(first, settings)
        for line in lines:
            self._places[bytes.fromhex(self._entry(line).key)] = (line.offset, len(line.data))

    def _check_settings(self, line: Line, settings: dict[str, Any]) -> None:
        path = self._file.path
        try:
            header = json.loads(line.data)
            version, theirs = header["journal"], dict(header["settings"])
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ValueError(f"{path}: is no journal of LLM.generate; give another path") from None
        if version != VERSION:
            raise ValueError(f"{path}: is a journal of version {version}; this program writes version {VERSION}")
        for name in sorted({*theirs, *settings}):
            if theirs.get(name) != settings.get(name):
                raise ValueError(
                    f"{path}: is the journal of a run with another {name} ({theirs.get(name)!r}, now "
                    f"{settings.get(name)!r}); give another path, or remove the file to compute everything again"
                )

    def _entry(self, line: Line) -> _Entry:
        try:
            entry = self._decode(line.data)
            bytes.fromhex(entry.key)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self._file.path}: line {line.number} is no entry of a journal: {error}") from None
        return entry

    def _decode(self, data: bytes) -> _Entry:
        return msgspec.convert(json.loads(data), _Entry, str_keys=True)


def _key(request: Request) -> bytes:
    """Everything that the results depend on beside the settings. request_id: the prompt's number in the script."""
    asked = [
        request.request_id, request.prompt_token_ids, request.params, request.seed, request.eos_token_ids,
        request.bad_words_token_ids,
    ]  # fmt: skip
    return hashlib.sha256(msgspec.json.encode(asked)).digest()[:16]


def journal_settings(
    config: EngineConfig, model_path: Path, tokenizer_path: Path, dtype: str, max_model_len: int
) -> dict[str, Any]:
    """What decides the results of a prompt beside itself, whatever directory the model lies in. The layout is not among
    them, nor are the limits: they leave the outcome as it is. Raises OSError."""
    dummy = config.load_format == "dummy"
    return {
        "version": infer.__version__,
        "model": _digest(model_path, ("config.json",), () if dummy else ("*.safetensors",)),
        "tokenizer": _digest(tokenizer_path, _TOKENIZER_FILES),
        "dtype": dtype,
        "load_format": "dummy" if dummy else "checkpoint",
        "hf_overrides": config.hf_overrides,
        "max_model_len": max_model_len,
        "seed": config.seed,
    }


def _digest(directory: Path, files: tuple[str, ...], sized: tuple[str, ...] = ()) -> str:
    """Of the contents of some files, where they are there, and of the names and sizes of others."""
    digest = hashlib.sha256()
    for name in files:
        path = directory / name
        if path.is_file():
            digest.update(f"{name} {path.stat().st_size}\n".encode() + path.read_bytes())
    for pattern in sized:
        for path in sorted(directory.glob(pattern)):
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
    return digest.hexdigest()[:16]
