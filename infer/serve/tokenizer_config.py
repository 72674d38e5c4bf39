"""What stands beside a tokenizer: tokenizer_config.json, special_tokens_map.json, added_tokens.json. No torch here."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class AddedToken:
    """A token that stands for its own text, found in a text before anything else.

    special: left out of decoded text by skip_special_tokens. lstrip, rstrip: it takes the spaces before, after it.
    single_word: not found inside a word.
    """

    text: str
    special: bool = True
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


def read_json_object(file: Path) -> dict[str, Any]:
    """Raises ValueError, naming the file, for what cannot be read and for what is no JSON object."""
    try:
        value = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file} must hold a JSON object, not {type(value).__name__}")
    return value


def read_config(path: Path) -> dict[str, Any]:
    """tokenizer_config.json, which every tokenizer directory has. Raises ValueError."""
    file = path / "tokenizer_config.json"
    if not file.is_file():
        raise ValueError(f"{file} does not exist; a tokenizer directory needs tokenizer_config.json")
    return read_json_object(file)


def special_tokens(path: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """bos_token and the like -> text. special_tokens_map.json counts where the config is of the older kind, without
    added_tokens_decoder, as in transformers. Raises ValueError."""
    file = path / "special_tokens_map.json"
    is_older = "added_tokens_decoder" not in config and file.is_file()
    settings = {**config, **read_json_object(file)} if is_older else config
    return {name: text for name in _SPECIAL_NAMES if (text := _text(settings.get(name))) is not None}


def added_tokens(path: Path, config: Mapping[str, Any]) -> dict[int, AddedToken]:
    """By id, from tokenizer_config.json's added_tokens_decoder or the older added_tokens.json. Raises ValueError."""
    listed = config.get("added_tokens_decoder")
    if listed is not None:
        return dict(_added_token(path / "tokenizer_config.json", key, value) for key, value in listed.items())
    file = path / "added_tokens.json"
    if not file.is_file():
        return {}
    special = set(special_tokens(path, config).values())
    listed = read_json_object(file)
    if "" in listed:
        raise ValueError(f"{file} has an empty token, which every text would hold everywhere")
    return {_id(file, token_id): AddedToken(text, text in special) for text, token_id in listed.items()}


def _added_token(file: Path, key: str, value: Any) -> tuple[int, AddedToken]:
    text = _text(value)
    if not text or not isinstance(value, dict) or not key.isdecimal():
        raise ValueError(f"{file}: added_tokens_decoder[{key[:40]!r}] must map an id to an object with content")
    flags = {name: value.get(name) is True for name in ("special", "lstrip", "rstrip", "single_word")}
    return int(key), AddedToken(text, **flags)


def _id(file: Path, value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{file}: token ids must be integers of at least 0, not {str(value)[:40]}")
    return value


def _text(token: Any) -> str | None:
    """A special token's text; it is written as a string or as an object."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None
