"""Text and tokens: the tokenizer, incremental detokenization, stop strings. No torch here.

The frontend and LLM share these classes, so that both give the same text.
"""

import codecs
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from tokenizers import Tokenizer as Backend
from tokenizers import decoders

from infer.request import SamplingParams
from infer.serve.chat import ChatTemplate

PROMPT_WINDOW = 6  # prompt tokens that decide how the first generated token begins (a space or none)
MAX_PENDING_TOKENS = 16  # longest run of tokens held back for a character; no tokenizer needs more for a real one
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """A Hugging Face tokenizer directory, with the results AutoTokenizer would give.

    What goes around a text (a leading BOS) is tokenizer.json's to say: its post-processor was made from
    tokenizer_config.json's add_bos_token and add_eos_token, which AutoTokenizer does not read beside it either.

    vocab_size: ids are [0, vocab_size) (the model's own vocabulary may be padded beyond). special_ids: left out of
    decoded text by skip_special_tokens. max_token_chars: no token stands for more characters.
    """

    def __init__(self, backend: Backend, template: ChatTemplate | None, path: Path) -> None:
        self._backend = backend
        self._template = template
        self._path = path
        backend.no_truncation()  # some files carry the limits of their training run
        backend.no_padding()
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        self.max_token_chars = max(map(len, backend.get_vocab(with_added_tokens=True)), default=1)
        self.is_byte_level = _is_byte_level(backend)
        self._byte_fallback = bool(getattr(backend.model, "byte_fallback", False))
        self._bytes: dict[int, bytes] = {}  # filled as tokens are seen

    @classmethod
    def load(cls, path: Path | str) -> "Tokenizer":
        """Reads tokenizer.json, tokenizer_config.json and the chat template from a directory.

        Raises ValueError that names the file when one is missing or corrupt.
        """
        path = Path(path)
        file = path / "tokenizer.json"
        if not file.is_file():
            raise ValueError(f"{file} does not exist; a tokenizer directory needs tokenizer.json")
        try:
            backend = Backend.from_file(str(file))
        except Exception as error:  # the library raises bare Exception for every defect
            raise ValueError(f"{file} is not a tokenizer: {str(error)[:300]}") from None
        config = _read_config(path / "tokenizer_config.json")
        return cls(backend, _read_template(path, config), path)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids. add_special_tokens adds what the tokenizer itself wants around a text, such as a leading BOS."""
        try:
            return self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError:
            raise ValueError("the text holds half a surrogate pair, which is no character") from None

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of all the tokens together. Ids outside the vocabulary give nothing."""
        return self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def token(self, token_id: int) -> str:
        """The text of one token by itself; bytes that are no whole character show as U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token stands for inside a text; empty outside the vocabulary."""
        found = self._bytes.get(token_id)
        if found is None:
            found = self._bytes[token_id] = self._spell(token_id)
        return found

    def _spell(self, token_id: int) -> bytes:
        piece = self._backend.id_to_token(token_id)
        if piece is None:
            return b""
        if self.is_byte_level:
            return byte_level_bytes(piece)
        if match := self._byte_token(piece):
            return bytes([int(match[1], 16)])
        return piece.replace("\u2581", " ").encode("utf-8", "replace")

    def _byte_token(self, piece: str) -> re.Match[str] | None:
        return _BYTE_TOKEN.fullmatch(piece) if self._byte_fallback else None

    def is_byte_token(self, token_id: int) -> bool:
        """Whether a token stands for one byte of a character the vocabulary lacks (never with byte-level BPE)."""
        piece = self._backend.id_to_token(token_id)
        return piece is not None and self._byte_token(piece) is not None

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], /, add_generation_prompt: bool = True, **kwargs: Any
    ) -> str:
        """The prompt's text for a conversation. kwargs: continue_final_message, and variables of the template.

        Raises ValueError when there is no template or it refuses the messages.
        """
        if self._template is None:
            raise ValueError(
                f"{self._path} has no chat template (chat_template in tokenizer_config.json, or chat_template.jinja); "
                "this model takes plain completions only"
            )
        return self._template.render(messages, add_generation_prompt, **kwargs)


def _read_config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ValueError(f"{file} does not exist; a tokenizer directory needs tokenizer_config.json")
    try:
        config = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{file} must hold a JSON object, not {type(config).__name__}")
    return config


def _read_template(path: Path, config: Mapping[str, Any]) -> ChatTemplate | None:
    """chat_template.jinja goes before tokenizer_config.json, as in transformers."""
    special = {name: text for name in _SPECIAL_NAMES if (text := _content(config.get(name))) is not None}
    file = path / "chat_template.jinja"
    if file.is_file():
        try:
            return ChatTemplate(file.read_text("utf-8"), str(file), special)
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{file} cannot be read: {error}") from None
    source = config.get("chat_template")
    origin = str(path / "tokenizer_config.json")
    if isinstance(source, list):
        named = {item.get("name"): item.get("template") for item in source if isinstance(item, dict)}
        source = named.get("default")
        if source is None:
            raise ValueError(f'{origin}: chat_template is a list without a template named "default"')
    if source is None:
        return None
    if not isinstance(source, str):
        raise ValueError(f"{origin}: chat_template must be a string or a list, not {type(source).__name__}")
    return ChatTemplate(source, origin, special)


def _content(token: Any) -> str | None:
    """A special token's text; it is written as a string or as an object."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _is_byte_level(backend: Backend) -> bool:
    return isinstance(backend.decoder, decoders.ByteLevel)


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


class _Decoder(Protocol):
    def add(self, token_id: int) -> str:
        """The text that one more token makes certain."""

    def flush(self) -> str:
        """What was held back for characters that never came whole."""


class _ByteDecoder:
    """For byte-level BPE: tokens are bytes, and text is their incremental UTF-8 decoding. Exact for any tokens."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token_id: int) -> str:
        return "" if token_id in self._skipped else self._utf8.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class _WindowDecoder:
    """For every other decoder, where a token's text depends on its neighbours: decodes a short window twice.

    The window is tokens whose text is out ([0, _shown) of it, for context) and tokens held back ([_shown, end)); the
    new text is what the second part adds. Held back is what ends in U+FFFD, as half a character does, or adds nothing.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool, prompt_token_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._window = self._context(prompt_token_ids)
        self._shown = len(self._window)
        self._shown_text = self._decode()

    def _context(self, prompt_token_ids: Sequence[int]) -> list[int]:
        """The prompt's last tokens, without half characters: one that it ends in would swallow generated text, since
        bytes are decoded, or replaced by U+FFFD, together with their neighbours."""
        is_byte = self._tokenizer.is_byte_token
        tokens = (t for t in reversed(prompt_token_ids) if not self._is_skipped(t) and not is_byte(t))
        context = [*itertools.islice(tokens, PROMPT_WINDOW)][::-1]
        while context and self._tokenizer.decode(context, skip_special_tokens=self._skip).endswith("\ufffd"):
            context.pop()
        return context

    def _is_skipped(self, token_id: int) -> bool:
        return self._skip and token_id in self._tokenizer.special_ids

    def _decode(self) -> str:
        return self._tokenizer.decode(self._window, skip_special_tokens=self._skip)

    def add(self, token_id: int) -> str:
        if self._is_skipped(token_id):
            return ""
        self._window.append(token_id)
        text = self._decode()
        new = text[len(self._shown_text) :]
        if (not new or new.endswith("\ufffd")) and len(self._window) - self._shown < MAX_PENDING_TOKENS:
            return ""
        self._slide()
        return new

    def _slide(self) -> None:
        del self._window[: self._shown]
        self._shown = len(self._window)
        self._shown_text = self._decode()

    def flush(self) -> str:
        new = self._decode()[len(self._shown_text) :]
        self._slide()
        return new


class _StopMatcher:
    """Finds the stop string that is complete first, one character at a time, in linear time (Knuth-Morris-Pratt)."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = sorted(set(stops), key=len, reverse=True)  # of two that end together, the longer one counts
        self._borders = [_borders(stop) for stop in self._stops]
        self._matched = [0] * len(self._stops)  # characters of each stop string the text now ends with

    @property
    def held(self) -> int:
        """How many of the text's last characters may be the beginning of a stop string."""
        return max(self._matched, default=0)

    def feed(self, char: str) -> str | None:
        """The stop string this character completes, if it does."""
        found = None
        for i, stop in enumerate(self._stops):
            borders, length = self._borders[i], self._matched[i]
            while length and stop[length] != char:
                length = borders[length - 1]
            length += stop[length] == char
            if length == len(stop):
                found = found or stop
                length = borders[length - 1]
            self._matched[i] = length
        return found


def _borders(text: str) -> list[int]:
    """For each prefix, the length of its longest proper prefix that is also its suffix."""
    borders = [0] * len(text)
    length = 0
    for i in range(1, len(text)):
        while length and text[i] != text[length]:
            length = borders[length - 1]
        length += text[i] == text[length]
        borders[i] = length
    return borders


class TextStream:
    """One choice's text as its tokens come: no half characters, no part of a stop string.

    The result does not depend on how the tokens were divided over calls. Tokens after the one that completes a stop
    string are ignored. A stop string that is complete within the first params.min_tokens tokens does not count.

    stop_reason: the stop string found. num_tokens: tokens that count, the one completing the stop string included.
    prompt_token_ids: tells tokenizers with word-begin marks whether the first token starts with a space.
    """

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams, prompt_token_ids: Sequence[int] = ()) -> None:
        self.stop_reason: str | None = None
        self.num_tokens = 0
        self._min_tokens = params.min_tokens
        self._include_stop = params.include_stop_str_in_output
        self._matcher = _StopMatcher(params.stop_strings) if params.stop_strings else None
        self._decoder: _Decoder | None = None
        if params.detokenize and tokenizer.is_byte_level:
            self._decoder = _ByteDecoder(tokenizer, params.skip_special_tokens)
        elif params.detokenize:
            self._decoder = _WindowDecoder(tokenizer, params.skip_special_tokens, prompt_token_ids)
        self._emitted: list[str] = []
        self._pending = ""  # decoded, not yet emitted

    @property
    def text(self) -> str:
        """Everything emitted so far."""
        if len(self._emitted) > 1:
            self._emitted = ["".join(self._emitted)]
        return self._emitted[0] if self._emitted else ""

    def append(self, token_ids: Sequence[int], stopped: bool = False) -> str:
        """Takes new tokens, returns the text that may be shown now.

        stopped: the engine ended the choice with the last of these (finish_reason `stop`: an end token or one of
        stop_token_ids). That token counts, but is not part of the text unless include_stop_str_in_output.
        """
        for position, token_id in enumerate(token_ids):
            if self.stop_reason is not None:
                break
            self.num_tokens += 1
            ends = stopped and position == len(token_ids) - 1
            if self._decoder is not None and not (ends and not self._include_stop):
                self._take(self._decoder.add(token_id))
        return self._emit(self._num_held())

    def finish(self) -> str:
        """The choice is over: returns the text held back. After a stop string there is none."""
        if self.stop_reason is None and self._decoder is not None:
            self._take(self._decoder.flush())
        return self._emit(0)

    def _take(self, text: str) -> None:
        if self._matcher is None:
            self._pending += text
            return
        for position, char in enumerate(text):
            stop = self._matcher.feed(char)
            if stop is not None and self.num_tokens > self._min_tokens:
                end = len(self._pending) + position + 1
                self._pending = (self._pending + text)[: end if self._include_stop else end - len(stop)]
                self.stop_reason = stop
                return
        self._pending += text

    def _num_held(self) -> int:
        # With include_stop_str_in_output everything will be shown, whether or not a stop string begins here.
        return 0 if self._matcher is None or self.stop_reason is not None or self._include_stop else self._matcher.held

    def _emit(self, num_held: int) -> str:
        cut = len(self._pending) - num_held
        text, self._pending = self._pending[:cut], self._pending[cut:]
        if text:
            self._emitted.append(text)
        return text
