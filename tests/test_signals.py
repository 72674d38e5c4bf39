"""Signals that ask a process to end: what one after the other means, and that they are heard at once."""

import signal
import subprocess
import sys

import pytest
from worlds import ROOT

from infer.signals import SAME_SECONDS, Order, Orders

TERM, INT, HUP = signal.SIGTERM, signal.SIGINT, signal.SIGHUP
STOP, NOW, NONE = Order.STOP, Order.STOP_NOW, Order.NONE


@pytest.mark.parametrize(
    ("numbers", "orders"),
    [
        ([TERM], [STOP]),
        ([INT], [STOP]),
        ([TERM, TERM, TERM], [STOP, NONE, NONE]),
        ([INT, INT], [STOP, NOW]),
        ([INT, TERM], [STOP, NOW]),
        ([TERM, INT], [STOP, NOW]),
        ([HUP, TERM], [STOP, NONE]),
    ],
)
def test_one_signal_after_the_other(numbers, orders):
    now = 100.0
    meaning = Orders(lambda: now)
    told = []
    for number in numbers:
        told.append(meaning.take(number))
        now += 1.5 * SAME_SECONDS
    assert told == orders


def test_signals_that_come_together_are_one():
    now = 100.0
    meaning = Orders(lambda: now)
    assert meaning.take(INT) is STOP
    now += SAME_SECONDS / 2
    assert meaning.take(INT) is NONE
    now += SAME_SECONDS * 2
    assert meaning.take(INT) is NOW


def run(code: str, *numbers: signal.Signals) -> subprocess.CompletedProcess[str]:
    """A process that says when it is ready for the signals, and its end."""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:  # fmt: skip
        assert process.stdout is not None
        process.stdout.readline()
        for number in numbers:
            process.send_signal(number)
        out, err = process.communicate(timeout=30)
    return subprocess.CompletedProcess(code, process.returncode, out, err)


def test_a_signal_is_heard_while_the_main_thread_is_in_c():
    """There no handler of Python's ever runs."""
    code = (
        "import ctypes, os, signal\n"
        "from infer.signals import hear_signals\n"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"  # as nohup does it
        "heard = []\n"
        "def told(number):\n"
        "    print(number.name, flush=True)\n"
        "    heard.append(number)\n"
        "    if len(heard) == 2: os._exit(7)\n"  # they come in any order
        "hear_signals(told)\n"
        "print('ready', flush=True)\n"
        "block = ctypes.CDLL(None).pthread_mutex_lock\n"  # which no signal interrupts
        "mutex = ctypes.create_string_buffer(256)\n"
        "signal.setitimer(signal.ITIMER_REAL, 20)\n"  # its default ends the process
        "block(mutex), block(mutex)\n"
    )
    done = run(code, signal.SIGHUP, signal.SIGTERM, signal.SIGINT)
    assert done.returncode == 7 and sorted(done.stdout.split()) == ["SIGINT", "SIGTERM"], done


def test_children_do_not_inherit_a_deaf_ear():
    code = (
        "import subprocess, sys\n"
        "from infer.signals import hear_signals\n"
        "hear_signals(print)\n"
        "print('ready', flush=True)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(20)'])\n"
        "child.terminate()\n"
        "print(child.wait())\n"
    )
    assert run(code).stdout.split() == ["-15"]


SCRIPT = """
import signal, time
from infer.signals import end_script_on_sigterm
{before}
end_script_on_sigterm(lambda: {consequence})
print("ready", flush=True)
try:
    time.sleep(20)
finally:
    print("tidied up")
"""


def test_sigterm_ends_a_script_as_an_exception_does():
    done = run(SCRIPT.format(before="", consequence="None"), signal.SIGTERM)
    assert (done.returncode, done.stdout) == (143, "tidied up\n")
    assert done.stderr == "infer: told to end (SIGTERM)\n"


def test_what_a_script_does_itself_stands():
    own = "signal.signal(signal.SIGTERM, lambda *_: exit(5))"
    done = run(SCRIPT.format(before=own, consequence="None"), signal.SIGTERM)
    assert (done.returncode, done.stdout, done.stderr) == (5, "tidied up\n", "")


def test_a_consequence_of_another_rank_s_end_is_no_order():
    done = run(SCRIPT.format(before="import os", consequence="os._exit(9)"), signal.SIGTERM)
    assert (done.returncode, done.stderr) == (9, "")
