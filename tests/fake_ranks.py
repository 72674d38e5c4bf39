"""Ranks without torch: they keep the same books as the real ones and check all that the scheduler tells them.

The "KV cache" holds, for every position, a digest of all tokens up to it, so that a wrong, missing or overwritten block
shows as a wrong digest. The token drawn is a function of the history and the seed.
"""

from collections import deque
from dataclasses import dataclass, field

from infer.engine.batch import (
    COLUMNS,
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
from infer.engine.scheduler import Scheduler
from infer.request import Output, Request, TokenLogprobs

VOCAB_SIZE = 97
EOS = 1


def digest(before: int, token: int) -> int:
    return hash((before, token))


def drawn_token(history: int, seed: int, choice: int) -> int:
    """Any of the vocabulary; an end token now and then."""
    return hash((history, seed, choice)) % VOCAB_SIZE


def expected_tokens(request: Request, choice: int, max_model_len: int) -> list[int]:
    """What the choice must come to, whatever the scheduler does."""
    history, tokens = 0, []
    for token in request.prompt_token_ids:
        history = digest(history, token)
    limit = request.params.max_tokens if request.params.max_tokens is not None else max_model_len
    for _ in range(min(limit, max_model_len - len(request.prompt_token_ids))):
        token = drawn_token(history, request.seed, choice)
        tokens.append(token)
        history = digest(history, token)
        if not request.params.ignore_eos and token in request.eos_token_ids:
            break
        if token in (request.params.stop_token_ids or ()):
            break
    return tokens


@dataclass
class FakeSequence:
    description: NewSequence
    tokens: list[int] = field(default_factory=list)
    digests: list[int] = field(default_factory=list)  # of tokens[: i + 1]
    blocks: list[int] = field(default_factory=list)

    def extend(self, tokens: list[int]) -> None:
        for token in tokens:
            self.tokens.append(token)
            self.digests.append(digest(self.digests[-1] if self.digests else 0, token))


class FakeRanks:
    """Runs batches in order. failing: (seed, choice) -> number of known tokens at which the draw gives -1."""

    def __init__(self, num_blocks: int, block_size: int, failing: dict[tuple[int, int], int] | None = None):
        self.num_blocks, self.block_size, self.failing = num_blocks, block_size, failing or {}
        self.known: dict[int, FakeSequence] = {}
        self.cache: dict[int, int] = {}  # slot -> digest
        self.order: list[int] = []  # sequence ids in the order of their first row

    def run(self, batch: Batch) -> StepResult:
        for seq_id in batch.freed.tolist():
            del self.known[seq_id]
        rows = self._apply(batch)
        self._write(rows)
        result = StepResult(batch.step, [])
        for row, sequence in rows:
            self._check_cache(row, sequence)
            if row[FLAGS] & SAMPLE:
                result.token_ids.append(self._draw(row, sequence))
                result.logprobs.append(None)
            if row[FLAGS] & PROMPT_LOGPROBS:
                last = min(row[START] + row[COUNT], sequence.description.num_prompt_tokens - 1)
                targets = sequence.tokens[row[START] + 1 : last + 1]
                result.prompt_logprobs[row[SEQ]] = [TokenLogprobs([token], [-1.0], [1]) for token in targets]
        return result

    def _apply(self, batch: Batch) -> list[tuple[list[int], FakeSequence]]:
        assert batch.rows.shape[1] == COLUMNS and len(batch.rows) > 0
        tokens, blocks, new, rows = batch.tokens.tolist(), batch.blocks.tolist(), iter(batch.new), []
        for row in batch.rows.tolist():
            if row[FLAGS] & NEW:
                assert row[SEQ] not in self.known
                self.known[row[SEQ]] = FakeSequence(next(new))
                self.order.append(row[SEQ])
            sequence = self.known[row[SEQ]]
            if row[FLAGS] & RESET:
                sequence.blocks.clear()
            sequence.extend(tokens[: row[NEW_TOKENS]])
            sequence.blocks += blocks[: row[NEW_BLOCKS]]
            del tokens[: row[NEW_TOKENS]], blocks[: row[NEW_BLOCKS]]
            assert len(set(sequence.blocks)) == len(sequence.blocks), "a block stands twice in a table"
            assert all(0 <= block < self.num_blocks for block in sequence.blocks)
            rows.append((row, sequence))
        assert not tokens and not blocks and next(new, None) is None, "a batch holds more than its rows use"
        assert len({row[SEQ] for row, _ in rows}) == len(rows), "a sequence stands twice in a batch"
        return rows

    def _write(self, rows: list[tuple[list[int], FakeSequence]]) -> None:
        """All rows write before any reads, as in a layer of the model."""
        written = set()
        for row, sequence in rows:
            assert row[COUNT] > 0 and row[START] >= 0
            for position in range(row[START], row[START] + row[COUNT]):
                slot = self._slot(sequence, position)
                assert slot not in written, f"two rows write slot {slot}"
                written.add(slot)
                self.cache[slot] = sequence.digests[position]

    def _check_cache(self, row: list[int], sequence: FakeSequence) -> None:
        for position in range(row[START] + row[COUNT]):
            found = self.cache.get(self._slot(sequence, position))
            assert found == sequence.digests[position], f"sequence {row[SEQ]} reads a wrong position {position}"

    def _slot(self, sequence: FakeSequence, position: int) -> int:
        return sequence.blocks[position // self.block_size] * self.block_size + position % self.block_size

    def _draw(self, row: list[int], sequence: FakeSequence) -> int:
        assert row[START] + row[COUNT] == len(sequence.tokens), "a token is drawn before the last known one"
        d = sequence.description
        if self.failing.get((d.seed, d.choice)) == len(sequence.tokens):
            return -1
        return drawn_token(sequence.digests[-1], d.seed, d.choice)


class Simulation:
    """The engine's loop over a scheduler and fake ranks, on a simulated clock.

    Rank 0 runs stage 0 itself, so its time goes on while it does. busy[s]: seconds that stage s computed. in_order: no
    sequence runs while an older one waits.
    """

    def __init__(
        self, scheduler: Scheduler, ranks: FakeRanks, token_seconds: float = 0.001, step_seconds: float = 0.01
    ):
        self.scheduler, self.ranks = scheduler, ranks
        self.token_seconds, self.step_seconds = token_seconds, step_seconds
        self.now = 0.0
        self.busy = [0.0] * scheduler.pp_size
        self._stage_free = [0.0] * scheduler.pp_size
        self._in_flight: deque[tuple[float, StepResult]] = deque()
        self.batches: list[Batch] = []
        self.in_order = True

    def step(self) -> list[Output]:
        """What Engine.step does."""
        while (batch := self._next()) is not None:
            self._submit(batch)
        if not self._in_flight:
            return []
        arrival, result = self._in_flight.popleft()
        self.now = max(self.now, arrival)
        return self.scheduler.update(result)

    def _next(self) -> Batch | None:
        """scheduler.next(), and whether it kept its word."""
        scheduler = self.scheduler
        before = {s.seq_id: s.is_decoding for s in scheduler.running}
        awaiting = {s.seq_id for s in [*scheduler.running, *scheduler.waiting] if s.awaiting}
        cap = -(-sum(before.values()) // scheduler.pp_size)
        batch = scheduler.next()
        if batch is None:
            return None
        ids = batch.rows[:, SEQ].tolist()
        assert not awaiting & set(ids), "a sequence runs while its next token is still on its way"
        assert batch.num_tokens <= scheduler.max_num_batched_tokens
        assert len(scheduler.running) <= scheduler.max_num_seqs
        assert sum(before.get(seq_id, False) for seq_id in ids) <= cap, "a batch takes more than its share of decodes"
        assert scheduler.num_in_flight <= scheduler.pp_size
        for queue in (scheduler.running, scheduler.waiting):
            orders = [s.order for s in queue]
            assert orders == sorted(orders), "a younger or less urgent sequence stands before another"
        every = [*scheduler.running, *scheduler.waiting]
        one_priority = len({s.request.priority for s in every}) == 1  # else one that waits displaces none that runs
        if self.in_order and one_priority:
            ages = [s.seq_id for s in every]
            assert ages == sorted(ages), "a younger sequence runs while an older one waits"
        self._check_tables()
        return batch

    def _check_tables(self) -> None:
        """Two sequences share a block only where both have the same full prefix in it."""
        size, owner = self.scheduler.pool.block_size, {}
        for sequence in self.scheduler.running:
            for index, block in enumerate(sequence.block_table):
                prefix = tuple(sequence.tokens[: (index + 1) * size])
                if block in owner:
                    assert owner[block] == prefix and len(prefix) == (index + 1) * size, f"block {block} has two owners"
                owner[block] = prefix

    def _submit(self, batch: Batch) -> None:
        self.batches.append(batch)
        cost = self.step_seconds + self.token_seconds * batch.num_tokens
        done = self.now
        for stage in range(len(self.busy)):
            done = max(done, self._stage_free[stage]) + cost
            self._stage_free[stage] = done
            self.busy[stage] += cost
            if stage == 0:
                self.now = done
        self._in_flight.append((done, self.ranks.run(batch)))
