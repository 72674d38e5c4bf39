"""A batch under construction: what it says of each sequence, so that the ranks learn each thing once. No torch."""

from dataclasses import dataclass, field

import numpy as np

from infer.engine.batch import COLUMNS, NEW, PROMPT_LOGPROBS, RESET, SAMPLE, Batch, NewSequence
from infer.engine.sequence import Sequence


@dataclass
class Plan:
    """The rows of one batch, and what is needed to read its result."""

    max_tokens: int
    num_tokens: int = 0
    num_decodes: int = 0
    rows: list[list[int]] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    new: list[NewSequence] = field(default_factory=list)
    sampled: list[Sequence] = field(default_factory=list)
    starts: dict[int, tuple[Sequence, int]] = field(default_factory=dict)  # sequence id -> it, its first position

    @property
    def room(self) -> int:
        """Tokens that it may still take."""
        return self.max_tokens - self.num_tokens

    def add(self, sequence: Sequence, count: int) -> None:
        """A row for the next `count` tokens of a sequence, whose block table covers them. They count as computed from
        here on."""
        start, end = sequence.num_computed, sequence.num_computed + count
        new_tokens = sequence.tokens[sequence.num_announced_tokens :]
        new_blocks = sequence.block_table[sequence.num_announced_blocks :]
        flags = 0
        if not sequence.announced:
            flags |= NEW
            self.new.append(_announcement(sequence))
        if sequence.reset:
            flags |= RESET
        if sequence.wants_prompt_logprobs and start < sequence.num_prompt - 1 and not sequence.num_generated:
            flags |= PROMPT_LOGPROBS
        if sequence.is_decoding:
            self.num_decodes += 1
        if end == len(sequence.tokens):
            flags |= SAMPLE
            sequence.awaiting = True
            self.sampled.append(sequence)
        self.rows.append([sequence.seq_id, start, count, flags, len(new_tokens), len(new_blocks)])
        self.tokens += new_tokens
        self.blocks += new_blocks
        self.starts[sequence.seq_id] = sequence, start
        self.num_tokens += count
        sequence.announced, sequence.reset = True, False
        sequence.num_announced_tokens = len(sequence.tokens)
        sequence.num_announced_blocks = len(sequence.block_table)
        sequence.num_computed = end

    def batch(self, step: int, freed: list[int]) -> Batch:
        """freed: sequence ids that the ranks are to forget."""
        return Batch(
            step,
            np.array(self.rows, dtype=np.int32).reshape(-1, COLUMNS),
            np.array(self.tokens, dtype=np.int32),
            np.array(self.blocks, dtype=np.int32),
            np.array(freed, dtype=np.int32),
            self.new,
        )


def _announcement(sequence: Sequence) -> NewSequence:
    request = sequence.request
    return NewSequence(
        params=request.params,
        seed=request.seed,
        choice=sequence.choice,
        num_prompt_tokens=sequence.num_prompt,
        eos_token_ids=list(request.eos_token_ids),
        bad_words_token_ids=request.bad_words_token_ids,
    )
