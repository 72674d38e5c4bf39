"""What the engine tells of itself: heartbeats of the ranks, and the message to a server's frontend."""

from pathlib import Path

import pytest

from infer import LLM, SamplingParams
from infer.engine.stats import Heart, Heartbeats
from infer.parallel.topology import Topology
from infer.request import Request


class FakeStore:
    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self.num_reads = 0

    def set(self, key: str, value: str) -> None:
        self.values[key] = value

    def multi_get(self, keys: list[str]) -> list[bytes]:
        self.num_reads += 1
        return [self.values[key].encode() for key in keys]


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, as a list of one."""
    now = [50.0]
    monkeypatch.setattr("infer.engine.stats.time.monotonic", lambda: now[0])
    return now


def test_a_rank_that_stops_beating_grows_old(now: list[float]) -> None:
    store, topology = FakeStore(), Topology(tp_size=2, pp_size=2)
    hearts = {rank: Heart(store, "engine0", rank) for rank in (1, 2, 3)}
    for heart in hearts.values():
        heart.beat(0.0)
    beats = Heartbeats(store, "engine0", topology)
    for second in range(5):
        now[0] += 1.0
        for rank, heart in hearts.items():
            if rank != 3 or second < 2:
                heart.beat(10.0 * rank + second)
        beats.read(float(second))
    assert beats.ages == [0.0, 0.0, 0.0, 3.0]
    assert beats.stage_busy == [4.0, 24.0], "of tensor-parallel rank 0 of each stage: ranks 0 and 2"
    assert store.num_reads == 5, "one round trip a read, however many ranks"
    now[0] += 7.0
    assert beats.ages == [7.0, 7.0, 7.0, 10.0]


def test_an_idle_rank_beats_without_being_busy(now: list[float]) -> None:
    store = FakeStore()
    heart = Heart(store, "engine0", 1)
    heart.beat(1.5)
    beats = Heartbeats(store, "engine0", Topology(tp_size=2))
    beats.read(0.0)
    now[0] += 30.0
    heart.beat(1.5)
    beats.read(0.0)
    assert beats.ages == [0.0, 0.0]


def test_one_rank_needs_no_store(now: list[float]) -> None:
    beats = Heartbeats(None, "engine0", Topology())
    now[0] += 9.0
    beats.read(2.0)
    assert (beats.ages, beats.stage_busy) == ([0.0], [2.0])


def test_the_message_to_the_frontend(checkpoint_dirs: dict[str, Path]) -> None:
    with LLM(
        model=str(checkpoint_dirs["llama"]), dtype="float32", num_gpu_blocks_override=64, max_model_len=128,
        num_threads=1, disable_log_stats=True,
    ) as llm:  # fmt: skip
        engine = llm.engine
        assert engine.stats_due
        before = engine.stats_message()
        assert (before.num_running, before.num_waiting, before.kv_cache_usage) == (0, 0, 0.0)
        assert not engine.stats_due, "for a second"
        prompts = [list(range(5, 25)), list(range(5, 30))]
        llm.generate(prompts, SamplingParams(temperature=0, max_tokens=4, ignore_eos=True), use_tqdm=False)
        stats = engine.stats_message()
        assert (stats.num_running, stats.num_waiting, stats.kv_cache_usage) == (0, 0, 0.0)
        assert stats.prefix_cache_queries == 45
        # The last token of each is drawn, and never computed; one block of the second prompt is the first's.
        assert sum(stats.iteration_tokens) == 45 - stats.prefix_cache_hits + 2 * 3
        assert len(stats.stage_busy_seconds) == 1 and 0 < stats.stage_busy_seconds[0] <= stats.active_seconds
        assert len(stats.heartbeat_ages) == 1 and stats.heartbeat_ages[0] < 1.0
        assert engine.stats_message().iteration_tokens == [], "each step is told once"


def test_the_end_of_the_work_is_told_at_once(checkpoint_dirs: dict[str, Path]) -> None:
    with LLM(
        model=str(checkpoint_dirs["llama"]), dtype="float32", num_gpu_blocks_override=64, max_model_len=128,
        num_threads=1, disable_log_stats=True,
    ) as llm:  # fmt: skip
        engine = llm.engine
        params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
        engine.submit(Request(request_id="a", prompt_token_ids=[5, 6, 7], params=params, seed=1))
        assert engine.stats_message().num_waiting == 1
        while engine.has_work:
            assert not engine.stats_due, "this takes far less than a second"
            engine.step()
        assert engine.stats_due
        assert engine.stats_message().num_running == 0
        assert not engine.stats_due
