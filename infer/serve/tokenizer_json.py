"""tokenizer.json: the tokenizers library's files, and how their tokens are spelled. No torch here."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import Tokenizer

from infer.serve.vocabulary import WORD_BEGIN, Vocabulary

LONG_TEXT_CHARS = 4_000  # longer ones are encoded without the interpreter's lock
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class _File(msgspec.Struct):
    """What is read of a file beside the library: it does not tell its decoder's settings."""

    decoder: dict[str, Any] | None = None


class TokenizerJson(Vocabulary):
    """A tokenizer.json file. Raises ValueError that names it where it is none."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        try:
            data = file.read_bytes()
            self._tokenizer = Tokenizer.from_buffer(data)
        except Exception as error:  # the library raises bare Exception for every defect
            raise ValueError(f"{file} is not a tokenizer: {str(error)[:300]}") from None
        self._tokenizer.no_truncation()  # some files carry the limits of their training run
        self._tokenizer.no_padding()
        decoder = msgspec.json.decode(data, type=_File).decoder or {}
        self._is_byte_level = decoder.get("type") == "ByteLevel"
        steps = [_step(step) for step in decoder.get("decoders", [])]
        # The two decoders of language models that join tokens; every other one is left to the library.
        joins = steps[:3] == ["spaces", "bytes", "fuse"] and steps[3:] in ([], ["strip"])
        self.is_joined = self._is_byte_level or joins
        self.drops_first_space = joins and "strip" in steps
        self._has_byte_tokens = bool(getattr(self._tokenizer.model, "byte_fallback", False)) or "bytes" in steps
        added = self._tokenizer.get_added_tokens_decoder()
        self.added_ids = frozenset(added)
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self.max_token_chars = max(map(len, vocabulary), default=1)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        try:
            if len(text) <= LONG_TEXT_CHARS:
                return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
            # encode() keeps the interpreter's lock for as long as it works; encoding a batch gives it up.
            [encoding] = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
            return encoding.ids
        except TypeError:
            raise ValueError("the text holds half a surrogate pair, which is no character") from None

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        if self.is_joined:
            return super().decode(token_ids, skip_special_tokens)
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def token_id(self, piece: str) -> int | None:
        return self._tokenizer.token_to_id(piece)

    def piece(self, token_id: int) -> str:
        return self._tokenizer.id_to_token(token_id) or ""

    def spell(self, token_id: int) -> bytes:
        piece = self.piece(token_id)
        if self._is_byte_level:
            return byte_level_bytes(piece)
        if self._has_byte_tokens and (match := _BYTE_TOKEN.fullmatch(piece)):
            return bytes([int(match[1], 16)])
        return piece.replace(WORD_BEGIN, " ").encode("utf-8", "replace")

    def is_byte_token(self, token_id: int) -> bool:
        return self._has_byte_tokens and _BYTE_TOKEN.fullmatch(self.piece(token_id)) is not None


def _step(decoder: dict[str, Any]) -> str:
    """A short name for the steps whose working together is known; "other" for the rest."""
    match decoder:
        case {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}:
            return "spaces"
        case {"type": "ByteFallback"}:
            return "bytes"
        case {"type": "Fuse"}:
            return "fuse"
        case {"type": "Strip", "content": " ", "start": 1, "stop": 0}:
            return "strip"
    return "other"


def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE writes every byte as a visible character: itself where printable, else the next from U+0100."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(0x100 + i): byte for i, byte in enumerate(hidden)}


_BYTE_ALPHABET = _byte_alphabet()


def byte_level_bytes(piece: str) -> bytes:
    """The bytes of a token of byte-level BPE. An added token with other characters stands for its own text."""
    try:
        return bytes(_BYTE_ALPHABET[char] for char in piece)
    except KeyError:
        return piece.encode("utf-8")
