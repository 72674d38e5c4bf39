"""tokenizer.model: SentencePiece's files, read by SentencePiece itself, so that ids are its own. No torch here."""

import itertools
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor

from infer.serve.tokenizer_config import AddedToken, added_tokens, special_tokens
from infer.serve.vocabulary import WORD_BEGIN, Vocabulary

# Messages of one protocol buffer after another are merged: this one is normalizer_spec { add_dummy_prefix: false }.
_NO_PREFIX = b"\x1a\x02\x18\x00"


class SentencePiece(Vocabulary):
    """A directory with tokenizer.model but no tokenizer.json.

    The text between added tokens is SentencePiece's to divide. As in Llama's tokenizers it begins with a space of its
    own, after every added token too; with `"legacy": false` in tokenizer_config.json at the text's beginning only.
    Raises ValueError that names what is wrong.
    """

    is_joined = True

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        super().__init__()
        self._file = path / "tokenizer.model"
        model = _read(self._file)
        self._model = self._inner = _processor(self._file, model)
        adds_prefix = self._adds_prefix()
        wanted = config.get("add_prefix_space")
        if adds_prefix and (wanted is False or config.get("legacy") is False):
            self._inner = _processor(self._file, model + _NO_PREFIX)
            if wanted is False:
                self._model, adds_prefix = self._inner, False
        self.drops_first_space = adds_prefix
        self._added = {**self._controls(), **added_tokens(path, config)}
        self.added_ids = frozenset(self._added)
        self.special_ids = frozenset(token_id for token_id, token in self._added.items() if token.special)
        self._num_pieces = self._model.get_piece_size()
        self.vocab_size = max(self._num_pieces, *(token_id + 1 for token_id in self._added))
        self._ids = {token.text: token_id for token_id, token in self._added.items()}
        self._split = splitter(self._added.values())
        pieces = (len(self._model.id_to_piece(token_id)) for token_id in range(self._num_pieces))
        self.max_token_chars = max([*pieces, *map(len, self._ids)])
        names = special_tokens(path, config)
        self._before = self._around(config, "bos", names, self._model.bos_id(), default=True)
        self._after = self._around(config, "eos", names, self._model.eos_id(), default=False)

    def _adds_prefix(self) -> bool:
        """Whether the model puts a space before a text. Some put it after instead, which is not supported."""
        normal = self._model.normalize("a")
        if normal.endswith(WORD_BEGIN):
            raise ValueError(f"{self._file} is not supported: it marks the ends of words (treat_whitespace_as_suffix)")
        return normal.startswith(WORD_BEGIN)

    def _controls(self) -> dict[int, AddedToken]:
        """The model's own special tokens, such as <s> and <unk>, which it never finds in a text itself."""
        model = self._model
        ids = range(model.get_piece_size())
        return {i: AddedToken(model.id_to_piece(i)) for i in ids if model.is_control(i) or model.is_unknown(i)}

    def _around(
        self, config: Mapping[str, Any], kind: str, names: Mapping[str, str], own_id: int, default: bool
    ) -> list[int]:
        """The ids that go before (bos) or after (eos) a text."""
        wanted = config.get(f"add_{kind}_token")
        if not (default if wanted is None else wanted):
            return []
        text = names.get(f"{kind}_token")
        token_id = own_id if text is None else self.token_id(text)
        if token_id is not None and token_id >= 0:
            return [token_id]
        if wanted is None:
            return []
        raise ValueError(f"{self._file.parent}: add_{kind}_token is true, but there is no {kind}_token {text!r}")

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError("the text holds half a surrogate pair, which is no character") from None
        ids = list(self._before) if add_special_tokens else []
        model = self._model
        for piece in self._pieces(text):
            if isinstance(piece, int):
                ids.append(piece)
            else:
                ids += model.encode(piece)
            model = self._inner
        return ids + self._after if add_special_tokens else ids

    def _pieces(self, text: str) -> Iterator[str | int]:
        """The text divided: ids of added tokens, and the texts between them, without the spaces that tokens take."""
        parts = self._split.split(text)  # texts at even places, tokens between them
        for i, part in enumerate(parts):
            if i % 2:
                yield self._ids[part]
                continue
            if i > 0 and self._added[self._ids[parts[i - 1]]].rstrip:
                part = part.lstrip()
            if i + 1 < len(parts) and self._added[self._ids[parts[i + 1]]].lstrip:
                part = part.rstrip()
            if part:
                yield part

    def token_id(self, piece: str) -> int | None:
        found = self._ids.get(piece)
        if found is not None:
            return found
        token_id = self._model.piece_to_id(piece)
        return token_id if self._model.id_to_piece(token_id) == piece else None

    def piece(self, token_id: int) -> str:
        if (token := self._added.get(token_id)) is not None:
            return token.text
        return self._model.id_to_piece(token_id) if 0 <= token_id < self._num_pieces else ""

    def spell(self, token_id: int) -> bytes:
        piece = self.piece(token_id)
        if token_id in self._added:
            return piece.encode("utf-8", "replace")
        if self.is_byte_token(token_id):
            return bytes([int(piece[3:5], 16)])  # <0x0A>
        return piece.replace(WORD_BEGIN, " ").encode()

    def is_byte_token(self, token_id: int) -> bool:
        return 0 <= token_id < self._num_pieces and self._model.is_byte(token_id)


def splitter(tokens: Collection[AddedToken]) -> re.Pattern[str]:
    """Finds added tokens in a text, of several that begin at one place the longest (but single words before others)."""
    words = sorted((token.text for token in tokens if token.single_word), key=len, reverse=True)
    patterns = [rf"(?<!\w){re.escape(text)}(?!\w)" for text in words]
    patterns += _any_of([token.text for token in tokens if not token.single_word])
    return re.compile(f"({'|'.join(patterns) or '(?!)'})")


def _any_of(texts: Sequence[str]) -> list[str]:
    """Alternatives that find the longest of these texts. What several begin with is compared once: hundreds of names
    such as <|reserved_7|> would otherwise be tried one by one, wherever a text looks like the beginning of one."""
    groups: dict[str, list[str]] = {}
    for text in texts:
        groups.setdefault(text[0], []).append(text)
    patterns = []
    for group in groups.values():
        prefix = _common_beginning(min(group), max(group))
        rests = {text[len(prefix) :] for text in group}
        longer = _any_of(sorted(rest for rest in rests if rest))
        after = f"(?:{'|'.join(longer)}){'?' if '' in rests else ''}" if longer else ""
        patterns.append(re.escape(prefix) + after)
    return patterns


def _common_beginning(one: str, other: str) -> str:
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return "".join(char for char, _ in same)


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error}") from None


def _processor(file: Path, model: bytes) -> SentencePieceProcessor:
    processor = SentencePieceProcessor()
    try:
        loaded = processor.LoadFromSerializedProto(model)
    except Exception as error:  # the binding's own, by version
        raise ValueError(f"{file} is not a SentencePiece model: {str(error)[:300]}") from None
    if not loaded:
        raise ValueError(f"{file} is not a SentencePiece model")
    return processor
