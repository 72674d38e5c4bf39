"""python -m infer.grammar_worker TOKENIZER_DIR: compiles grammars that nobody trusts, for structured.GrammarChecker.

A grammar of a few kilobytes may take minutes, gigabytes or the whole stack to compile, which no option of the compiler
prevents. So each is compiled in a fork of this process that dies of too much, and only what survives reaches a process
that others depend on. Both ways messages are a length in 4 bytes (little-endian) and MessagePack: in, a
StructuredOutputs; out, what is wrong with it, "" where nothing is. The first one out is about the tokenizer itself. The
worker ends with its standard input.
"""

import contextlib
import os
import random
import resource
import signal
import sys
import threading
from pathlib import Path
from typing import BinaryIO

import msgspec
from llguidance import LLTokenizer

from infer.request import StructuredOutputs
from infer.structured import MAX_CPU_SECONDS, blame, compile_grammar, load_tokenizer, read_message, write_message

MAX_BYTES = 3 << 30  # of address space, the tokenizer included
STACK_BYTES = 1 << 20  # less than any thread that meets the grammar later has
_FINE = "fine"  # what is wrong begins with the name of a field
NUM_TRIED_TOKENS = 32  # a step in the middle of a text may be what takes long


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the parent, which then closes the pipe
    requests, replies = sys.stdin.buffer, sys.stdout.buffer
    try:
        tokenizer = load_tokenizer(Path(sys.argv[1]))
    except ValueError as error:
        write_message(replies, str(error))
        return
    write_message(replies, "")
    while (body := read_message(requests)) is not None:
        write_message(replies, _judge(tokenizer, msgspec.msgpack.decode(body, type=StructuredOutputs)))


def _judge(tokenizer: LLTokenizer, structured: StructuredOutputs) -> str:
    """What is wrong with it, or ""."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with os.fdopen(write_end, "wb") as pipe:
                _try_in_child(tokenizer, structured, pipe)
        finally:
            os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    if said:
        return said.decode().removeprefix(_FINE)
    return blame(
        structured, f"it is too complex: compiling it took over {MAX_CPU_SECONDS} s, {MAX_BYTES >> 30} GiB or the stack"
    )


def _try_in_child(tokenizer: LLTokenizer, structured: StructuredOutputs, pipe: BinaryIO) -> None:
    """Writes its verdict to the pipe, or dies without one."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what a crash has to say
    with contextlib.suppress(ValueError, OSError):  # a system without this limit
        resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.setitimer(signal.ITIMER_PROF, MAX_CPU_SECONDS)  # its signal ends the process
    threading.stack_size(STACK_BYTES)
    thread = threading.Thread(target=_try, args=(tokenizer, structured, pipe))
    thread.start()
    thread.join()


def _try(tokenizer: LLTokenizer, structured: StructuredOutputs, pipe: BinaryIO) -> None:
    try:
        matcher = compile_grammar(structured, tokenizer)
        rng = random.Random(0)
        for _ in range(NUM_TRIED_TOKENS):
            mask = int.from_bytes(matcher.compute_bitmask(), "little")
            for end in tokenizer.eos_tokens:
                mask &= ~(1 << end)
            if matcher.is_error():
                raise ValueError(blame(structured, matcher.get_error()))
            if not mask:
                if not matcher.is_accepting():
                    raise ValueError(blame(structured, "no text of this tokenizer's fits it"))
                break
            matcher.consume_token(_one_of(mask, rng))
        del matcher  # letting go of a deep one takes stack too
    except ValueError as error:
        pipe.write(str(error).encode())
    else:
        pipe.write(_FINE.encode())


def _one_of(mask: int, rng: random.Random) -> int:
    """A set bit: the first one from a random place on, around the end."""
    start = rng.randrange(mask.bit_length())
    above = mask >> start
    if above:
        return start + (above & -above).bit_length() - 1
    return (mask & -mask).bit_length() - 1


if __name__ == "__main__":
    main()
