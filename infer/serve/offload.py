"""Threads for work that would hold up the event loop, and with it every other client. No torch here."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

NUM_THREADS = 2
INLINE_BYTES = 32 << 10  # shorter bodies are read and checked in 2 ms at most, whatever they hold
INLINE_CHARS = 4_000  # shorter texts are tokenized in 5 ms at most, whatever they hold
LONG_CHARS = 100_000  # longer ones may take from a tenth of a second to seconds

T = TypeVar("T")


class Offload:
    """A small thread pool, and beside it a thread for long texts and one for grammars: those delay only each other.

    Work there must touch nothing that the event loop changes meanwhile. A waiter that is cancelled takes work that has
    not begun out of the queue.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=NUM_THREADS, thread_name_prefix="offload")
        self._long = ThreadPoolExecutor(max_workers=1, thread_name_prefix="offload-long")
        self._grammars = ThreadPoolExecutor(max_workers=1, thread_name_prefix="offload-grammars")

    async def run(self, heavy: bool, work: Callable[[], T]) -> T:
        """work(), in a thread where it is heavy, else right here: a thread costs light work more than it gains."""
        return await self._in(self._pool, work) if heavy else work()

    async def run_text(self, num_chars: int, work: Callable[[], T]) -> T:
        """work(), which tokenizes so many characters or does what takes as long: here, in the pool or beside it."""
        if num_chars <= INLINE_CHARS:
            return work()
        return await self._in(self._pool if num_chars <= LONG_CHARS else self._long, work)

    async def run_grammar(self, work: Callable[[], T]) -> T:
        """work(), which waits for the process that checks grammars, one after another."""
        return await self._in(self._grammars, work)

    async def _in(self, pool: ThreadPoolExecutor, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(pool, work)

    def close(self) -> None:
        for pool in (self._pool, self._long, self._grammars):
            pool.shutdown(wait=False, cancel_futures=True)
