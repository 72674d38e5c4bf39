"""Threads for work that would hold up the event loop, and with it every other client. No torch here."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

NUM_THREADS = 2

T = TypeVar("T")


class Offload:
    """A small thread pool. Work there must touch nothing that the event loop changes meanwhile."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=NUM_THREADS, thread_name_prefix="offload")

    async def run(self, heavy: bool, work: Callable[[], T]) -> T:
        """work(), in a thread where it is heavy, else right here: a thread costs light work more than it gains."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, work) if heavy else work()

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
