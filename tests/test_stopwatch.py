"""Busy time on a GPU, whose work ends after the call that queued it: with events whose end the test decides."""

from infer.engine import stopwatch


class FakeEvent:
    """An event of a stream whose clock is FakeEvent.now; it is past once the stream has come to it."""

    now = 0.0

    def __init__(self):
        self.at = None

    def record(self):
        self.at = FakeEvent.now

    def query(self):
        return self.at is None or self.at <= FakeEvent.now

    def elapsed_time(self, end):
        return 1e3 * (end.at - self.at)


def test_a_streams_busy_time_is_counted_once_it_is_past(monkeypatch):
    made = []
    monkeypatch.setattr(stopwatch, "_timing_event", lambda: made.append(FakeEvent()) or made[-1])
    watch = stopwatch._StreamWatch()
    for start in range(0, 50, 10):
        FakeEvent.now = float(start)
        with watch:
            end = watch._open[-1][1]
        end.at = start + 2.0  # the stream comes to it later than the host
        assert watch.seconds == 2.0 * (start // 10)
    FakeEvent.now = 100.0
    assert watch.seconds == 2.0 * 4  # the newest might be open still
    assert len(made) <= 6, "events are used again"
