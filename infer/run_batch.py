r"""python -m infer.run_batch: the requests of a batch file, answered into another file.

    python -m infer.run_batch -i requests.jsonl -o results.jsonl --model DIR
    torchrun --master-port 29501 --nproc-per-node 4 --max-restarts 10 \
      -m infer.run_batch -i requests.jsonl -o results.jsonl --model DIR

Both are in the format of OpenAI's batches. --resume goes on after a run that was cut off.
"""

import argparse
import asyncio
import contextlib
import os
import queue
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from infer import launch
from infer.batch_file import BatchInput, WrittenRows, open_output
from infer.batch_rows import BatchRows, LocalEngine, Progress, rows_ahead
from infer.config import EngineConfig, Parser, ServerConfig, add_flags, from_args
from infer.jsonl import JsonLines
from infer.request import Output
from infer.serve.link import Abort, FrontendConfig, Hello, Submit
from infer.serve.text import Tokenizer

if TYPE_CHECKING:
    from infer.engine.loop import Engine
    from infer.process import Process

# Of the server's flags those that change what a body means, or what may stand in it.
SERVER_FLAGS = (
    "served_model_name", "chat_template", "response_role", "enable_auto_tool_choice", "tool_call_parser",
    "reasoning_parser", "generation_config", "max_logprobs", "max_body_bytes", "config",
)  # fmt: skip


def main() -> None:
    env = None
    try:
        env = launch.RankEnv.from_environ()
        launch.exit_if_failed_before(env)
        launch.set_parent_death_signal(env)
        if env.rank != 0:
            _follow(env)
        args = parse(sys.argv[1:])
        Batch(env, args).run()
    except ValueError as error:
        launch.fail(str(error), env)


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line, and the file it names. Raises ValueError."""
    parser = Parser(
        prog="python -m infer.run_batch", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("-i", "--input-file", required=True, help="requests, one JSON object a line; -: standard input")
    parser.add_argument("-o", "--output-file", required=True, type=Path, help="rows of results are added to this file")
    parser.add_argument(
        "--resume", action="store_true", help="keep the rows of the output file, and answer the other requests"
    )
    add_flags(parser, EngineConfig)
    add_flags(parser, ServerConfig, SERVER_FLAGS)
    if any(argument.partition("=")[0] == "--config" for argument in argv):
        from infer.config_file import add_config_file  # YAML's reader is not imported for nothing

        add_config_file(parser, argv)
    args = parser.parse_args(argv)
    if str(args.output_file) == "-":
        raise ValueError("-o must be a file, not -: --resume finds in it what is done")
    return args


def _follow(env: launch.RankEnv) -> NoReturn:
    """Any rank but 0, which reads the command line for all of them."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        sys.exit(0)
    with launch.lasting_imports():
        from infer.process import Process

    Process.join(env)
    raise AssertionError("a follower ends with its rank 0")


class Batch:
    """Rank 0: the engine on the main thread, the batch's requests on an event loop in another.

    Raises ValueError for what the user can mend; whatever fails once requests run ends the process with status 1.
    """

    def __init__(self, env: launch.RankEnv, args: argparse.Namespace) -> None:
        self._env, self._args = env, args
        self._config: EngineConfig = from_args(args, EngineConfig)
        self._server: ServerConfig = from_args(args, ServerConfig)
        # To the engine's thread: Submit and Abort, and at the end None, or why the requests' thread failed.
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._program = f"-m infer.run_batch {shlex.join(sys.argv[1:])}"
        self._process: Process | None = None
        self._output: JsonLines | None = None
        self._deliver: Callable[[list[Output]], object]
        self._total = self._num_done = 0

    def run(self) -> None:
        """Reads both files before anything slow, builds the engine, and answers what is left."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._interrupted)
        args, is_restart = self._args, self._env.restart_count > 0  # torchrun's: what came before is to be kept
        with (
            open_output(args.output_file, args.resume or is_restart) as output,
            contextlib.closing(BatchInput(args.input_file, self._server.max_body_bytes, is_restart)) as source,
        ):
            self._output = output
            if self._env.world_size > 1:  # the other ranks would not wait for ever, and the files may be long
                self._join()
            fingerprints = self._scan(source, output)
            if self._num_done < self._total:
                self._join()
                settings = self._prepare(fingerprints)
                tokenizer = Tokenizer.load(settings.tokenizer_path, chat_template=settings.chat_template)
                engine = self._build()
                self._answer(engine, settings, source, output, tokenizer)
                self._close(engine)
        _say(f"{args.output_file}: all {self._total} requests have their rows")

    def _scan(self, source: BatchInput, output: JsonLines) -> set[str]:
        """Finds out what is left to do; returns the fingerprints of the rows that are there. Raises ValueError."""
        written = WrittenRows(output)
        self._total, self._num_done = source.scan(written)
        if len(written):
            _say(f"{self._num_done} of {self._total} requests have their rows already")
        if len(written) > self._num_done:
            _say(f"warning: {len(written) - self._num_done} rows of {output.path} belong to no request here")
        return written.fingerprints

    # ------------------------------------------------------------------ the start

    def _join(self) -> None:
        """Joins the other ranks, if that is still to be done. Raises ValueError for a layout that does not fit."""
        from infer.parallel.topology import Topology

        if self._process is not None:
            return
        config = self._config
        Topology.resolve(
            self._env.world_size, config.tensor_parallel_size, config.pipeline_parallel_size, self._program
        )
        with launch.lasting_imports():
            from infer.process import Process

        self._process = Process.join(self._env)
        self._process.world.watchdog.phase("reading the batch", slow=True)
        self._process.world.watchdog.before_end(lambda: self._last_words("a rank was lost"))

    def _prepare(self, fingerprints: set[str]) -> FrontendConfig:
        """Checks the model, also against what the output file holds. Raises ValueError."""
        from infer.engine.startup import check
        from infer.hub import served_name
        from infer.models.source import tokenizer_path
        from infer.serve.options import frontend_config

        model_path, _ = check(self._config, self._env.world_size, self._program)
        names = self._server.served_model_name or (served_name(self._config.model),)
        tokenizer_directory = tokenizer_path(self._config, model_path)
        settings = frontend_config(self._config, self._server, names, model_path, tokenizer_directory)
        for other in sorted(fingerprints - {settings.system_fingerprint}):
            raise ValueError(
                f"{self._args.output_file}: holds rows of another model or other settings (system_fingerprint {other}, "
                f"now {settings.system_fingerprint}); give another output file"
            )
        return settings

    def _build(self) -> "Engine":
        assert self._process is not None, "the ranks were joined"
        return self._process.build_engine(self._config)

    # ------------------------------------------------------------------ the work

    def _answer(
        self, engine: "Engine", settings: FrontendConfig, source: BatchInput, output: JsonLines, tokenizer: Tokenizer
    ) -> None:
        """Runs the engine until every request has its row. Ends the process where that fails."""
        rows = (settings, source, output, tokenizer, _hello(engine, settings))
        threading.Thread(target=self._run_rows, args=rows, name="rows", daemon=True).start()
        try:
            self._run_engine(engine)
        except Exception as error:
            self._fail(error)

    def _run_engine(self, engine: "Engine") -> None:
        """Until the requests' thread is done. Raises what ended that thread, or the engine."""
        while True:
            while not (engine.has_work and self._inbox.empty()):
                try:
                    message = self._inbox.get(timeout=1.0)
                except queue.Empty:
                    engine.log_stats()
                    continue
                if isinstance(message, Submit):
                    engine.submit(message.request)
                elif isinstance(message, Abort):
                    engine.abort(message.request_id, message.index)
                elif message is None:
                    return
                else:
                    raise message
            if outputs := engine.step():
                self._deliver(outputs)

    def _run_rows(self, *args: Any) -> None:
        """The thread of the requests. Its end, good or bad, is the last message to the engine's."""
        try:
            asyncio.run(self._rows(*args))
        except BaseException as error:
            self._inbox.put(error)
        else:
            self._inbox.put(None)

    async def _rows(
        self, settings: FrontendConfig, source: BatchInput, output: JsonLines, tokenizer: Tokenizer, hello: Hello
    ) -> None:
        loop, ahead = asyncio.get_running_loop(), rows_ahead(self._config.max_num_seqs)
        engine = LocalEngine(self._inbox.put, ahead)
        # There are no outputs before the first request, which comes from here.
        self._deliver = lambda outputs: loop.call_soon_threadsafe(engine.deliver, outputs)
        progress = Progress(self._total, self._num_done, engine)
        try:
            await BatchRows(source, output, engine, settings, tokenizer, hello, progress, ahead).run()
        finally:
            progress.close()

    # ------------------------------------------------------------------ the end

    def _close(self, engine: "Engine") -> None:
        engine.close()
        assert self._process is not None, "the ranks were joined"
        self._process.engine = None

    def _interrupted(self, number: int, frame: object) -> None:
        if self._process is not None and self._process.world.watchdog.is_any_lost():  # torchrun ends the survivors
            self._process.world.watchdog.lost("another rank has ended, and torchrun ends this one")
        self._end(f"{signal.Signals(number).name} came", 128 + number)

    def _fail(self, error: Exception) -> NoReturn:
        from infer.engine.loop import RankLost

        if isinstance(error, RankLost) and self._process is not None:
            self._process.world.watchdog.lost(str(error))  # which finds out who, and has the last words said
        if not isinstance(error, (OSError, ValueError)):
            traceback.print_exception(error)
        self._end(str(error) or type(error).__name__, 1)

    def _end(self, reason: str, status: int) -> NoReturn:
        """Ends this process at once; the other ranks end with it."""
        if self._process is not None:
            self._process.world.watchdog.stand_down()
        self._last_words(reason)
        os._exit(status)

    def _last_words(self, reason: str) -> None:
        """Has the rows written that are ready. The rest is for the next run."""
        if self._output is not None:
            with contextlib.suppress(OSError):  # which the reason tells
                self._output.flush()
        _say(
            f"the batch was cut off: {reason}. {self._args.output_file} has the rows so far; "
            "run again with --resume (a restart by torchrun does so itself)"
        )


def _hello(engine: "Engine", settings: FrontendConfig) -> Hello:
    """What the requests' thread must know of the engine."""
    return Hello(
        generation=0, model_name=settings.model_names[0], max_model_len=engine.max_model_len,
        vocab_size=engine.model_config.vocab_size, eos_token_ids=list(engine.model_config.eos_token_ids),
        scheduling_policy=engine.config.scheduling_policy,
    )  # fmt: skip


def _say(words: str) -> None:
    print(f"infer: {words}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
