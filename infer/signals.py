"""The signals that ask a process to end: heard at once, and what they mean. Standard library only.

    orders = Orders()
    hear_signals(lambda number: act(orders.take(number)))
"""

import contextlib
import enum
import os
import signal
import threading
import time
from collections.abc import Callable

# What torchrun passes on to its ranks; SIGQUIT is left to end a process at once.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# Signals so close together are one wish that came on two ways: a service manager tells every process of a service, and
# torchrun passes on what it was told.
SAME_SECONDS = 0.2


def stop_signals() -> list[signal.Signals]:
    """What asks this process to stop: SIGHUP does not where it is ignored (nohup)."""
    return [n for n in STOP_SIGNALS if n is not signal.SIGHUP or signal.getsignal(n) is not signal.SIG_IGN]


class Order(enum.IntEnum):
    """What a process is asked to do; the larger one counts."""

    NONE = 0
    STOP = 1  # end what is under way, begin nothing
    STOP_NOW = 2


class Orders:
    """What the signals mean that a process gets one after the other.

    The first asks to stop. Once more means now where a person sits at it: Ctrl-C again, or whatever follows a Ctrl-C
    (torchrun answers a second one with SIGTERM). SIGTERM after SIGTERM changes nothing: service managers repeat it.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last: tuple[int, float] | None = None  # signal, time

    def take(self, number: int) -> Order:
        """The meaning of one more signal; NONE where it adds nothing to those before."""
        before, now = self._last, self._clock()
        self._last = number, now
        if before is None:
            return Order.STOP
        is_same = now - before[1] < SAME_SECONDS
        return Order.STOP_NOW if not is_same and signal.SIGINT in (number, before[0]) else Order.NONE


def hear_signals(told: Callable[[signal.Signals], object]) -> None:
    """From now on each of stop_signals() goes to `told`, on a thread of its own. To be called once, on the main thread.

    Python runs a signal's handler on the main thread, once that comes back from what it does in C++: a step, or a
    collective that another rank does not come to. The number is written to a pipe before that, though. The signals are
    not blocked, as sigwait would have it: every child would inherit that.
    """
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    heard = stop_signals()
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    for number in heard:
        signal.signal(number, lambda *_: None)  # the interpreter writes to the pipe only for those with a handler

    def listen() -> None:
        while True:
            for number in os.read(read_end, 64):
                if number in heard:
                    told(signal.Signals(number))

    threading.Thread(target=listen, name="signals", daemon=True).start()


def end_script_on_sigterm(is_consequence: Callable[[], object]) -> None:
    """Has SIGTERM end a script as an exception does, so that its `finally` blocks run: SystemExit, with one line.

    is_consequence: called first, on the main thread; does not return where the signal comes because a rank was lost.
    Does nothing where the script has a handler of its own, or calls this on another thread than the main one.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        return

    def end(number: int, frame: object) -> None:
        is_consequence()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough: what runs now is the end
        with contextlib.suppress(OSError):
            os.write(2, b"infer: told to end (SIGTERM)\n")
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, end)
