"""Which requests are suspected after a crash, and which are found guilty of the next."""

from infer.serve.replay import Replay


def running(*request_ids: str) -> Replay:
    """An engine that computes these."""
    replay = Replay()
    replay.open([])
    for request_id in request_ids:
        replay.started(request_id)
    return replay


def test_what_ran_is_suspected_until_a_token_comes():
    replay = running("a", "b")
    assert replay.is_open and replay.close() == set()
    assert not replay.is_open
    replay.open(["a", "b", "waits"])
    assert replay.suspects == {"a", "b"}
    replay.started("a")
    replay.advanced("a")
    assert replay.suspects == {"b"}
    replay.advanced("b")
    assert replay.suspects == set()


def test_running_at_two_crashes_in_a_row_is_guilty_and_clears_the_others():
    replay = running("a", "b", "c")
    replay.close()
    replay.open(["a", "b", "c"])
    replay.started("a")
    replay.advanced("a")
    replay.started("b")
    assert replay.close() == {"b"}
    replay.open(["a", "c"])
    assert replay.suspects == set()


def test_a_token_between_two_crashes_is_no_second_crash_in_a_row():
    replay = running("a")
    for _ in range(5):
        assert replay.close() == set()
        replay.open(["a"])
        replay.started("a")
        replay.advanced("a")


def test_a_crash_before_the_suspect_ran_tells_nothing():
    replay = running("a")
    for _ in range(5):  # while loading, say
        assert replay.close() == set()
        replay.open(["a"])
        assert replay.suspects == {"a"}


def test_what_is_done_is_not_blamed():
    replay = running("a", "b")
    replay.ended("a")
    replay.close()
    replay.open(["b"])
    assert replay.suspects == {"b"}
    replay.started("b")
    assert replay.close() == {"b"}


def test_a_suspect_that_leaves_is_none_any_more():
    replay = running("a", "b")
    replay.close()
    replay.ended("b")
    replay.open(["a"])
    assert replay.suspects == {"a"}
    replay.ended("a")
    assert replay.suspects == set() and replay.close() == set()
