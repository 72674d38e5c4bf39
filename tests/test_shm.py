"""Collectives through shared memory: real ranks in real processes, against sums that every rank can work out itself."""

import functools
import os
import sys

import pytest
import torch
from plain_ranks import run_ranks
from worlds import SCRIPTS

from infer import native
from infer.parallel import shm
from infer.parallel.shm import Introduction

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or native.problem_with(shm.SCHEMAS) != "", reason="needs Linux and the kernels"
)


@pytest.fixture
def run(tmp_path):
    """run(scenario, ranks) -> (what each rank reports, by rank; what all wrote to standard error)."""
    return functools.partial(run_ranks, SCRIPTS / "collectives.py", tmp_path)


def test_sums_are_those_in_rank_order_bit_for_bit(run):
    # Each rank has other vectors: the sum is an addition of single lanes, and must not depend on them.
    reports, _ = run("sums", 4, env={"ATEN_CPU_CAPABILITY": ["avx512", "avx2", "default", "default"]})
    assert [report["wrong"] for report in reports.values()] == [[]] * 4
    assert reports[0]["digest"] == reports[1]["digest"]


def test_gathers_of_any_dtype_and_width(run):
    reports, _ = run("gathers", 3)
    assert [report["wrong"] for report in reports.values()] == [[]] * 3


def test_more_ranks_than_cores_progress(run):
    reports, _ = run("crowd", max(4, len(os.sched_getaffinity(0)) + 1))
    for report in reports.values():
        assert report["shared"] and report["wrong"] == 0
        assert report["seconds"] < 30  # it is about one, if nobody else is there


def test_every_stage_has_a_segment_of_its_own_and_closing_gives_it_back(run):
    reports, _ = run("layouts", 4)
    for rank, report in reports.items():
        total = 3 if rank < 2 else 12
        assert report == {"shared": [True, True, False], "sums": [total] * 6, "maps": 0}


def test_a_killed_rank_is_named_within_five_seconds(run):
    reports, _ = run("killed", 4, killed=[2])
    assert sorted(reports) == [0, 1, 3]
    for report in reports.values():
        assert "connection closed" in report["error"] and report["seconds"] < 5
        assert "rank 2 (pid" in report["error"] or "gave up" in report["error"]


def test_a_rank_that_does_not_come_is_named_after_the_timeout(run):
    reports, _ = run("late", 3)
    for rank in (0, 2):
        assert 1.5 < reports[rank]["seconds"] < 5
    errors = [reports[0]["error"], reports[2]["error"]]
    assert any("rank 1 (pid" in e and "did not come to all_reduce" in e and "timed out" in e for e in errors)


def test_a_rank_that_has_closed_its_group_is_named_at_once(run):
    reports, _ = run("left", 2)
    assert "rank 1" in reports[0]["error"] and "has left the group" in reports[0]["error"]
    assert reports[0]["seconds"] < 1.5


def test_different_calls_are_an_error_and_no_sum(run):
    reports, _ = run("mixed_up", 2)
    assert "calls all_reduce of 12 bytes" in reports[0]["error"] and "calls all_reduce of 16" in reports[0]["error"]
    assert "rank 0" in reports[1]["error"]


@pytest.mark.parametrize(
    ("scenario", "env", "said"),
    [
        ("plain", {"INFER_OPS": ["native", "reference"]}, "rank 1 cannot share memory, it uses gloo"),
        ("no_room", {}, "cannot make the memory that ranks share"),
        ("no_entry", {}, "cannot open the memory that ranks share"),
    ],
)
def test_without_shared_memory_all_ranks_use_gloo(run, scenario, env, said):
    reports, written = run(scenario, 2, env=env)
    assert reports == {rank: {"shared": False, "sum": [2.0] * 3} for rank in range(2)}
    assert written.count(said) == 1


# ------------------------------------------------------------------------------------- without other processes


def make_segment_file(size):
    num_bytes = torch.ops.infer.shm_bytes(size, 64)
    return shm.make_file(num_bytes, num_bytes)


def open_alone(size=1, index=0, fd=None, nonce=7):
    handle = fd if fd is not None else make_segment_file(size)
    try:
        pids = [os.getpid()] * size
        return torch.ops.infer.shm_open(handle, index, list(range(size)), pids, [0] * size, nonce, 64, 1, 100)
    finally:
        if fd is None:
            os.close(handle)


def test_a_group_of_one_and_what_it_refuses():
    group = open_alone()
    x = torch.arange(100.0)
    torch.ops.infer.shm_all_reduce(group, x)
    assert torch.equal(x, torch.arange(100.0))
    assert torch.equal(torch.ops.infer.shm_gather(group, x.view(10, 10), [10]), x.view(10, 10))
    with pytest.raises(ValueError, match="dtype is Double, must be Float, BFloat16 or Half"):
        torch.ops.infer.shm_all_reduce(group, x.double())
    with pytest.raises(ValueError, match="must be contiguous"):
        torch.ops.infer.shm_all_reduce(group, x.view(10, 10).t())
    with pytest.raises(ValueError, match="2 widths for 1 ranks"):
        torch.ops.infer.shm_gather(group, x.view(10, 10), [5, 5])
    with pytest.raises(ValueError, match="x has 10 columns, widths say 9"):
        torch.ops.infer.shm_gather(group, x.view(10, 10), [9])
    torch.ops.infer.shm_close(group)
    with pytest.raises(ValueError, match="there is no group"):
        torch.ops.infer.shm_all_reduce(group, x)


def test_only_the_agreed_segment_is_mapped():
    fd = make_segment_file(2)
    try:
        with pytest.raises(RuntimeError, match="not the one that was agreed on"):
            open_alone(size=2, index=1, fd=fd)  # index 0 has not set it up
        first = open_alone(size=2, index=0, fd=fd)
        with pytest.raises(RuntimeError, match="not the one that was agreed on"):
            open_alone(size=2, index=1, fd=fd, nonce=8)
        with pytest.raises(RuntimeError, match="bytes, not"):
            open_alone(size=3, index=1, fd=fd)
        with pytest.raises(PermissionError):
            os.ftruncate(fd, 0)  # nobody can take the memory away from under the others
        torch.ops.infer.shm_close(first)
    finally:
        os.close(fd)


def test_ranks_are_crowded_when_their_threads_outnumber_the_cores_they_share():
    def rank(threads, cores, core_set, host=1):
        return Introduction(1, host, 0, 0, threads, cores, core_set)

    pinned = [rank(1, 1, core_set) for core_set in range(4)]
    assert not any(shm._is_crowded(mine, pinned) for mine in pinned)
    free = [rank(1, 2, 0), rank(1, 2, 0)]
    assert not shm._is_crowded(free[0], free)
    assert shm._is_crowded(free[0], [*free, rank(1, 2, 0)])
    assert not shm._is_crowded(free[0], [*free, rank(1, 2, 0, host=2)])
    assert shm._is_crowded(rank(4, 2, 0), [rank(4, 2, 0)])


def test_an_old_library_is_named(monkeypatch):
    monkeypatch.setitem(shm.SCHEMAS, "shm_close", "(int group, int how) -> ()")
    assert "they lack shm_close(int group, int how)" in shm._problem()


def test_ranks_on_several_hosts_have_no_segment(caplog):
    def rank(host):
        return Introduction(1, host, 0, 0, 1, 2, 0)

    with caplog.at_level("INFO", logger="infer"):
        assert shm.connect(None, [1, 2], [rank(1), rank(1), rank(2)], 0, 60) is None
    assert "ranks 1, 2 are on several hosts" in caplog.text
    assert 0 < shm._host() < 1 << 56  # it travels as an int64
