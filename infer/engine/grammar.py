"""Constrained decoding on the ranks of the last stage: which tokens a grammar lets come next.

Every tensor-parallel rank of the last stage holds the matchers of all sequences and masks its own part of the
vocabulary. A matcher's state is a function of the grammar and the output tokens, both of which the batches bring, so
the ranks agree without a message, and preemption, a prefix hit or another generation of ranks change nothing. Masks are
computed in a thread while the rank's forward pass runs; llguidance works without the GIL.
"""

import logging
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from llguidance import LLExecutor, LLMatcher, LLTokenizer
from llguidance.numpy import fill_next_token_bitmask_par
from numpy.typing import NDArray

from infer.config import EngineConfig
from infer.models.source import tokenizer_path
from infer.parallel.groups import Groups
from infer.request import SamplingParams
from infer.structured import compile_grammar, load_tokenizer

logger = logging.getLogger(__name__)

MAX_KEPT = 64  # compiled grammars that are kept for the next sequence that asks for the same


@dataclass(frozen=True)
class TokenMask:
    """What a grammar says of the next token.

    words: int32 [ceil(vocab / 32)]; token t may come next where bit t % 32 of words[t // 32] is set. None: every token
    is as good, since none will count. ended: the text is complete and nothing can be added. error: a sentence, where
    the grammar failed.
    """

    words: NDArray[np.int32] | None
    ended: bool = False
    error: str | None = None


class Grammar:
    """Where one sequence stands in its grammar. Only the threads of its Grammars touch what is within."""

    def __init__(self, compiled: "Future[LLMatcher]", params: SamplingParams, eos_token_ids: Sequence[int]):
        self._compiled = compiled
        self._ignore_eos = params.ignore_eos
        allowed = params.allowed_token_ids
        self._ends = np.array([t for t in eos_token_ids if not allowed or t in allowed], dtype=np.int64)
        self._num_consumed = 0  # output[:num_consumed] is behind the matcher
        self._error: str | None = None

    def follow(self, output_token_ids: NDArray[np.int32]) -> LLMatcher | None:
        """The matcher behind this output, which may only grow; None where the grammar has failed."""
        if self._error is not None:
            return None
        try:
            matcher = self._compiled.result()
        except ValueError as error:
            self._error = str(error)
            return None
        new = output_token_ids[self._num_consumed :].tolist()
        self._num_consumed = len(output_token_ids)
        if new and not matcher.consume_tokens(new):
            self._error = f"structured_outputs: {matcher.get_error() or f'the tokens {new} do not fit the grammar'}"
            return None
        return matcher

    def mask(self, words: NDArray[np.int32], own_ends: Sequence[int]) -> TokenMask:
        """The mask after `follow`. words: as llguidance filled them. own_ends: end tokens as it knows them, in place of
        which the request's own are let through."""
        if self._error is None and self._compiled.result().is_error():
            self._error = f"structured_outputs: {self._compiled.result().get_error()}"
        if self._error is not None:
            return TokenMask(None, error=self._error)
        matcher = self._compiled.result()
        _set_bits(words, np.array(own_ends, dtype=np.int64), False)
        is_accepting = matcher.is_accepting()
        ended = not words.any()
        if ended and not is_accepting:
            return TokenMask(None, error="structured_outputs: no token of this model continues the text as it must")
        if ended and not len(self._ends):
            return TokenMask(None, ended=True)
        if is_accepting and (ended or not self._ignore_eos):
            _set_bits(words, self._ends, True)
        return TokenMask(words, ended)


class Grammars:
    """A rank's grammars: compiles them, follows them, computes their masks, all in threads of its own."""

    def __init__(self, tokenizer_dir: Path | None, vocab_size: int, num_threads: int):
        """tokenizer_dir: None where some rank lacks tokenizer.json; every grammar then fails with a message.

        vocab_size: the model's. num_threads: most of them that compute masks at once.
        """
        self._directory, self._vocab_size, self._num_threads = tokenizer_dir, vocab_size, num_threads
        # Two, so that a grammar that takes long to compile holds up only the batch that draws its first token.
        self._compiling = ThreadPoolExecutor(1, "grammar-compile")
        self._masking = ThreadPoolExecutor(1, "grammar-mask")
        self._tokenizer: Future[LLTokenizer] | None = None
        self._executor: LLExecutor | None = None
        self._kept: OrderedDict[bytes, LLMatcher] = OrderedDict()  # at their beginnings; the first is longest unused

    def warm(self) -> None:
        """Starts to read the tokenizer, which the first grammar would wait for."""
        if self._tokenizer is None:
            self._tokenizer = self._compiling.submit(self._load)

    def open(self, params: SamplingParams, eos_token_ids: Sequence[int]) -> Grammar:
        """The grammar of a sequence whose output is empty or yet to be told; it is compiled meanwhile."""
        self.warm()
        return Grammar(self._compiling.submit(self._compile, params), params, eos_token_ids)

    def start(self, asked: list[tuple[Grammar, NDArray[np.int32]]]) -> "Future[list[TokenMask]]":
        """Starts on the masks of sequences with these outputs so far, one for each, in their order."""
        return self._masking.submit(self._masks, asked)

    def close(self) -> None:
        """Ends the threads."""
        self._compiling.shutdown(cancel_futures=True)
        self._masking.shutdown(cancel_futures=True)

    def _load(self) -> LLTokenizer:
        if self._directory is None:
            raise ValueError(
                "structured_outputs needs tokenizer.json in the tokenizer's directory on every host that runs the last "
                "pipeline stage; it was missing when the engine started"
            )
        return load_tokenizer(self._directory, self._vocab_size)

    def _compile(self, params: SamplingParams) -> LLMatcher:
        assert self._tokenizer is not None and params.structured_outputs is not None
        key = msgspec.msgpack.encode(params.structured_outputs)
        matcher = self._kept.pop(key, None)
        if matcher is None:
            matcher = compile_grammar(params.structured_outputs, self._tokenizer.result())
        self._kept[key] = matcher
        if len(self._kept) > MAX_KEPT:
            self._kept.popitem(last=False)
        return matcher.deep_copy()

    def _masks(self, asked: list[tuple[Grammar, NDArray[np.int32]]]) -> list[TokenMask]:
        matchers = [grammar.follow(output) for grammar, output in asked]
        live = [(matcher, i) for i, matcher in enumerate(matchers) if matcher is not None]
        if not live:
            return [grammar.mask(np.empty(0, np.int32), []) for grammar, _ in asked]
        assert self._tokenizer is not None
        tokenizer = self._tokenizer.result()
        words = np.zeros((len(asked), -(-tokenizer.vocab_size // 32)), dtype=np.int32)
        if self._executor is None:
            self._executor = LLExecutor(self._num_threads)
        fill_next_token_bitmask_par(self._executor, live, words)
        return [grammar.mask(line, tokenizer.eos_tokens) for (grammar, _), line in zip(asked, words, strict=True)]


def make_grammars(
    config: EngineConfig, model_path: Path, groups: Groups, vocab_size: int, num_threads: int
) -> Grammars | None:
    """On the ranks of the last stage, else None; all ranks call it together.

    Each of those has a tokenizer.json, or none uses it: else some would mask their part of the vocabulary and others
    not.
    """
    directory: Path | None = None
    if groups.is_last_stage:
        try:
            directory = tokenizer_path(config, model_path)
        except ValueError as error:
            logger.info("no structured outputs: %s", error)
    found = directory is not None and (directory / "tokenizer.json").is_file()
    agreed = groups.all.min(int(found or not groups.is_last_stage))
    if not groups.is_last_stage:
        return None
    return Grammars(directory if agreed else None, vocab_size, num_threads)


def _set_bits(words: NDArray[np.int32], ids: NDArray[np.int64], value: bool) -> None:
    ids = ids[ids < 32 * len(words)]
    bits = words.view(np.uint32)
    for token in ids.tolist():
        bit = np.uint32(1 << (token % 32))
        bits[token // 32] = bits[token // 32] | bit if value else bits[token // 32] & ~bit
