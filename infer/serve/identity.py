"""What an engine serves, as one string: a frontend that outlives its engine takes only the same again. No torch."""

import dataclasses
import hashlib
import json
from pathlib import Path

from infer.config import EngineConfig
from infer.serve.link import FrontendConfig

# The model's small files, by what they say.
_READ = ("*.json", "tokenizer.model", "*.jinja")
# Its weights, which are large: by name, size and time of the last change.
_LOOKED_AT = ("*.safetensors", "*.gguf")
# A process's own, not of what it serves.
_OF_THE_PROCESS = frozenset(
    {"socket_path", "engine_pid", "agent_pid", "identity", "report_fd", "lock_fd", "listener_fds", "port_wait_s"}
)


def identity(engine: EngineConfig, frontend: FrontendConfig) -> str:
    """The same for two engines whose requests can go on from one to the other: the same model, tokenizer and flags."""
    settings = {name: value for name, value in vars(frontend).items() if name not in _OF_THE_PROCESS}
    digest = hashlib.sha256(json.dumps([dataclasses.asdict(engine), settings], sort_keys=True).encode())
    for directory in dict.fromkeys((frontend.model_path, frontend.tokenizer_path)):
        _add_files(digest, Path(directory))
    return digest.hexdigest()


def _add_files(digest: "hashlib._Hash", directory: Path) -> None:
    for path in _find(directory, _READ):
        try:
            digest.update(f"{path.name}:".encode() + hashlib.sha256(path.read_bytes()).digest())
        except OSError as error:  # the engine will say what is wrong with the model
            digest.update(f"{path.name}: {error.errno}".encode())
    for path in _find(directory, _LOOKED_AT):
        status = path.stat()
        digest.update(f"{path.name}: {status.st_size} {status.st_mtime_ns}".encode())


def _find(directory: Path, patterns: tuple[str, ...]) -> list[Path]:
    return sorted(path for pattern in patterns for path in directory.glob(pattern) if path.is_file())
