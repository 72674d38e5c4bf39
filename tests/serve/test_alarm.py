"""Timeouts that are renewed often: they ring when they should, once, and leave nothing behind."""

import asyncio

from infer.serve.alarm import Alarm


def test_it_rings_once_at_the_last_time_it_was_set_to():
    async def run():
        loop, rung = asyncio.get_running_loop(), asyncio.Event()
        times = []

        def ring():
            times.append(loop.time())
            rung.set()

        alarm = Alarm(ring)
        due = loop.time() + 0.05
        for later in (0.0, 10.0, 0.02):  # earlier, later, earlier again
            alarm.set(due + later)
        async with asyncio.timeout(5):
            await rung.wait()
        assert len(times) == 1 and times[0] >= due + 0.02
        alarm.close()

    asyncio.run(run())


def test_one_that_is_moved_on_or_unset_keeps_silent():
    async def run():
        loop, rung, later = asyncio.get_running_loop(), [], asyncio.Event()
        moved, unset, closed = (Alarm(lambda name=name: rung.append(name)) for name in ("moved", "unset", "closed"))
        for alarm in (moved, unset, closed):
            alarm.set(loop.time() + 0.01)
        moved.set(loop.time() + 60)
        unset.set(None)
        closed.close()
        Alarm(later.set).set(loop.time() + 0.05)
        async with asyncio.timeout(5):
            await later.wait()
        assert rung == []
        moved.close()

    asyncio.run(run())
