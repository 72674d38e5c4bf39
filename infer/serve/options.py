"""What rank 0 works out of the command line for the frontend. No torch here."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import infer
from infer.config import EngineConfig, ServerConfig, check_api_key
from infer.request import SamplingParams
from infer.serve.link import FrontendConfig

# What a checkpoint may recommend, and SamplingParams' name of it.
_RECOMMENDED = {
    "temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p",
    "repetition_penalty": "repetition_penalty", "max_new_tokens": "max_tokens",
}  # fmt: skip
_SECRET_FLAG = "--api-key"
KEY_VARIABLE = "INFER_API_KEY"


def frontend_config(
    engine: EngineConfig, server: ServerConfig, names: tuple[str, ...], model_path: Path, tokenizer_path: Path,
    port_wait_s: float = 0.0,
) -> FrontendConfig:  # fmt: skip
    """The frontend's configuration. server.api_key: the keys of every source. Raises ValueError that names the flag."""
    shared: dict[str, Any] = {
        **vars(server), "served_model_name": names, "api_key_file": None, "config": None,
    }  # fmt: skip
    return FrontendConfig(
        **shared,
        model_path=str(model_path),
        tokenizer_path=str(tokenizer_path),
        port_wait_s=port_wait_s,
        default_sampling=default_sampling(server.generation_config, model_path),
        system_fingerprint=fingerprint(engine, model_path),
    )


def default_sampling(generation_config: str, model_path: Path) -> dict[str, int | float]:
    """The sampling parameters that generation_config.json recommends, by SamplingParams' names.

    generation_config: auto (the checkpoint's, where it has one), vllm (none), or a directory with the file. Raises
    ValueError that names the file.
    """
    if generation_config == "vllm":
        return {}
    directory = model_path if generation_config == "auto" else Path(generation_config).expanduser()
    path = directory / "generation_config.json"
    if not path.is_file():
        if generation_config == "auto":
            return {}
        raise ValueError(
            f"--generation-config {generation_config}: {path} does not exist; use auto, vllm or a directory"
        )
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read: {error}; --generation-config vllm leaves it out") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: must hold a JSON object; --generation-config vllm leaves it out")
    found = {ours: values[theirs] for theirs, ours in _RECOMMENDED.items() if values.get(theirs) is not None}
    try:
        SamplingParams(**found)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}; --generation-config vllm leaves it out") from None
    return found


def fingerprint(engine: EngineConfig, model_path: Path) -> str:
    """system_fingerprint: changes with the program, the model's configuration and what decides its numbers.

    Not with the layout, the addresses or the limits: they leave the outcome as it is.
    """
    try:
        model_config = (model_path / "config.json").read_bytes()
    except OSError:  # the engine will say what is wrong with the model
        model_config = b""
    settings: Mapping[str, object] = {
        "version": infer.__version__, "model": engine.model, "revision": engine.revision, "dtype": engine.dtype,
        "overrides": engine.hf_overrides, "load_format": engine.load_format,
        "seed": engine.seed if engine.load_format == "dummy" else None,
    }  # fmt: skip
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode() + model_config)
    return "fp_" + digest.hexdigest()[:12]


def read_api_keys(server: ServerConfig, environ: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """The keys of --api-key, of --api-key-file and of INFER_API_KEY, each once; none: everybody may call.

    Raises ValueError, which never tells a key.
    """
    keys = list(server.api_key or ())
    if server.api_key_file is not None:
        keys += _read_key_file(Path(server.api_key_file))
    if from_environ := environ.get(KEY_VARIABLE):
        check_api_key(from_environ, KEY_VARIABLE)
        keys.append(from_environ)
    return tuple(dict.fromkeys(keys))


def _read_key_file(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--api-key-file {path}: cannot be read: {error}") from None
    keys = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not keys:  # an empty file must not open the server to everybody
        raise ValueError(f"--api-key-file {path}: holds no key; write one a line")
    for key in keys:
        check_api_key(key, f"--api-key-file {path}")
    return keys


def without_secrets(argv: list[str]) -> list[str]:
    """The command line as it may be shown: KEY for each API key."""
    shown, is_key = [], False
    for argument in argv:
        if argument.startswith("-"):
            is_key = argument == _SECRET_FLAG
            shown.append(f"{_SECRET_FLAG}=KEY" if argument.startswith(_SECRET_FLAG + "=") else argument)
        else:
            shown.append("KEY" if is_key else argument)
    return shown
