"""What every rank does with a batch: keep its mirror of the sequences, run its stage, sample on the last one."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from infer.cache.pages import Pages
from infer.engine.batch import (
    COUNT,
    FLAGS,
    NEW,
    NEW_BLOCKS,
    NEW_TOKENS,
    PROMPT_LOGPROBS,
    RESET,
    SAMPLE,
    SEQ,
    START,
    Batch,
    NewSequence,
    StepResult,
)
from infer.engine.sampler import Sampler, SampleRow
from infer.engine.tape import Forward, record_stage
from infer.layers.attention import ForwardContext
from infer.models.decoder import Stage
from infer.parallel.groups import Groups

PROMPT_ROWS_AT_ONCE = 256  # bounds the logits of a long prompt whose log-probabilities are asked for


class Mirror:
    """A rank's copy of one sequence: its known tokens and its block table, as the batches told them."""

    def __init__(self, description: NewSequence):
        self.description = description
        self.tokens = np.zeros(64, dtype=np.int32)
        self.num_tokens = 0
        self.blocks = np.zeros(8, dtype=np.int32)
        self.num_blocks = 0
        self._row: SampleRow | None = None

    def extend(self, tokens: np.ndarray, blocks: np.ndarray) -> None:
        self.tokens, self.num_tokens = _append(self.tokens, self.num_tokens, tokens)
        self.blocks, self.num_blocks = _append(self.blocks, self.num_blocks, blocks)

    def sample_row(self) -> SampleRow:
        """The row for the token that follows all known ones; one object for life, as it counts what it has seen."""
        d, at = self.description, self.description.num_prompt_tokens
        if self._row is None:
            prompt = self.tokens[:at].copy()
            self._row = SampleRow(d.params, d.seed, d.choice, at, prompt, self.tokens[at:at], d.eos_token_ids)
        self._row.position = self.num_tokens
        self._row.output_token_ids = self.tokens[at : self.num_tokens]
        return self._row


def _append(array: np.ndarray, length: int, more: np.ndarray) -> tuple[np.ndarray, int]:
    total = length + len(more)
    if total > len(array):
        array = np.concatenate([array, np.zeros(max(len(array), total - len(array)), dtype=array.dtype)])
    array[length:total] = more
    return array, total


def _check_counts(batch: Batch) -> None:
    """Whether the rows account for exactly what the batch brings. Raises ValueError."""
    counts = batch.rows[:, [NEW_TOKENS, NEW_BLOCKS]]
    told = (*counts.sum(axis=0).tolist(), int((batch.rows[:, FLAGS] & NEW != 0).sum()))
    there = (len(batch.tokens), len(batch.blocks), len(batch.new))
    if (counts < 0).any() or told != there:
        raise ValueError(f"step {batch.step} tells of {told} tokens, blocks and new sequences, but brings {there}")


@dataclass
class Prepared:
    """A batch on the device, and what to draw from it."""

    batch: Batch
    tokens: torch.Tensor  # [T] int64
    context: ForwardContext
    sampled: list[Mirror]
    sampled_rows: list[int]  # rows of the hidden states, one a sampled sequence
    prompt_rows: list[tuple[int, Mirror, int, int, int]]  # sequence id, mirror, first row, first position, count


class Runner:
    """One rank's part of every batch, in order.

    `receive(batch)` as soon as a batch is known (any thread; it posts the receive of its hidden states), then
    `run(batch)`.
    """

    def __init__(self, stage: Stage, pages: Pages, groups: Groups, sampler: Sampler | None, num_blocks: int,
                 block_size: int, device: torch.device):  # fmt: skip
        self.stage, self.pages, self.groups, self.sampler = stage, pages, groups, sampler
        self.num_blocks, self.block_size, self.device = num_blocks, block_size, device
        self.vocab_size = stage.config.vocab_size
        self._forward: Forward = stage
        self.busy_seconds = 0.0  # computing, not waiting for another stage
        self._mirrors: dict[int, Mirror] = {}
        self._arrivals: dict[int, Callable[[], torch.Tensor]] = {}

    def record(self) -> None:
        """Makes the stage's forward faster where it can be; all ranks of the stage call it together, before any batch."""
        self._forward = record_stage(self.stage, self.pages)

    def receive(self, batch: Batch) -> None:
        """Posts the receive of this batch's hidden states."""
        if not self.groups.is_first_stage:
            shape = (batch.num_tokens, self.stage.config.hidden_size)
            dtype = self.pages.k[0].dtype
            self._arrivals[batch.step] = self.groups.pipe.post_receive(shape, dtype, batch.step)

    @torch.inference_mode()
    def run(self, batch: Batch) -> StepResult | None:
        """Runs this rank's stage. The result is there on the sampling rank only.

        Raises ValueError for a batch that does not fit what this rank knows; nothing has been computed then.
        """
        started = time.perf_counter()
        prepared = self._prepare(batch)
        self.busy_seconds += time.perf_counter() - started

        inputs = prepared.tokens if self.groups.is_first_stage else self._arrivals.pop(batch.step)()

        started = time.perf_counter()
        hidden = self._forward(inputs, prepared.context)
        if not self.groups.is_last_stage:
            self.groups.pipe.send(hidden, batch.step)
            result = None
        else:
            result = self._draw(prepared, hidden)
        self.busy_seconds += time.perf_counter() - started
        return result

    # ------------------------------------------------------------------ the mirror

    def _prepare(self, batch: Batch) -> Prepared:
        for seq_id in batch.freed.tolist():
            if self._mirrors.pop(seq_id, None) is None:
                raise ValueError(f"step {batch.step} frees sequence {seq_id}, which this rank does not know")
        mirrors = self._apply(batch)
        return self._inputs(batch, mirrors)

    def _apply(self, batch: Batch) -> list[Mirror]:
        """Brings the mirrors up to date and checks every index before anything reads it."""
        if len(batch.tokens) and not 0 <= int(batch.tokens.min()) <= int(batch.tokens.max()) < self.vocab_size:
            raise ValueError(f"step {batch.step} holds a token id outside 0..{self.vocab_size - 1}")
        if len(batch.blocks) and not 0 <= int(batch.blocks.min()) <= int(batch.blocks.max()) < self.num_blocks:
            raise ValueError(f"step {batch.step} holds a block id outside 0..{self.num_blocks - 1}")
        _check_counts(batch)
        new, mirrors, token_at, block_at = iter(batch.new), [], 0, 0
        for row in batch.rows.tolist():
            seq_id, flags = row[SEQ], row[FLAGS]
            if flags & NEW:
                self._mirrors[seq_id] = Mirror(next(new))
            mirror = self._mirrors.get(seq_id)
            if mirror is None:
                raise ValueError(f"step {batch.step} runs sequence {seq_id}, which this rank does not know")
            if flags & RESET:
                mirror.num_blocks = 0
            tokens = batch.tokens[token_at : token_at + row[NEW_TOKENS]]
            blocks = batch.blocks[block_at : block_at + row[NEW_BLOCKS]]
            token_at, block_at = token_at + len(tokens), block_at + len(blocks)
            mirror.extend(tokens, blocks)
            end = row[START] + row[COUNT]
            if row[START] < 0 or row[COUNT] < 1 or end > min(mirror.num_tokens, mirror.num_blocks * self.block_size):
                raise ValueError(
                    f"step {batch.step} runs positions {row[START]} to {end} of sequence {seq_id}, of which "
                    f"{mirror.num_tokens} tokens and {mirror.num_blocks} blocks are known"
                )
            mirrors.append(mirror)
        return mirrors

    def _inputs(self, batch: Batch, mirrors: list[Mirror]) -> Prepared:
        rows = batch.rows
        counts, starts = rows[:, COUNT].astype(np.int64), rows[:, START].astype(np.int64)
        ends = starts + counts
        query_start = np.zeros(len(rows) + 1, dtype=np.int32)
        np.cumsum(counts, out=query_start[1:])
        total = int(query_start[-1])

        owner = np.repeat(np.arange(len(rows)), counts)  # row of the batch that each token belongs to
        positions = np.arange(total) - np.repeat(query_start[:-1], counts) + np.repeat(starts, counts)
        table = np.zeros((len(rows), int(-(-ends.max() // self.block_size))), dtype=np.int32)
        tokens = np.empty(total, dtype=np.int64)
        for index, mirror in enumerate(mirrors):
            used = -(-int(ends[index]) // self.block_size)
            table[index, :used] = mirror.blocks[:used]
            tokens[query_start[index] : query_start[index + 1]] = mirror.tokens[starts[index] : ends[index]]
        slots = table[owner, positions // self.block_size].astype(np.int64) * self.block_size
        slots += positions % self.block_size

        context = ForwardContext(
            positions=self._to_device(positions),
            slots=self._to_device(slots),
            block_table=self._to_device(table),
            query_start=self._to_device(query_start),
            seq_lens=self._to_device(ends.astype(np.int32)),
            k_pages=self.pages.k,
            v_pages=self.pages.v,
        )
        sampled, sampled_rows, prompt_rows = [], [], []
        for index, mirror in enumerate(mirrors):
            flags = int(rows[index, FLAGS])
            if flags & SAMPLE:
                sampled.append(mirror)
                sampled_rows.append(int(query_start[index + 1]) - 1)
            if flags & PROMPT_LOGPROBS:
                first, start = int(query_start[index]), int(starts[index])
                count = min(int(ends[index]), mirror.description.num_prompt_tokens - 1) - start
                prompt_rows.append((int(rows[index, SEQ]), mirror, first, start, count))
        return Prepared(batch, self._to_device(tokens), context, sampled, sampled_rows, prompt_rows)

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)

    # ------------------------------------------------------------------ the last stage

    def _draw(self, prepared: Prepared, hidden: torch.Tensor) -> StepResult | None:
        """Every tensor-parallel rank of the last stage takes part; the sampling rank gets the result."""
        assert self.sampler is not None
        result = StepResult(prepared.batch.step, [])
        if prepared.sampled:
            rows = torch.tensor(prepared.sampled_rows, device=hidden.device)
            logits = self.stage.logits(hidden[rows])
            drawn = self.sampler.sample(logits, [mirror.sample_row() for mirror in prepared.sampled])
            if drawn is not None:
                result.token_ids, result.logprobs = drawn.token_ids, drawn.logprobs
        for seq_id, mirror, first, start, count in prepared.prompt_rows:
            wanted = mirror.description.params.prompt_logprobs or 0
            for at in range(0, count, PROMPT_ROWS_AT_ONCE):
                part = range(at, min(count, at + PROMPT_ROWS_AT_ONCE))
                targets = mirror.tokens[start + 1 + part.start : start + 1 + part.stop].tolist()
                logits = self.stage.logits(hidden[first + part.start : first + part.stop])
                entries = self.sampler.prompt_logprobs(logits, targets, [wanted] * len(part))
                if entries is not None:
                    result.prompt_logprobs.setdefault(seq_id, []).extend(entries)
        return result if self.groups.is_sampler else None
