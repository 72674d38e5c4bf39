"""Heavy work beside the event loop: where it runs, what it delays, and that tokenizing lets others go on."""

import asyncio
import threading
import time

import pytest

from infer.serve.offload import INLINE_CHARS, LONG_CHARS, Offload


def run(scenario):
    async def main():
        offload = Offload()
        try:
            return await asyncio.wait_for(scenario(offload), 60)
        finally:
            offload.close()

    return asyncio.run(main())


def test_where_work_runs():
    async def scenario(offload):
        here = threading.current_thread().name
        assert await offload.run(False, lambda: threading.current_thread().name) == here
        assert await offload.run_text(INLINE_CHARS, lambda: threading.current_thread().name) == here
        for name in (
            await offload.run(True, lambda: threading.current_thread().name),
            await offload.run_text(LONG_CHARS, lambda: threading.current_thread().name),
        ):
            assert name.startswith("offload_")
        name = await offload.run_text(LONG_CHARS + 1, lambda: threading.current_thread().name)
        assert name.startswith("offload-long")
        with pytest.raises(ZeroDivisionError):
            await offload.run(True, lambda: 1 // 0)

    run(scenario)


def test_long_texts_delay_only_each_other():
    async def scenario(offload):
        release, done = threading.Event(), []
        long = [asyncio.create_task(offload.run_text(LONG_CHARS + 1, release.wait)) for _ in range(5)]
        waiting = asyncio.create_task(offload.run_text(LONG_CHARS + 1, lambda: done.append("cancelled work")))
        await asyncio.sleep(0)
        for size in (10, LONG_CHARS):
            await offload.run_text(size, lambda: done.append("short"))
        await offload.run(True, lambda: done.append("heavy"))
        waiting.cancel()
        release.set()
        assert all(await asyncio.gather(*long))
        assert done == ["short", "short", "heavy"]

    run(scenario)


@pytest.mark.parametrize(
    "text", ["\u4f60\u597d" * 200_000, "a" * 400_000, " " * 400_000], ids=["cjk", "word", "spaces"]
)
def test_the_loop_goes_on_while_a_long_text_is_tokenized(tokenizer, text):
    async def scenario(offload):
        gaps, began = [], time.perf_counter()
        work = asyncio.create_task(offload.run_text(len(text), lambda: tokenizer.encode(text)))
        while not work.done():
            before = time.perf_counter()
            await asyncio.sleep(0.001)
            gaps.append(time.perf_counter() - before)
        assert tokenizer.decode(await work) == text
        # Were the interpreter's lock held meanwhile, one gap would be about as long as the work.
        total = time.perf_counter() - began
        assert max(gaps) < max(total / 2, 0.05), (max(gaps), total)

    run(scenario)
