"""Tokens to text, one token at a time, never half a character. No torch here."""

import codecs
import itertools
from collections.abc import Sequence
from typing import Protocol

from infer.serve.vocabulary import Vocabulary

PROMPT_WINDOW = 6  # prompt tokens that decide how the first generated token begins (a space or none)
MAX_SEEN_PROMPT = 64  # and so many at most are looked at, once a choice; a longer prompt counts as one that has text
MAX_PENDING_TOKENS = 16  # longest run of tokens held back for a character; no tokenizer needs more for a real one


class Decoder(Protocol):
    """One choice's tokens on their way to text."""

    def add(self, token_id: int) -> str:
        """The text that one more token makes certain."""

    def flush(self) -> str:
        """What was held back for characters that never came whole."""


def make_decoder(
    vocabulary: Vocabulary, skip_special_tokens: bool, spaces_between_special_tokens: bool,
    prompt_token_ids: Sequence[int] = (),
) -> Decoder:  # fmt: skip
    """The decoder for tokens of this vocabulary.

    spaces_between_special_tokens: False drops the space that some tokenizers' decoders (WordPiece) put between two
    added tokens, as vLLM does. Where a text is its tokens joined there is none, and it changes nothing.
    """
    if vocabulary.is_joined:
        return JoiningDecoder(vocabulary, skip_special_tokens, prompt_token_ids)
    if skip_special_tokens or spaces_between_special_tokens:
        return WindowDecoder(vocabulary, skip_special_tokens, prompt_token_ids)
    return CloseSpecialTokens(vocabulary, prompt_token_ids)


class JoiningDecoder:
    """For tokenizers whose text is their tokens' bytes joined: incremental UTF-8 decoding, exact for any tokens.

    Bytes that are no character show as U+FFFD, one for each longest part that a character could have begun with.
    """

    def __init__(self, vocabulary: Vocabulary, skip_special_tokens: bool, prompt_token_ids: Sequence[int] = ()) -> None:
        self._vocabulary = vocabulary
        self._skipped = vocabulary.skipped_ids(skip_special_tokens)
        self._whole_text = vocabulary.whole_text
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._has_half = False  # the tokens so far end inside a character
        is_bare = len(prompt_token_ids) <= MAX_SEEN_PROMPT and self._skipped.issuperset(prompt_token_ids)
        self._drops_space = vocabulary.drops_first_space and is_bare  # until there is text

    def add(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        text = None if self._has_half else self._whole_text(token_id)
        if text is None:
            text = self._utf8.decode(self._vocabulary.token_bytes(token_id))
            self._has_half = bool(self._utf8.getstate()[0])
        return self._without_first_space(text) if self._drops_space else text

    def _without_first_space(self, text: str) -> str:
        if text:
            self._drops_space = False
        return text.removeprefix(" ")

    def flush(self) -> str:
        self._has_half = False
        return self._utf8.decode(b"", final=True)


class WindowDecoder:
    """For every other decoder, where a token's text depends on its neighbours: decodes a short window twice.

    The window is tokens whose text is out ([0, _shown) of it, for context) and tokens held back ([_shown, end)); the
    new text is what the second part adds. Held back is what ends in U+FFFD, as half a character does, or adds nothing.
    """

    def __init__(self, vocabulary: Vocabulary, skip_special_tokens: bool, prompt_token_ids: Sequence[int] = ()) -> None:
        self._vocabulary = vocabulary
        self._skip = skip_special_tokens
        self._window = self._context(prompt_token_ids)
        self._shown = len(self._window)
        self._shown_text = self._decode()

    def _context(self, prompt_token_ids: Sequence[int]) -> list[int]:
        """The prompt's last tokens, without half characters: one that it ends in would swallow generated text, since
        bytes are decoded, or replaced by U+FFFD, together with their neighbours."""
        is_byte = self._vocabulary.is_byte_token
        seen = reversed(prompt_token_ids[-MAX_SEEN_PROMPT:])
        tokens = (t for t in seen if not self._is_skipped(t) and not is_byte(t))
        context = [*itertools.islice(tokens, PROMPT_WINDOW)][::-1]
        while context and self._vocabulary.decode(context, self._skip).endswith("\ufffd"):
            context.pop()
        return context

    def _is_skipped(self, token_id: int) -> bool:
        return self._skip and token_id in self._vocabulary.special_ids

    def _decode(self) -> str:
        return self._vocabulary.decode(self._window, self._skip)

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


class CloseSpecialTokens(WindowDecoder):
    """Shows special tokens, and of two added tokens next to each other the second one as its text alone."""

    def __init__(self, vocabulary: Vocabulary, prompt_token_ids: Sequence[int] = ()) -> None:
        super().__init__(vocabulary, False, prompt_token_ids)
        self._after_added = False

    def add(self, token_id: int) -> str:
        is_added = token_id in self._vocabulary.added_ids
        text = super().add(token_id)
        if is_added and self._after_added:
            text = text.removeprefix(" ")
        self._after_added = is_added
        return text
