"""Rank 0's policy: which tokens of which sequences run in the next batch. No torch, no I/O, and no decision by time.

There are no prefill and decode phases. A sequence is a number of computed tokens catching up with a number of known
ones; the step that reaches the last known token also draws the next.
"""

import time
from bisect import insort
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain, islice
from operator import attrgetter

from infer.cache.blocks import BlockPool
from infer.engine.batch import TEXT_ENDED, Batch, StepResult
from infer.engine.holdings import Holdings
from infer.engine.plan import Plan
from infer.engine.sequence import Sequence
from infer.request import FinishReason, Output, Request, TokenLogprobs

BATCHES_PER_STAGE = 4  # that the prompts at hand are spread over, per pipeline stage
MIN_PIPELINE_TOKENS = 256  # fewer tokens in a batch make it slower per token
ALONE_IN_A_ROW = 4  # requests that run alone, until the others have a batch


@dataclass
class Stats:
    """Counters since the engine was built."""

    num_prompt_tokens: int = 0  # computed or found in the cache
    num_generation_tokens: int = 0
    num_preemptions: int = 0
    prefix_cache_queries: int = 0  # prompt tokens looked up
    prefix_cache_hits: int = 0  # and found


class Scheduler:
    """First come, first served among those of the same priority, the lowest number first, under a token budget; the
    last of that order is preempted when blocks run out.

    With pp_size stages up to pp_size batches are in flight, and a batch takes at most ceil(decoding / pp_size) of the
    decoding sequences, so that every stage always has work. Results come back in the order of the batches.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_model_len: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        pp_size: int = 1,
        enable_prefix_caching: bool = True,
        enable_chunked_prefill: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ):
        assert enable_chunked_prefill or max_num_batched_tokens >= max_model_len, "a prompt would never fit a batch"
        self.pool, self.max_model_len, self.max_num_seqs = pool, max_model_len, max_num_seqs
        self.max_num_batched_tokens, self.pp_size = max_num_batched_tokens, pp_size
        self.enable_chunked_prefill = enable_chunked_prefill
        self._holdings = Holdings(pool, enable_prefix_caching)
        self._clock = clock
        self.stats = Stats()
        self.waiting: deque[Sequence] = deque()  # both in rising `order`
        self.running: list[Sequence] = []
        self._in_flight: deque[tuple[int, Plan]] = deque()
        self._choices: dict[str, dict[int, Sequence]] = {}  # request id -> its unfinished choices
        self._alone: dict[str, None] = {}  # requests that run alone until a token of theirs has come, in order
        self._num_alone_in_a_row = 0
        self._freed: list[int] = []
        self._started: list[str] = []
        self._next_seq_id = self._num_arrived = 0
        self._step = 0

    # ------------------------------------------------------------------ requests

    def add(self, request: Request, alone: bool = False) -> None:
        """Queues the choices of a request that was checked (`check_request`).

        alone: until a token of it has come no other request is in its batches, none begins, and of those that are alone
        too only the first runs. So if it brings the engine down, it is known which it was (serve/replay.py).
        """
        if request.request_id in self._choices:
            raise ValueError(f"request id {request.request_id!r} is in use")
        self._choices[request.request_id] = {}
        if alone:
            self._alone[request.request_id] = None
        now = self._clock()
        for choice in request.choices:
            sequence = Sequence(self._next_seq_id, request, choice, self.max_model_len, self._num_arrived, now)
            self._next_seq_id = (self._next_seq_id + 1) % (1 << 31)
            self._num_arrived += 1
            self._choices[request.request_id][choice] = sequence
            self._queue(sequence)

    def abort(self, request_id: str, choice: int | None = None) -> None:
        """Ends a request, or one choice of it, without a word. An unknown id is fine: it may have just finished."""
        for sequence in list(self._choices.get(request_id, {}).values()):
            if choice is None or sequence.choice == choice:
                self._end(sequence)

    def _queue(self, sequence: Sequence) -> None:
        """Puts it where its order wants it: mostly at the end when it comes, at the head when it was preempted."""
        if self.waiting and sequence.order < self.waiting[0].order:
            self.waiting.appendleft(sequence)
        elif not self.waiting or self.waiting[-1].order < sequence.order:
            self.waiting.append(sequence)
        else:
            insort(self.waiting, sequence, key=attrgetter("order"))

    def take_started(self) -> list[str]:
        """Requests with a choice that ran for the first time in the batches since the last call; an id may be there
        for each of its choices."""
        started, self._started = self._started, []
        return started

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running or self._in_flight)

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    # ------------------------------------------------------------------ next batch

    def next(self) -> Batch | None:
        """The next batch, or None when nothing can run before a result comes back."""
        if len(self._in_flight) >= self.pp_size:
            return None
        plan = Plan(max_tokens=self._budget())
        if self._alone:
            self._plan_beside_alone(plan)
        elif not self._continue_running(plan, self.running):
            self._admit_waiting(plan)
        if not plan.rows:
            if not self._in_flight and (self.waiting or self.running):
                raise AssertionError(
                    f"nothing runs and nothing can: {len(self.waiting)} waiting, {len(self.running)} running, "
                    f"{self.pool.num_free_blocks} free blocks"
                )
            return None
        self._step = (self._step + 1) % (1 << 31)
        self._in_flight.append((self._step, plan))
        freed, self._freed = self._freed, []
        return plan.batch(self._step, freed)

    def _plan_beside_alone(self, plan: Plan) -> None:
        """A batch of the first of those that run alone, or, each time some of them are through, one of the others."""
        if self._num_alone_in_a_row >= ALONE_IN_A_ROW:
            self._num_alone_in_a_row = 0
            others = [sequence for sequence in self.running if sequence.request.request_id not in self._alone]
            self._continue_running(plan, others)
            if plan.rows:
                return
        first = next(iter(self._alone))
        self._make_room(first)
        if not self._continue_running(plan, self._running_of(first)):
            self._admit_waiting(plan, first)

    def _running_of(self, request_id: str) -> list[Sequence]:
        return [sequence for sequence in self.running if sequence.request.request_id == request_id]

    def _make_room(self, request_id: str) -> None:
        """Preempts other requests as long as this one does not fit beside them."""
        choices = self._choices[request_id].values()
        missing = sum(self._holdings.missing(sequence, len(sequence.tokens)) for sequence in choices)
        others = [sequence for sequence in self.running if sequence.request.request_id != request_id]
        while others and (missing > self.pool.num_free_blocks or len(others) + len(choices) > self.max_num_seqs):
            self._preempt(others.pop())

    def _budget(self) -> int:
        """Most tokens of the next batch. With several stages the prompts at hand are spread over a few batches a stage,
        since each stage idles for a batch while the pipeline fills and drains."""
        if self.pp_size == 1 or not self.enable_chunked_prefill:
            return self.max_num_batched_tokens
        waiting = islice(self.waiting, self.max_num_seqs)
        todo = sum(sequence.num_todo for sequence in chain(self.running, waiting))
        share = -(-todo // (BATCHES_PER_STAGE * self.pp_size))
        return min(self.max_num_batched_tokens, max(share, MIN_PIPELINE_TOKENS))

    def _continue_running(self, plan: Plan, sequences: list[Sequence]) -> bool:
        """Adds these running sequences in their order. True if one had to be preempted."""
        decode_cap = -(-sum(sequence.is_decoding for sequence in sequences) // self.pp_size)
        preempted = False
        for sequence in list(sequences):
            room = plan.room
            if room == 0:
                break
            if sequence.num_todo == 0 or not sequence.running:
                continue
            if sequence.is_decoding and plan.num_decodes >= decode_cap:
                continue
            count = min(sequence.num_todo, room)
            if count < sequence.num_todo and not self.enable_chunked_prefill:
                continue
            while not self._holdings.grow(sequence, sequence.num_computed + count):
                preempted = True
                last = self.running[-1]
                self._preempt(last)
                if last is sequence:
                    break
            else:
                self._schedule(plan, sequence, count)
        return preempted

    def _admit_waiting(self, plan: Plan, request_id: str | None = None) -> None:
        """Adds waiting sequences in their order, of this request or (None) of any."""
        while len(self.running) < self.max_num_seqs and (sequence := self._first_waiting(request_id)) is not None:
            room = plan.room
            if room == 0 or sequence.awaiting:  # preempted with a token on its way: that comes first
                return
            hits = self._holdings.cached_prefix(sequence)
            num_cached = len(hits) * self.pool.block_size
            count = min(len(sequence.tokens) - num_cached, room)
            if num_cached + count < len(sequence.tokens) and not self.enable_chunked_prefill:
                return
            num_needed = self.pool.blocks_for(num_cached + count) - len(hits)
            if num_needed > self.pool.num_free_blocks - self.pool.num_free_among(hits):
                return
            self.waiting.remove(sequence)
            insort(self.running, sequence, key=attrgetter("order"))
            sequence.running = True
            self._holdings.take(sequence, hits)
            self._count_admission(sequence, num_cached)
            grown = self._holdings.grow(sequence, num_cached + count)
            assert grown
            self._schedule(plan, sequence, count)

    def _first_waiting(self, request_id: str | None) -> Sequence | None:
        if request_id is None:
            return self.waiting[0] if self.waiting else None
        return next((sequence for sequence in self.waiting if sequence.request.request_id == request_id), None)

    def _count_admission(self, sequence: Sequence, num_cached: int) -> None:
        if sequence.started:
            return  # resumed after preemption
        sequence.started = True
        self._started.append(sequence.request.request_id)
        sequence.queue_seconds = self._clock() - sequence.arrived_at
        # Of a prompt that another engine has computed, the client was told then.
        sequence.num_cached = 0 if sequence.num_generated else num_cached
        self.stats.num_prompt_tokens += sequence.num_prompt
        if self._holdings.enable_prefix_caching:
            self.stats.prefix_cache_queries += sequence.num_prompt
            self.stats.prefix_cache_hits += num_cached

    def _schedule(self, plan: Plan, sequence: Sequence, count: int) -> None:
        plan.add(sequence, count)
        self._holdings.register(sequence)

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the queue, to be computed again. A token on its way is still taken when it comes."""
        self.running.remove(sequence)
        sequence.running = False
        self._holdings.release(sequence)
        sequence.reset = sequence.announced
        self._queue(sequence)
        self.stats.num_preemptions += 1

    # ------------------------------------------------------------------ results

    def update(self, result: StepResult) -> list[Output]:
        """Takes the result of the oldest batch in flight; returns what each of its sequences gained."""
        step, plan = self._in_flight.popleft()
        if step != result.step or len(result.token_ids) != len(plan.sampled):
            raise RuntimeError(
                f"the result of step {result.step} with {len(result.token_ids)} tokens came where step {step} with "
                f"{len(plan.sampled)} was due"
            )
        for seq_id, entries in result.prompt_logprobs.items():
            sequence, start = plan.starts[seq_id]
            sequence.prompt_logprobs.update(enumerate(entries, start + 1))
        outputs = []
        drawn = zip(plan.sampled, result.token_ids, result.logprobs, strict=True)
        for index, (sequence, token, logprobs) in enumerate(drawn):
            if not self._is_live(sequence):
                continue
            sequence.awaiting = False
            if token >= 0:
                outputs.append(self._take(sequence, token, logprobs))
            elif token == TEXT_ENDED:
                outputs.append(self._finish(sequence))
            elif (reason := result.errors.get(index)) is None and sequence.has_hits:
                self._compute_again(sequence)
                continue
            else:
                outputs.append(self._fail(sequence, reason))
            self._came_through(sequence.request.request_id)
        return outputs

    def _came_through(self, request_id: str) -> None:
        """Something has come of it, or it has ended: it need not run alone any more."""
        if request_id in self._alone:
            del self._alone[request_id]
            self._num_alone_in_a_row += 1

    def _is_live(self, sequence: Sequence) -> bool:
        return self._choices.get(sequence.request.request_id, {}).get(sequence.choice) is sequence

    def _take(self, sequence: Sequence, token: int, logprobs: TokenLogprobs | None) -> Output:
        output = self._output(sequence)
        output.token_ids = [token]
        output.logprobs = None if logprobs is None else [logprobs]
        sequence.tokens.append(token)
        self.stats.num_generation_tokens += 1
        # The sampler draws no end or stop token before min_tokens.
        if token in sequence.stops or token in sequence.ends:
            output.finish_reason = FinishReason.STOP
            output.stop_reason = token if token in sequence.stops and token not in sequence.ends else None
        elif len(sequence.tokens) >= sequence.max_len:
            output.finish_reason = FinishReason.LENGTH
        if output.finish_reason is not None:
            self._end(sequence)
        return output

    def _output(self, sequence: Sequence) -> Output:
        """What every output of a sequence says, and what its first says besides. Before its token is counted."""
        output = Output(
            request_id=sequence.request.request_id, index=sequence.choice, token_index=sequence.num_generated,
            num_cached_tokens=sequence.num_cached,
        )  # fmt: skip
        if sequence.num_generated == 0:
            output.queue_seconds = sequence.queue_seconds
            if sequence.wants_prompt_logprobs:
                output.prompt_logprobs = [sequence.prompt_logprobs.get(at) for at in range(sequence.num_prompt)]
        return output

    def _finish(self, sequence: Sequence) -> Output:
        """Its grammar has ended, without an end token."""
        output = self._output(sequence)
        output.finish_reason = FinishReason.STOP
        self._end(sequence)
        return output

    def _compute_again(self, sequence: Sequence) -> None:
        """Its values were not finite, but it has read another's blocks, and the fault may be that one's: it runs again
        without them.

        A NaN spoils even what comes before it in a prompt: attention kernels multiply a masked value by 0, and that is
        NaN again. So a neighbour that shares the beginning and was scheduled before the fault showed has it as well.
        """
        self._holdings.forget(sequence)
        sequence.avoids_cache, sequence.has_hits = True, False
        if not sequence.num_generated:
            sequence.num_cached = 0
        if sequence.running:  # else it was preempted meanwhile, and begins anew as it is
            self._holdings.release(sequence)
            sequence.reset = sequence.announced

    def _fail(self, sequence: Sequence, reason: str | None) -> Output:
        """reason: why its parameters leave no token. None: its values may be unsound, which others must not read."""
        if reason is None:
            self._holdings.forget(sequence)
            reason = "no token could be drawn: the model's values were not finite, or the parameters leave no token"
        self._end(sequence)
        return Output(
            request_id=sequence.request.request_id, index=sequence.choice, finish_reason=FinishReason.ERROR,
            error=reason,
        )  # fmt: skip

    def _end(self, sequence: Sequence) -> None:
        choices = self._choices[sequence.request.request_id]
        del choices[sequence.choice]
        if not choices:
            del self._choices[sequence.request.request_id]
            self._came_through(sequence.request.request_id)
        (self.running if sequence.running else self.waiting).remove(sequence)
        sequence.running = False
        self._holdings.release(sequence)
        if sequence.announced:
            self._freed.append(sequence.seq_id)

    # ------------------------------------------------------------------ figures

    @property
    def kv_cache_usage(self) -> float:
        """Share of the blocks that are held."""
        return 1.0 - self.pool.num_free_blocks / self.pool.num_blocks

    def check_idle(self) -> None:
        """Raises AssertionError unless every block is free; for when there is no work."""
        assert not self.has_work
        self.pool.check()
        assert self.pool.num_free_blocks == self.pool.num_blocks, "blocks are still held with no request left"

    def unfinished(self) -> Iterable[str]:
        """Ids of the requests that have not ended."""
        return self._choices.keys()
