"""The one message per step from rank 0 to every rank, and the one that brings sampled tokens back.

Layout, all int32: a fixed header, then arrays whose lengths stand in the header, then MessagePack bytes (padded to
whole words) for what is rare. Nothing trusts the sender: lengths are checked here, indices by the runner.
"""

import enum
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from infer.request import SamplingParams, TokenLogprobs

MAGIC, VERSION = 0x1F3ABA7C, 1


class Kind(enum.IntEnum):
    STEP = 1  # run a batch
    IDLE = 2  # nothing to do; rank 0 is alive
    BUILD = 3  # build an engine from the config in the payload
    CLOSE = 4  # drop the engine, wait for the next
    EXIT = 5  # end the process


# Columns of Batch.rows.
SEQ, START, COUNT, FLAGS, NEW_TOKENS, NEW_BLOCKS = range(6)
COLUMNS = 6
# Bits of the FLAGS column.
SAMPLE = 1  # draw a token after the last of these tokens
NEW = 2  # the sequence is unknown to the ranks: its description is the next entry of Batch.new
RESET = 4  # forget its block table first (it was preempted)
PROMPT_LOGPROBS = 8  # report the log-probabilities of the prompt tokens in this range
# In place of a token id, in a result.
NO_TOKEN = -1  # none could be drawn; StepResult.errors may say why
TEXT_ENDED = -2  # the grammar lets nothing more come, and the request has no end token to say so


class NewSequence(msgspec.Struct, array_like=True):
    """What the ranks must know of a sequence (one choice of a request) besides its tokens."""

    params: SamplingParams
    seed: int
    choice: int
    num_prompt_tokens: int
    eos_token_ids: list[int]
    bad_words_token_ids: list[list[int]] = []


@dataclass
class Batch:
    """rows [num_seqs, 6] int32: sequence id, first position, number of tokens, flags, and how many of `tokens` (newly
    known ones) and `blocks` (appended to its block table) belong to it. freed: sequence ids to forget, before anything
    else is read."""

    step: int
    rows: np.ndarray
    tokens: np.ndarray
    blocks: np.ndarray
    freed: np.ndarray
    new: list[NewSequence] = field(default_factory=list)
    report: bool = False  # the other ranks publish their beat and busy time after this step

    @property
    def num_tokens(self) -> int:
        return int(self.rows[:, COUNT].sum())


@dataclass
class StepResult:
    """What a step produced. token_ids and logprobs: one entry per row with SAMPLE, in order; NO_TOKEN or TEXT_ENDED
    where there is no token. prompt_logprobs: sequence id -> the entries for this chunk's positions. errors: index into
    token_ids -> a sentence on why there is none."""

    step: int
    token_ids: list[int]
    logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    prompt_logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)
    errors: dict[int, str] = field(default_factory=dict)


class _Rare(msgspec.Struct, array_like=True):
    logprobs: list[TokenLogprobs | None]
    prompt_logprobs: dict[int, list[TokenLogprobs]]
    errors: dict[int, str]


_HEADER = 12
_new_decoder = msgspec.msgpack.Decoder(list[NewSequence])
_rare_decoder = msgspec.msgpack.Decoder(_Rare)
_encode = msgspec.msgpack.encode


def encode_batch(batch: Batch, generation: int) -> np.ndarray:
    """A STEP message, int32."""
    payload = _encode(batch.new) if batch.new else b""
    arrays = [batch.rows.reshape(-1), batch.tokens, batch.blocks, batch.freed]
    counts = [len(batch.rows), len(batch.tokens), len(batch.blocks), len(batch.freed)]
    return _message(Kind.STEP, generation, batch.step, counts, int(batch.report), arrays, payload)


def check_step(batch: Batch, last_step: int) -> int:
    """The batch's step. Raises ValueError unless it follows last_step, 0 before an engine's first, and the batch has
    rows of at least one token each: what a receiver allocates for it depends on them."""
    due = (last_step + 1) % (1 << 31)
    if batch.step != due:
        raise ValueError(f"step {batch.step} came where step {due} was due")
    if not len(batch.rows) or batch.rows[:, COUNT].min() < 1:
        raise ValueError(f"step {batch.step} holds {len(batch.rows)} rows of {batch.rows[:, COUNT].tolist()} tokens")
    return batch.step


def encode_control(kind: Kind, generation: int, payload: Any = None) -> np.ndarray:
    """An IDLE, BUILD, CLOSE or EXIT message."""
    return _message(kind, generation, 0, [0, 0, 0, 0], 0, [], b"" if payload is None else _encode(payload))


def kind_of(words: np.ndarray, generation: int) -> Kind:
    """The kind of a message. Raises ValueError unless it is whole and of this generation of ranks."""
    if len(words) < _HEADER or words[0] != MAGIC or words[1] != VERSION or words[11] != len(words):
        raise ValueError(f"not a version {VERSION} message: {len(words)} words, header {words[:_HEADER].tolist()}")
    if words[2] != generation:
        raise ValueError(f"a message of generation {int(words[2])} reached generation {generation}")
    return Kind(int(words[4]))


def decode(words: np.ndarray, generation: int) -> tuple[Kind, Batch | Any]:
    """The kind of a message and its batch (STEP) or payload. Raises ValueError on anything malformed or of another
    generation of ranks."""
    kind, (rows, tokens, blocks, freed), payload = _parts(words, generation)
    if kind != Kind.STEP:
        return kind, msgspec.msgpack.decode(payload) if payload else None
    step, report = int(words[3]), bool(words[9])
    new = _new_decoder.decode(payload) if payload else []
    return kind, Batch(step, rows.reshape(-1, COLUMNS), tokens, blocks, freed, new, report)


def encode_result(result: StepResult, generation: int) -> np.ndarray:
    """A result message, int32."""
    rare = b""
    if any(entry is not None for entry in result.logprobs) or result.prompt_logprobs or result.errors:
        rare = _encode(_Rare(result.logprobs, result.prompt_logprobs, result.errors))
    tokens = np.array(result.token_ids, dtype=np.int32)
    return _message(Kind.STEP, generation, result.step, [0, len(tokens), 0, 0], 0, [tokens], rare)


def decode_result(words: np.ndarray, generation: int) -> StepResult:
    """The result in a message. Raises ValueError as `decode` does."""
    kind, (rows, tokens, blocks, freed), payload = _parts(words, generation)
    if kind != Kind.STEP or len(rows) or len(blocks) or len(freed):
        raise ValueError(f"a {kind.name} message with {len(rows)}, {len(blocks)}, {len(freed)} words is no result")
    rare = _rare_decoder.decode(payload) if payload else _Rare([None] * len(tokens), {}, {})
    if len(rare.logprobs) != len(tokens):
        raise ValueError(f"a result of {len(tokens)} tokens has {len(rare.logprobs)} log-probabilities")
    return StepResult(int(words[3]), tokens.tolist(), rare.logprobs, rare.prompt_logprobs, rare.errors)


def _parts(words: np.ndarray, generation: int) -> tuple[Kind, list[np.ndarray], bytes]:
    """The kind, the four arrays and the payload of a message, whose lengths fit together. Raises ValueError."""
    kind, num_bytes = kind_of(words, generation), int(words[10])
    counts = [int(n) for n in words[5:9]]
    sizes = [counts[0] * COLUMNS, *counts[1:]]
    if min(*counts, num_bytes) < 0 or _HEADER + sum(sizes) + -(-num_bytes // 4) != len(words):
        raise ValueError(f"a message of {len(words)} words claims {counts} and {num_bytes} bytes")
    parts, at = [], _HEADER
    for size in sizes:
        parts.append(words[at : at + size])
        at += size
    return kind, parts, words[at:].tobytes()[:num_bytes]


def _message(
    kind: Kind, generation: int, step: int, counts: list[int], report: int, arrays: list[np.ndarray], payload: bytes
) -> np.ndarray:
    tail = np.frombuffer(payload + b"\0" * (-len(payload) % 4), dtype=np.int32)
    length = _HEADER + sum(len(a) for a in arrays) + len(tail)
    header = [MAGIC, VERSION, generation, step, int(kind), *counts, report, len(payload), length]
    return np.concatenate([np.array(header, dtype=np.int32), *arrays, tail]).astype(np.int32, copy=False)
