"""Which requests an engine is given after a crash, and which are found guilty of it."""

from infer.serve.replay import Replay


def running(*request_ids: str) -> Replay:
    """An engine that computes these."""
    replay = Replay()
    replay.open([])
    for request_id in request_ids:
        assert replay.add(request_id) == [request_id]
        replay.started(request_id)
    return replay


def test_requests_wait_until_an_engine_is_there():
    replay = Replay()
    assert replay.add("a") == replay.add("b") == []
    assert replay.open(["a", "b"]) == ["a", "b"]
    assert replay.add("c") == ["c"]


def test_suspects_go_one_by_one_before_all_others():
    replay = running("a", "b")
    assert replay.add("waits") == ["waits"]
    assert replay.close() == set()
    assert replay.add("new") == []
    assert replay.open(["a", "b", "waits", "new"]) == ["a"]
    assert replay.add("newer") == []
    replay.started("a")
    assert replay.advanced("a") == ["b"]
    assert replay.advanced("a") == []
    assert replay.advanced("b") == ["waits", "new", "newer"]
    assert replay.num_suspects == 0


def test_running_at_two_crashes_in_a_row_is_guilty_and_clears_the_others():
    replay = running("a", "b", "c")
    replay.close()
    assert replay.open(["a", "b", "c"]) == ["a"]
    assert replay.advanced("a") == ["b"]
    replay.started("b")
    assert replay.close() == {"b"}
    assert replay.open(["a", "c"]) == ["a", "c"]


def test_a_token_between_two_crashes_is_no_second_crash_in_a_row():
    replay = running("a")
    for _ in range(5):
        assert replay.close() == set()
        assert replay.open(["a"]) == ["a"]
        replay.started("a")
        assert replay.advanced("a") == []


def test_a_crash_before_the_suspect_ran_tells_nothing():
    replay = running("a")
    for _ in range(5):  # while loading, say
        assert replay.close() == set()
        assert replay.open(["a"]) == ["a"]


def test_a_suspect_that_leaves_lets_the_next_go():
    replay = running("a", "b")
    replay.close()
    assert replay.ended("b") == []
    replay.add("c")
    assert replay.open(["a", "c"]) == ["a"]
    assert replay.ended("a") == ["c"]


def test_what_is_done_is_not_blamed():
    replay = running("a", "b")
    replay.ended("a")
    replay.close()
    assert replay.open(["b"]) == ["b"]
    replay.started("b")
    assert replay.close() == {"b"}
