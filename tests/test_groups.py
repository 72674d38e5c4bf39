"""What Groups makes of CPU ranks: pipes between the stages of one host, and sums over several hosts."""

import functools
import os
import sys

import pytest
import torch
from plain_ranks import run_ranks
from worlds import SCRIPTS

from infer import native
from infer.engine.loop import _is_connection_loss
from infer.parallel import hosts, shm, shm_pipe
from infer.parallel.shm import Introduction

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or native.problem_with(shm.SCHEMAS | shm.PIPE_SCHEMAS) != "",
    reason="needs Linux and the kernels",
)


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """stages(world, ranks) -> (what each stage reports, by rank; what all wrote to standard error). Each runs once."""

    @functools.cache
    def run(world, ranks, killed=()):
        return run_ranks(SCRIPTS / "hand_overs.py", tmp_path_factory.mktemp(world), world, ranks, killed=killed)

    return run


@pytest.fixture(scope="module")
def two_hosts(tmp_path_factory):
    """The same of ranks that seem to be on two hosts."""

    @functools.cache
    def run(world, ranks, killed=()):
        return run_ranks(SCRIPTS / "two_hosts.py", tmp_path_factory.mktemp(world), world, ranks, killed=killed)

    return run


@pytest.fixture
def of_two(stages):
    """of_two(scenario) -> what both stages report of it."""
    reports, _ = stages("two", 2)
    return lambda scenario: [reports[rank][scenario] for rank in range(2)]


@pytest.fixture
def of_four(stages):
    reports, _ = stages("four", 4)
    return lambda scenario: [reports[rank][scenario] for rank in range(4)]


@pytest.fixture
def over_hosts(two_hosts):
    reports, _ = two_hosts("four", 4)
    return lambda scenario: [reports[rank][scenario] for rank in range(4)]


# ------------------------------------------------------------------------------------------------ pipes


def test_batches_of_any_size_and_dtype_pass_every_stage(of_four):
    assert of_four("batches") == [
        {"wrong": [], "shared": [[rank > 0, rank < 3]] * 3, "maps": 0} for rank in range(4)
    ]  # fmt: skip


def test_more_stages_than_cores_progress(of_four):
    for report in of_four("crowd"):
        assert report["wrong"] == 0 and report["seconds"] < 30  # it is about one, if nobody else is there


@pytest.mark.parametrize(
    ("scenario", "links"),
    [
        ("no_room", [True, False, True]),
        ("no_entry", [False, True, True]),
        ("hosts", [True, False, True]),
        ("switched_off", [False, False, False]),
    ],
)
def test_where_two_stages_share_no_memory_gloo_joins_them(of_four, scenario, links):
    shared = [[before, after] for before, after in zip([False, *links], [*links, False], strict=True)]
    assert of_four(scenario) == [{"shared": pair, "tensor": [0, 1, 2, 3, 4, 5]} for pair in shared]


def test_memory_that_cannot_be_shared_is_told_once_and_two_hosts_are_no_news(stages):
    _, written = stages("four", 4)
    assert written.count("cannot make the memory that ranks share") == 1
    assert written.count("cannot open the memory that ranks share") == 1
    assert written.count("ranks 1 and 2 share no memory: hidden states go through gloo") == 1
    assert written.count("share no memory") == 2


def test_a_sender_waits_only_for_more_than_can_be_in_flight(of_two):
    sender, receiver = of_two("ahead")
    *free, last = sender["seconds"]
    assert len(free) == 3 and max(free) < 0.5 < last
    assert receiver["got"] == [1, 2, 3, 4]


def test_a_pipe_takes_memory_only_as_far_as_batches_reach(of_two):
    *small, large = of_two("memory")[0]["taken"]
    assert max(small) < 64 << 10 and 4_000_000 < large < 5 << 20


def test_waiting_takes_no_processor(of_two):
    assert max(report["cpu"] for report in of_two("idle")) < 0.2  # of two seconds


def test_a_batch_that_does_not_come_is_an_error_after_the_timeout(of_two):
    sender, receiver = of_two("late")
    assert 1.5 < receiver["seconds"] < 5
    error = receiver["error"]
    assert "rank 0 (pid" in error and "did not come to hand-over of 16 bytes" in error and "timed out" in error
    assert "rank 1 (pid" in sender["error"] and "gave up before hand-over" in sender["error"]


def test_what_was_sent_arrives_after_its_sender_has_left(of_two):
    _, receiver = of_two("left")
    assert receiver["first"] == [1, 1, 1, 1]
    assert "rank 0 (pid" in receiver["error"] and "has left the group: connection closed" in receiver["error"]


def test_another_batch_than_expected_is_an_error_at_both_ends(of_two):
    sender, receiver = of_two("mixed_up")
    assert "sends hand-over of 16 bytes (dtype 6) of step 1" in receiver["error"]
    assert "expects hand-over of 20 bytes (dtype 6) of step 2" in receiver["error"]
    assert "rank 1 (pid" in sender["error"]


def test_a_killed_stage_is_named_within_five_seconds(stages):
    reports, _ = stages("killed", 3, killed=(1,))
    assert sorted(reports) == [0, 2]
    for report in reports.values():
        assert "rank 1 (pid" in report["error"] and "is gone: connection closed" in report["error"]
        assert report["seconds"] < 5


def test_a_pipe_in_one_process_and_what_it_refuses():
    num_bytes = torch.ops.infer.shm_pipe_bytes(2, 128)
    fd = shm.make_file(num_bytes, shm_pipe.HEAD_BYTES)
    try:
        own = [os.getpid()] * 2
        ends = [torch.ops.infer.shm_pipe_open(fd, end, [4, 5], own, [0, 0], 9, 2, 128, 1, 100) for end in (0, 1)]
        with pytest.raises(RuntimeError, match="not the one that was agreed on"):
            torch.ops.infer.shm_pipe_open(fd, 1, [4, 5], own, [0, 0], 8, 2, 128, 1, 100)
    finally:
        os.close(fd)
    sender, receiver = (shm_pipe.SharedPipe(end) for end in ends)
    for step in range(5):
        sender.send(torch.arange(16.0) + step, step)
        sender.send(torch.tensor(step), step)
        assert receiver.receive((16,), torch.float32, step).tolist() == list(range(step, 16 + step))
        assert receiver.receive((), torch.int64, step) == step
    with pytest.raises(ValueError, match="this is the pipe's other end"):
        receiver.send(torch.ones(1), 5)
    with pytest.raises(ValueError, match="must be contiguous"):
        sender.send(torch.ones(2, 3).t(), 5)
    sender.send(torch.ones(16), 5)
    with pytest.raises(RuntimeError, match=r"rank 4 .* sends .* rank 5 .* expects .* of step 6 at byte 0"):
        receiver.receive((16,), torch.float32, 6)
    sender.close()
    sender.close()
    receiver.close()
    with pytest.raises(ValueError, match="there is no pipe"):
        torch.ops.infer.shm_send(ends[0], torch.ones(1), 6)
    with pytest.raises(ValueError, match="slot_bytes is 64, must be a multiple of 64 and at least 128"):
        torch.ops.infer.shm_pipe_bytes(2, 64)


# ------------------------------------------------------------------------------------------------ two hosts


@pytest.mark.parametrize("scenario", ["two_and_two", "three_and_one"])
def test_a_sum_over_two_hosts_has_the_same_bits_everywhere(over_hosts, scenario):
    reports = over_hosts(scenario)
    assert [(report["wrong"], report["kind"]) for report in reports] == [([], "AcrossHosts")] * 4
    assert len({report["digest"] for report in reports}) == 1


def test_a_gather_over_two_hosts(over_hosts):
    first, *others = over_hosts("gather")
    assert first["found"] == [[0] * 3 + [1] + [2] * 4 + [3] * 2] * 2
    assert others == [{"found": None}] * 3


def test_a_tape_records_the_sum_on_first_ranks_and_others(over_hosts):
    expected = [4 * (2 * sum(rank + number for rank in range(4)) + 1) for number in range(20)]
    assert over_hosts("recorded") == [{"sums": expected}] * 4


def test_closing_gives_all_back_and_one_host_without_memory_makes_all_use_gloo(over_hosts, two_hosts):
    assert over_hosts("closed") == [{"maps left": 0, "shared": False, "total": [4, 4, 4]}] * 4
    _, written = two_hosts("four", 4)
    assert written.count("on one host of ranks 0, 1, 2, 3 memory cannot be shared: their sums go through gloo") == 1


def test_only_a_stage_on_both_hosts_has_two_levels(two_hosts):
    reports, _ = two_hosts("six", 6)
    assert [reports[rank] for rank in range(6)] == [
        {"kind": "SharedMemory", "sum": 111, "pipe": [False, True]},
        {"kind": "SharedMemory", "sum": 111, "pipe": [False, False]},
        {"kind": "SharedMemory", "sum": 111, "pipe": [False, False]},
        {"kind": "AcrossHosts", "sum": 111_000, "pipe": [True, False]},
        {"kind": "AcrossHosts", "sum": 111_000, "pipe": [False, False]},
        {"kind": "AcrossHosts", "sum": 111_000, "pipe": [False, False]},
    ]


def test_a_killed_rank_of_another_host_ends_all(two_hosts):
    reports, _ = two_hosts("killed", 4, killed=(2,))
    assert sorted(reports) == [0, 1, 3]
    for report in reports.values():
        assert _is_connection_loss(RuntimeError(report["error"])), report["error"]


def test_a_plan_has_two_levels_only_where_a_host_has_several_ranks_and_not_all():
    def rank(host, usable=1):
        return Introduction(usable, host, 0, 0, 1, 2, 0)

    made = []

    def plan(*world):
        made.clear()
        return hosts.plan(list(range(len(world))), list(world), 1, lambda ranks: made.append(ranks) or len(ranks))

    assert plan(rank(1), rank(1)) is None and plan(rank(1), rank(2)) is None
    assert plan(rank(1), rank(1), rank(2, usable=0)) is None and made == []
    assert plan(rank(1), rank(2), rank(1), rank(2)) == hosts.Levels([1, 3], 2, 2, 2)
    assert made == [[0, 2], [1, 3], [0, 1]]
    assert plan(rank(1), rank(1), rank(2)) == hosts.Levels([0, 1], 2, None, 2)
