"""What every tokenizer can do, whatever its files: text to token ids, and tokens to bytes and text. No torch here."""

import abc
from collections.abc import Sequence
from typing import ClassVar

WORD_BEGIN = "\u2581"  # stands for a space in vocabularies of SentencePiece's kind


class Vocabulary(abc.ABC):
    """Base of the kinds of tokenizer. Ids are [0, vocab_size); the model's own vocabulary may be padded beyond.

    special_ids: left out of decoded text by skip_special_tokens. added_ids: tokens that stand for their own text, the
    special ones among them. max_token_chars: no token stands for more characters. is_joined: a text is its tokens'
    bytes joined, but for a first space that goes (drops_first_space); else a token's text depends on its neighbours.
    """

    special_ids: frozenset[int]
    added_ids: frozenset[int]
    vocab_size: int
    max_token_chars: int
    is_joined: bool
    drops_first_space: bool

    _NOTHING: ClassVar[frozenset[int]] = frozenset()

    def __init__(self) -> None:
        self._bytes: dict[int, bytes] = {}  # both are filled as tokens are seen
        self._texts: dict[int, str | None] = {}

    @abc.abstractmethod
    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids. Raises ValueError where the text holds what is no character."""

    @abc.abstractmethod
    def token_id(self, piece: str) -> int | None:
        """The id of the token that the vocabulary spells so; None where there is none."""

    @abc.abstractmethod
    def piece(self, token_id: int) -> str:
        """The token as the vocabulary spells it, such as "Ġworld" or "▁world"; empty outside the vocabulary."""

    @abc.abstractmethod
    def is_byte_token(self, token_id: int) -> bool:
        """Whether a token stands for one byte of a character the vocabulary lacks (never with byte-level BPE)."""

    @abc.abstractmethod
    def spell(self, token_id: int) -> bytes:
        """token_bytes, worked out."""

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token stands for inside a text; empty outside the vocabulary."""
        found = self._bytes.get(token_id)
        if found is None:
            found = self._bytes[token_id] = self.spell(token_id)
        return found

    def whole_text(self, token_id: int) -> str | None:
        """The text of a token that is made of whole characters; None where one of them is cut."""
        try:
            return self._texts[token_id]
        except KeyError:
            try:
                text = self.token_bytes(token_id).decode("utf-8")
            except UnicodeDecodeError:
                text = None
            self._texts[token_id] = text
            return text

    def skipped_ids(self, skip_special_tokens: bool) -> frozenset[int]:
        return self.special_ids if skip_special_tokens else self._NOTHING

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        """The text of all the tokens together. Ids outside the vocabulary give nothing."""
        skipped = self.skipped_ids(skip_special_tokens)
        joined = b"".join([self.token_bytes(token_id) for token_id in token_ids if token_id not in skipped])
        text = joined.decode("utf-8", "replace")
        return text.removeprefix(" ") if self.drops_first_space else text
