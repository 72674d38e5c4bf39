"""Text and tokens: the tokenizer, and one choice's text as its tokens come. No torch here.

The frontend and LLM share these classes, so that both give the same text.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from infer.request import SamplingParams
from infer.serve.chat import ChatTemplates
from infer.serve.chat_sources import load_templates
from infer.serve.detokenize import Decoder, make_decoder
from infer.serve.sentencepiece import SentencePiece
from infer.serve.stops import StopMatcher
from infer.serve.tokenizer_config import read_config
from infer.serve.tokenizer_json import TokenizerJson
from infer.serve.vocabulary import Vocabulary


class Tokenizer:
    """A Hugging Face tokenizer directory, with the results AutoTokenizer would give.

    What goes around a text (a leading BOS) is tokenizer.json's to say: its post-processor was made from
    tokenizer_config.json's add_bos_token and add_eos_token, which AutoTokenizer does not read beside it either. For
    SentencePiece's tokenizer.model, tokenizer_config.json says it.

    vocab_size: ids are [0, vocab_size) (the model's own vocabulary may be padded beyond). special_ids: left out of
    decoded text by skip_special_tokens. max_token_chars: no token stands for more characters.
    """

    def __init__(self, vocabulary: Vocabulary, templates: ChatTemplates | None, path: Path) -> None:
        self.vocabulary = vocabulary
        self._templates = templates
        self._path = path
        self.special_ids = vocabulary.special_ids
        self.vocab_size = vocabulary.vocab_size
        self.max_token_chars = vocabulary.max_token_chars

    @classmethod
    def load(cls, path: Path | str, chat_template: str | None = None) -> "Tokenizer":
        """Reads tokenizer.json or tokenizer.model, what stands beside it, and the chat template from a directory.

        chat_template: goes before the checkpoint's, a file's path or the template itself.
        Raises ValueError that names the file when one is missing or corrupt.
        """
        path = Path(path)
        if (path / "tokenizer.json").is_file():
            vocabulary: Vocabulary = TokenizerJson(path / "tokenizer.json")
            config = read_config(path)
        elif (path / "tokenizer.model").is_file():
            config = read_config(path)
            vocabulary = SentencePiece(path, config)
        else:
            raise ValueError(_no_tokenizer(path))
        return cls(vocabulary, load_templates(path, config, chat_template), path)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids. add_special_tokens adds what the tokenizer itself wants around a text, such as a leading BOS.

        Raises ValueError where the text holds what is no character.
        """
        return self.vocabulary.encode(text, add_special_tokens)

    def bad_words_token_ids(self, words: Sequence[str]) -> list[list[int]]:
        """The token sequences that would write these words, as vLLM has them: each word as a text begins with it and,
        where that is as many tokens and begins differently, as it follows a space. Raises ValueError.
        """
        sequences = []
        for word in words:
            bare = self.encode(word.lstrip(), add_special_tokens=False)
            if not bare:
                raise ValueError(f"bad_words must hold words, not {word[:40]!r}")
            spaced = self.encode(" " + word.lstrip(), add_special_tokens=False)
            sequences.append(bare)
            if len(spaced) == len(bare) and spaced[0] != bare[0]:
                sequences.append(spaced)
        return sequences

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of all the tokens together. Ids outside the vocabulary give nothing."""
        return self.vocabulary.decode(token_ids, skip_special_tokens)

    def token(self, token_id: int) -> str:
        """The text of one token by itself; bytes that are no whole character show as U+FFFD."""
        text = self.vocabulary.whole_text(token_id)
        return self.token_bytes(token_id).decode("utf-8", "replace") if text is None else text

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token stands for inside a text; empty outside the vocabulary."""
        return self.vocabulary.token_bytes(token_id)

    @property
    def has_chat_template(self) -> bool:
        return self._templates is not None

    @property
    def chat_template_variables(self) -> frozenset[str]:
        """What the chat template reads beyond messages and the like; none without one."""
        return frozenset() if self._templates is None else self._templates.variables

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        add_generation_prompt: bool = True,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """The prompt's text for a conversation. variables: further ones of the template (chat_template_kwargs).

        Raises ValueError when there is no template, it refuses the messages, or takes too long over them.
        """
        if self._templates is None:
            raise ValueError(
                f"{self._path} has no chat template (chat_template in tokenizer_config.json, or chat_template.jinja); "
                "give one with --chat-template, or use plain completions"
            )
        return self._templates.pick(tools).render(
            messages, add_generation_prompt, tools=tools, documents=documents,
            continue_final_message=continue_final_message, **variables,
        )  # fmt: skip


def _no_tokenizer(path: Path) -> str:
    """A sentence on a directory without a tokenizer that can be read."""
    others = sorted(file.name for name in ("vocab.json", "vocab.txt", "*.tiktoken") for file in path.glob(name))
    if not others:
        return f"{path / 'tokenizer.json'} does not exist, nor tokenizer.model; a tokenizer directory needs one of them"
    return (
        f"{path / 'tokenizer.json'} does not exist, nor tokenizer.model; {others[0]} does not say how text is divided. "
        "Write one with transformers: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
    )


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
        self._matcher = StopMatcher(params.stop_strings) if params.stop_strings else None
        self._decoder: Decoder | None = None
        if params.detokenize:
            self._decoder = make_decoder(
                tokenizer.vocabulary, params.skip_special_tokens, params.spaces_between_special_tokens, prompt_token_ids
            )
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
        if self._matcher is None or not self._matcher.may_begin(text):
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
