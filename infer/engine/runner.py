"""What every rank does with a batch: keep its mirror of the sequences, run its stage, sample on the last one."""

import functools
import gc
from collections.abc import Callable
from concurrent.futures import Future
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
    NO_TOKEN,
    PROMPT_LOGPROBS,
    RESET,
    SAMPLE,
    SEQ,
    START,
    TEXT_ENDED,
    Batch,
    NewSequence,
    StepResult,
)
from infer.engine.compile import compile_stage, forget_stage
from infer.engine.grammar import Grammar, Grammars, TokenMask
from infer.engine.graphs import Capture, DecodeGraphs
from infer.engine.inputs import Inputs, Shape, Upload, forward_context, pad
from infer.engine.logit_edits import BadWords
from infer.engine.sampler import Sampler, SampleRow
from infer.engine.stopwatch import stopwatch
from infer.engine.tape import Forward, record_stage
from infer.models.decoder import Stage
from infer.parallel.groups import Groups

PROMPT_ROWS_AT_ONCE = 256  # bounds the logits of a long prompt whose log-probabilities are asked for


class Mirror:
    """A rank's copy of one sequence: its known tokens and its block table, as the batches told them.

    grammar: where it stands in its grammar, on the ranks of the last stage.
    """

    def __init__(self, description: NewSequence, grammar: Grammar | None = None):
        self.description, self.grammar = description, grammar
        self.tokens = np.zeros(64, dtype=np.int32)
        self.num_tokens = 0
        self.blocks = np.zeros(8, dtype=np.int32)
        self.num_blocks = 0
        self._row: SampleRow | None = None

    def extend(self, tokens: np.ndarray, blocks: np.ndarray) -> None:
        self.tokens, self.num_tokens = _append(self.tokens, self.num_tokens, tokens)
        self.blocks, self.num_blocks = _append(self.blocks, self.num_blocks, blocks)

    @property
    def output_token_ids(self) -> np.ndarray:
        """int32, as far as known; a view that stays as it is."""
        return self.tokens[self.description.num_prompt_tokens : self.num_tokens]

    def sample_row(self) -> SampleRow:
        """The row for the token that follows all known ones; one object for life, as it counts what it has seen."""
        d, at = self.description, self.description.num_prompt_tokens
        if self._row is None:
            prompt = self.tokens[:at].copy()
            bad_words = BadWords(d.bad_words_token_ids) if d.bad_words_token_ids else None
            self._row = SampleRow(
                d.params, d.seed, d.choice, at, prompt, self.tokens[at:at], d.eos_token_ids, bad_words
            )
        self._row.position = self.num_tokens
        self._row.output_token_ids = self.output_token_ids
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


def _prompt_rows(
    rows: np.ndarray, mirrors: list[Mirror], offsets: np.ndarray
) -> list[tuple[int, Mirror, int, int, int]]:
    """Prepared.prompt_rows of a batch. offsets: each sequence's first row."""
    found = []
    for index in np.flatnonzero(rows[:, FLAGS] & PROMPT_LOGPROBS):
        mirror, start, end = mirrors[index], int(rows[index, START]), int(rows[index, START] + rows[index, COUNT])
        count = min(end, mirror.description.num_prompt_tokens - 1) - start
        found.append((int(rows[index, SEQ]), mirror, int(offsets[index]), start, count))
    return found


@dataclass
class Prepared:
    """A batch on the device, and what to draw from it."""

    batch: Batch
    bucket: int  # sequences that it is padded to, for a graph; 0: it is not
    inputs: Inputs[torch.Tensor]
    max_query_len: int
    max_seq_len: int
    prefill_keys: int
    sampled: list[Mirror]
    masks: Future[list[TokenMask]] | None  # of those of `sampled` that have a grammar, in their order
    prompt_rows: list[tuple[int, Mirror, int, int, int]]  # sequence id, mirror, first row, first position, count


class Runner:
    """One rank's part of every batch, in order.

    `receive(batch)` as soon as a batch is known (any thread; it posts the receive of its hidden states), then
    `run(batch)`. At the end, `close()`.
    """

    def __init__(self, stage: Stage, pages: Pages, groups: Groups, sampler: Sampler | None, num_blocks: int,
                 block_size: int, device: torch.device, grammars: Grammars | None = None):  # fmt: skip
        """sampler, grammars: on the last stage."""
        self.stage, self.pages, self.groups, self.sampler = stage, pages, groups, sampler
        self._grammars = grammars
        self.num_blocks, self.block_size, self.device = num_blocks, block_size, device
        self.vocab_size = stage.config.vocab_size
        self._forward: Forward = stage
        self._graphs: DecodeGraphs | None = None
        in_flight = groups.topology.pp_size  # batches, at most
        self._upload = Upload(device, depth=in_flight + 1)
        self._busy = stopwatch(device)
        self._mirrors: dict[int, Mirror] = {}
        self._arrivals: dict[int, Callable[[], torch.Tensor]] = {}

    def record(self) -> None:
        """Makes the forward faster where it can be; all ranks of the stage call it together, before any batch."""
        self._forward = record_stage(self.stage, self.pages)

    def compile(self) -> None:
        """Instead of record: lets torch.compile make the stage's forward, when a batch first wants it."""
        compiling = functools.partial(self.groups.world.watchdog.within, "compiling")
        self._forward = compile_stage(self.stage, self.groups.tp, compiling)

    def use_graphs(self, max_num_seqs: int, max_model_len: int, capture: Capture) -> None:
        """After record or compile: runs batches that only decode through graphs (see DecodeGraphs)."""
        self._graphs = DecodeGraphs(
            self.stage, self._forward, self.pages,
            max_num_seqs=max_num_seqs, max_model_len=max_model_len, block_size=self.block_size,
            depth=self.groups.topology.pp_size, tp_size=self.groups.tp.size, capture=capture,
        )  # fmt: skip

    @property
    def busy_seconds(self) -> float:
        """Seconds of computing, not of waiting for another stage."""
        return self._busy.seconds

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
        with self._busy:
            prepared = self._prepare(batch)
        x = prepared.inputs.tokens if self.groups.is_first_stage else self._arrivals.pop(batch.step)()
        with self._busy:
            output = self._run_stage(prepared, x)
            if self.groups.is_last_stage:
                return self._draw(prepared, output)
        self.groups.pipe.send(output, batch.step)
        return None

    def close(self) -> None:
        """Gives back the memory of weights, cache and graphs, once and for all; `busy_seconds` stays.

        Every rank calls it, before its groups end.
        """
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # the last graph may be running
        if self._graphs is not None:
            self._graphs.close()
        forget_stage()
        if self._grammars is not None:
            self._grammars.close()
        self._mirrors.clear()
        self._arrivals.clear()
        del self.stage, self.pages, self.sampler, self._forward, self._graphs, self._upload
        if self.device.type == "cuda":
            gc.collect()  # what was in cycles, before the allocator gives back what is free
            torch.cuda.empty_cache()

    def _run_stage(self, prepared: Prepared, x: torch.Tensor) -> torch.Tensor:
        """The stage's output [T, hidden]; on the last stage, of a batch with a bucket, the logits of its rows."""
        if prepared.bucket:
            assert self._graphs is not None
            return self._graphs.run(prepared.inputs, x, len(prepared.batch.rows))
        context = forward_context(
            prepared.inputs, self.pages, prepared.max_query_len, prepared.max_seq_len, prepared.prefill_keys
        )
        return self._forward(x, context)

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
                self._mirrors[seq_id] = self._mirror(next(new))
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

    def _mirror(self, description: NewSequence) -> Mirror:
        if self._grammars is None or description.params.structured_outputs is None:
            return Mirror(description)
        return Mirror(description, self._grammars.open(description.params, description.eos_token_ids))

    def _start_masks(self, sampled: list[Mirror]) -> Future[list[TokenMask]] | None:
        asked = [(mirror.grammar, mirror.output_token_ids) for mirror in sampled if mirror.grammar is not None]
        return self._grammars.start(asked) if self._grammars is not None and asked else None

    def _inputs(self, batch: Batch, mirrors: list[Mirror]) -> Prepared:
        rows, num_seqs = batch.rows, len(mirrors)
        counts, starts = rows[:, COUNT].astype(np.int64), rows[:, START].astype(np.int64)
        ends = starts + counts
        offsets = np.zeros(num_seqs + 1, dtype=np.int64)  # of each sequence's first row, and the end of all
        np.cumsum(counts, out=offsets[1:])
        total = int(offsets[-1])
        # A graph gives the logits of all its rows, so that none need be picked.
        bucket = self._graphs.size_for(batch) if self._graphs is not None else 0
        sampled = np.flatnonzero(rows[:, FLAGS] & SAMPLE)

        max_seq_len = int(ends.max())
        width = -(-max_seq_len // self.block_size)
        shape = Shape(bucket or total, bucket or num_seqs, width, 0 if bucket else len(sampled))
        host = self._upload.take(shape)
        if bucket:
            pad(host, total, num_seqs)
        else:
            host.sampled[:] = offsets[sampled + 1] - 1
        owner = np.repeat(np.arange(num_seqs), counts)  # row of the batch that each token belongs to
        positions = np.arange(total) - np.repeat(offsets[:-1] - starts, counts)
        for index, mirror in enumerate(mirrors):
            used = -(-int(ends[index]) // self.block_size)
            host.block_table[index, :used] = mirror.blocks[:used]
            if used < width:
                host.block_table[index, used:] = 0
            host.tokens[offsets[index] : offsets[index + 1]] = mirror.tokens[starts[index] : ends[index]]
        blocks = host.block_table[owner, positions // self.block_size].astype(np.int64)
        host.positions[:total] = positions
        host.slots[:total] = blocks * self.block_size + positions % self.block_size
        host.query_start[: num_seqs + 1] = offsets
        host.seq_lens[:num_seqs] = ends

        drawn_from = [mirrors[index] for index in sampled.tolist()]
        return Prepared(
            batch,
            bucket,
            self._upload.send(shape, host),
            max_query_len=int(counts.max()),
            max_seq_len=max_seq_len,
            prefill_keys=int(ends[counts > 1].sum()) if total > num_seqs else 0,
            sampled=drawn_from,
            masks=self._start_masks(drawn_from),
            prompt_rows=_prompt_rows(rows, mirrors, offsets),
        )

    # ------------------------------------------------------------------ the last stage

    def _draw(self, prepared: Prepared, output: torch.Tensor) -> StepResult | None:
        """Every tensor-parallel rank of the last stage takes part; the sampling rank gets the result.

        output: what _run_stage gave. A batch with a bucket has no prompt rows.
        """
        assert self.sampler is not None
        result = StepResult(prepared.batch.step, [])
        if prepared.sampled:
            logits = output if prepared.bucket else self.stage.logits(output[prepared.inputs.sampled])
            rows = [mirror.sample_row() for mirror in prepared.sampled]
            masks = _apply_masks(rows, prepared)
            drawn = self.sampler.sample(logits, rows)
            if drawn is not None:
                result.token_ids, result.logprobs = drawn.token_ids, drawn.logprobs
                _end_texts(result, masks)
        for seq_id, mirror, first, start, count in prepared.prompt_rows:
            wanted = mirror.description.params.prompt_logprobs or 0
            for at in range(0, count, PROMPT_ROWS_AT_ONCE):
                part = range(at, min(count, at + PROMPT_ROWS_AT_ONCE))
                targets = mirror.tokens[start + 1 + part.start : start + 1 + part.stop].tolist()
                logits = self.stage.logits(output[first + part.start : first + part.stop])
                entries = self.sampler.prompt_logprobs(logits, targets, [wanted] * len(part))
                if entries is not None:
                    result.prompt_logprobs.setdefault(seq_id, []).extend(entries)
        return result if self.groups.is_sampler else None


def _apply_masks(rows: list[SampleRow], prepared: Prepared) -> dict[int, TokenMask]:
    """Waits for the batch's masks and gives each to its row. Returns index of the row -> its mask."""
    if prepared.masks is None:
        return {}
    constrained = [index for index, mirror in enumerate(prepared.sampled) if mirror.grammar is not None]
    masks = dict(zip(constrained, prepared.masks.result(), strict=True))
    for index, mask in masks.items():
        rows[index].grammar_mask, rows[index].grammar_ended = mask.words, mask.ended
    return masks


def _end_texts(result: StepResult, masks: dict[int, TokenMask]) -> None:
    """Takes back the tokens of rows that no token can follow; what was drawn for them means nothing."""
    for index, mask in masks.items():
        if mask.words is None:
            result.token_ids[index] = NO_TOKEN if mask.error is not None else TEXT_ENDED
            result.logprobs[index] = None
            if mask.error is not None:
                result.errors[index] = mask.error
