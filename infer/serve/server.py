"""A rank of the server: rank 0 runs the engine's loop, with the frontend at the end of a socket; the others follow.

No torch is imported before it is needed: rank 0 without a fork server starts the frontend first, beside that import.
"""

import dataclasses
import logging
import os
import queue
import shlex
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from infer import launch
from infer.config import EngineConfig, Parser, ServerConfig, add_flags, from_args
from infer.serve.timeline import Timeline
from infer.signals import Order, Orders, hear_signals

if TYPE_CHECKING:
    from infer.engine.loop import Engine
    from infer.parallel.peers import PeerState
    from infer.parallel.watchdog import Watchdog
    from infer.process import Process
    from infer.request import Output
    from infer.serve.attachment import Attachment
    from infer.serve.link import EngineLink, Ranks

logger = logging.getLogger("infer.serve")

PORT_WAIT_SECONDS = 15.0  # after a restart: how long the port may still be held by our previous frontend
NEW_PORT_WAIT_SECONDS = 2.0  # and by that of a torchrun that has just ended
FRONTEND_RESTARTS = 3  # in a row, each within a minute of the last
RANKS_SECONDS = 1.0  # how often the frontend hears how the ranks are
SIGN_SECONDS = 5.0  # how often the frontend hears that a start goes on, however long a phase takes, but this one
JOINING = "joining the world"
TORCHRUN_PATIENCE = ("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30")  # of torchrun: seconds from SIGTERM to SIGKILL
DESCRIPTION = "The OpenAI-compatible server. Every rank of torchrun runs this; rank 0 decides."
STOP_SECONDS = 3.0  # beyond --shutdown-timeout: for the last step, and for all ranks to end


def run(env: launch.RankEnv, timeline: Timeline | None = None) -> None:
    """This rank, until it ends. timeline: of its start so far, where that began before this process."""
    launch.set_process_name(f"infer-rank-{env.rank}")
    if env.rank != 0:
        follow(env)
    try:
        engine_config, server_config = parse(sys.argv[1:])
        Server(env, engine_config, server_config, timeline or Timeline("starting Python")).run()
    except ValueError as error:
        launch.fail(str(error), env)


def parse(argv: list[str]) -> tuple[EngineConfig, ServerConfig]:
    """The command line, and the file it names, as configs. Raises ValueError."""
    # allow_abbrev: an abbreviated --config would be taken for a flag like any other, and its file not be read.
    parser = Parser(prog="python -m infer.serve", description=DESCRIPTION, allow_abbrev=False)
    add_flags(parser, EngineConfig)
    add_flags(parser, ServerConfig)
    if any(argument.partition("=")[0] == "--config" for argument in argv):
        from infer.config_file import add_config_file  # YAML's reader is not imported for nothing

        add_config_file(parser, argv)
    args = parser.parse_args(argv)
    return from_args(args, EngineConfig), from_args(args, ServerConfig)


def follow(env: launch.RankEnv) -> None:
    """Any rank but 0. Rank 0 reads the command line for all of them."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        sys.exit(0)
    with launch.lasting_imports():
        from infer.process import Process

    Process.join(env)


class Server:
    """Rank 0: the engine's loop, with the frontend process at the other end of a socket."""

    def __init__(self, env: launch.RankEnv, config: EngineConfig, server: ServerConfig, timeline: Timeline):
        self._env, self._config, self._server = env, config, server
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._frontend_starts: list[float] = []
        self._timeline = timeline
        self._frontend: Attachment | None = None
        self._phase, self._is_ready = "starting", threading.Event()
        self._watchdog: Watchdog | None = None
        self._process: Process | None = None
        self._orders, self._stopping = Orders(), Order.NONE
        self._end_once = threading.Lock()  # never released
        self._is_connected = threading.Event()  # to the frontend, for the first time

    def run(self) -> NoReturn:
        """Serves until the process is told to end. A user's mistake ends it with one line, anything else in a trace."""
        hear_signals(self._take_signal)
        try:
            engine = self._start()
        except ValueError as error:
            self._fail(error)
        except Exception as error:
            self._crash(error)
        try:
            self._loop(engine)
            self._finish(engine)
        except Exception as error:  # whatever it is, it is not the user's configuration: torchrun starts the ranks anew
            self._crash(error)

    def _start(self) -> "Engine":
        """Everything up to a ready engine. Raises ValueError for what the user can mend.

        What can be wrong with what the user gave is found before anything is loaded; the port too, or soon after, since
        the frontend starts beside this process. A model that is still to be fetched is so once the ranks are joined: it
        may take longer than they would wait unjoined.
        """
        from infer.hub import existing_directory, served_name
        from infer.models.source import tokenizer_path
        from infer.parallel.topology import Topology
        from infer.serve.options import KEY_VARIABLE, read_api_keys, without_secrets

        self._server = dataclasses.replace(self._server, api_key=read_api_keys(self._server) or None)
        os.environ.pop(KEY_VARIABLE, None)  # no process but the frontend needs it, and that one is told
        config, program = self._config, f"-m infer.serve {shlex.join(without_secrets(sys.argv[1:]))}"
        Topology.resolve(self._env.world_size, config.tensor_parallel_size, config.pipeline_parallel_size, program)
        self._names = self._server.served_model_name or (served_name(config.model),)
        model_path = existing_directory(config.model)
        tokenizer_directory = existing_directory(config.tokenizer or config.model)
        if model_path and tokenizer_directory:
            self._prepare_frontend(model_path, tokenizer_directory)
        if "torch" not in sys.modules:  # else this process was forked from one that had imported it
            self._timeline.begin("importing")
        with launch.lasting_imports():
            from infer.engine.loop import Engine
            from infer.engine.startup import check
            from infer.process import Process

        if self._frontend is not None:
            self._timeline.begin("checking the model")
            check(config, self._env.world_size, program)
            self._connect_meanwhile()
        self._begin_phase(JOINING)
        self._process = process = Process.join(self._env)
        self._watchdog = process.world.watchdog
        self._watchdog.before_end(self._leave_frontend)
        self._watchdog.when_ordered(self._take_order)
        if self._frontend is None:
            self._timeline.begin("checking the model")
            model_path, _ = check(config, self._env.world_size, program)
            self._prepare_frontend(model_path, tokenizer_path(config, model_path))
            self._connect_meanwhile()
        engine = Engine(
            process.world,
            process.courier,
            config,
            is_server=True,
            progress=self._begin_phase,
            started=self._say_started,
        )
        self._timeline.begin("connecting to the frontend")
        self._is_connected.wait()
        self._is_ready.set()
        self._say_hello(engine)
        logger.info(self._timeline.line())
        self._check_shutdown_timeout()
        return engine

    def _check_shutdown_timeout(self) -> None:
        asked, given = self._server.shutdown_timeout, float(os.environ.get(*TORCHRUN_PATIENCE))
        if self._env.under_torchrun and asked + STOP_SECONDS > given:
            logger.warning(
                "--shutdown-timeout %g: torchrun kills the ranks %g s after it was told to end, before requests have "
                "had their time; set %s=%.0f for torchrun",
                asked, given, TORCHRUN_PATIENCE[0], asked + STOP_SECONDS + 2,
            )  # fmt: skip

    def _begin_phase(self, phase: str) -> None:
        self._timeline.begin(phase)
        self._phase = phase
        self._say_phase()

    def _say_phase(self) -> None:
        from infer.serve.link import Progress

        if self._is_connected.is_set():
            self._link.send(Progress(phase=self._phase))

    def _leave_to_signal(self) -> None:
        """A start that was broken off by a signal fails in some way: the thread that ends this process may go on."""
        if self._stopping and not self._is_ready.is_set():
            self._end(0)

    def _fail(self, error: ValueError) -> NoReturn:
        """The start failed for what the user gave."""
        self._leave_to_signal()
        self._end_once.acquire()  # the other thread may fail as well, for the frontend that is stopped here
        if self._frontend is not None:
            self._frontend.leave(str(error), final=True)
        launch.fail(str(error), self._env)

    def _crash(self, error: Exception) -> NoReturn:
        from infer.engine.loop import RankLost

        self._leave_to_signal()
        if isinstance(error, RankLost):
            assert self._watchdog is not None, "the world was joined"
            self._watchdog.lost(str(error))
        traceback.print_exception(error)
        self._end(1)

    # ------------------------------------------------------------------ being told to end

    def _take_signal(self, number: signal.Signals) -> None:
        """On the signals' thread. A signal that comes because a rank was lost is no wish of the user's."""
        order = self._orders.take(number)
        if self._watchdog is not None and self._watchdog.is_any_lost():
            self._watchdog.lost("another rank has ended, and torchrun ends this one")
        self._stop(order, f"the server was told to end ({number.name})")

    def _take_order(self, peer: "PeerState") -> None:
        """On the watchdog's thread: another rank has had a signal, maybe from a torchrun that is not this rank's."""
        self._stop(peer.order, f"rank {peer.rank} was told to end")

    def _stop(self, order: Order, reason: str) -> None:
        """Has the frontend end when it is time to, and then this process. A start is broken off."""
        if order <= self._stopping:
            return
        self._stopping = order
        if not self._is_ready.is_set():
            self._end(0, reason)
        from infer.serve.link import Stop

        timeout_s = self._server.shutdown_timeout if order is Order.STOP else 0.0
        self._link.send(Stop(reason=reason, timeout_s=timeout_s))
        late = threading.Timer(timeout_s + STOP_SECONDS, self._end, (1, f"{reason}, and did not come to its end"))
        late.daemon = True
        late.start()

    def _finish(self, engine: "Engine") -> NoReturn:
        """The frontend has told every client: all ranks end, with status 0."""
        assert self._process is not None, "the world was joined"
        engine.close()
        self._process.leave()
        logger.info("All ranks have ended their work")
        self._end(0, "the server has ended")

    # ------------------------------------------------------------------ serving

    def _loop(self, engine: "Engine") -> None:
        """Until the frontend has ended, after it was told to stop."""
        from infer.serve.link import Bye, Closed

        while True:
            while not (engine.has_work and self._inbox.empty()):
                try:
                    message = self._inbox.get(timeout=1.0)
                except queue.Empty:
                    engine.log_stats()
                else:
                    if self._stopping and isinstance(message, (Closed, Bye)):
                        return
                    self._handle_message(engine, message)
                if not engine.has_work:  # else the figures mean more after the step that schedules it
                    self._send_stats(engine)
            if outputs := engine.step():
                self._send_outputs(outputs)
            self._send_stats(engine)

    def _send_outputs(self, outputs: "list[Output]") -> None:
        from infer.serve.link import Outputs

        self._link.send(Outputs(items=outputs, generation=self._env.restart_count))

    def _send_stats(self, engine: "Engine") -> None:
        if engine.stats_due:
            self._link.send(engine.stats_message())

    def _handle_message(self, engine: "Engine", message: Any) -> None:
        from infer.request import FinishReason, Output, check_request
        from infer.serve.link import Abort, Bye, Closed, Submit

        if isinstance(message, Submit):
            request = message.request
            try:
                check_request(request, engine.model_config.vocab_size, engine.max_model_len)
                engine.submit(request, message.alone)
            except ValueError as error:  # the frontend has checked already: this is its bug, not the user's
                logger.error("request %s refused: %s", request.request_id, error)
                ended = [
                    Output(
                        request_id=request.request_id, index=i, finish_reason=FinishReason.ERROR, error=str(error)
                    )
                    for i in request.choices
                ]  # fmt: skip
                self._send_outputs(ended)
        elif isinstance(message, Abort):
            engine.abort(message.request_id, message.index)
        elif isinstance(message, (Closed, Bye)):
            self._replace_frontend(engine, message.reason)

    # ------------------------------------------------------------------ the frontend

    def _prepare_frontend(self, model_path: Path, tokenizer_path: Path) -> None:
        """Finds the frontend, or starts one. Raises ValueError."""
        from infer.serve.attachment import Attachment
        from infer.serve.identity import identity
        from infer.serve.options import frontend_config

        self._frontend_starts.append(time.monotonic())
        port_wait = PORT_WAIT_SECONDS if self._env.restart_count else 0.0
        if self._env.under_torchrun:
            port_wait = max(port_wait, NEW_PORT_WAIT_SECONDS)
        settings = frontend_config(self._config, self._server, self._names, model_path, tokenizer_path, port_wait)
        settings = dataclasses.replace(settings, identity=identity(self._config, settings))
        self._frontend = Attachment(self._env, settings, self._inbox.put)
        self._frontend.prepare()

    def _connect_meanwhile(self) -> None:
        """Connects to the frontend, once that has started, and from then on tells it that the start goes on."""

        def connect(frontend: "Attachment") -> None:
            try:
                frontend.connect()
            except ValueError as error:
                self._fail(error)
            except Exception as error:
                self._crash(error)
            self._is_connected.set()
            self._say_phase()
            self._say_on()

        threading.Thread(target=connect, args=(self._frontend,), name="signs", daemon=True).start()

    def _say_on(self) -> None:
        """Tells the frontend how the ranks are, whatever the main loop does, and that a start goes on."""
        said = time.monotonic()
        while True:
            time.sleep(RANKS_SECONDS)
            if self._watchdog is not None:
                self._link.send(ranks_message(self._watchdog.table()))
            # To wait for a node that may never come is no progress.
            is_starting = not self._is_ready.is_set() and self._phase != JOINING
            if is_starting and time.monotonic() - said >= SIGN_SECONDS:
                said = time.monotonic()
                self._say_phase()

    def _say_started(self, request_ids: list[str]) -> None:
        from infer.serve.link import Started

        self._link.send(Started(request_ids=request_ids))

    @property
    def _link(self) -> "EngineLink":
        assert self._frontend is not None
        return self._frontend.link

    def _say_hello(self, engine: "Engine") -> None:
        from infer.serve.link import Hello

        self._link.send(
            Hello(
                generation=self._env.restart_count,
                model_name=self._names[0],
                max_model_len=engine.max_model_len,
                vocab_size=engine.model_config.vocab_size,
                eos_token_ids=list(engine.model_config.eos_token_ids),
                scheduling_policy=engine.config.scheduling_policy,
                num_ranks=self._env.world_size,
                num_stages=engine.config.pipeline_parallel_size,
                num_kv_blocks=engine.built.num_blocks,
                block_size=engine.config.block_size,
            )
        )

    def _replace_frontend(self, engine: "Engine", reason: str) -> None:
        """The frontend is gone, and with it its clients' connections, or it does not want this engine: get another."""
        from infer.serve.link import Stop

        assert self._frontend is not None
        lost = list(engine.scheduler.unfinished())
        for request_id in lost:
            engine.abort(request_id)
        logger.error("%s; %d requests were lost; starting another frontend", reason, len(lost))
        self._link.close()
        while not self._inbox.empty():  # what the old frontend still wanted
            self._inbox.get()
        recent = [at for at in self._frontend_starts if time.monotonic() - at < 60.0]
        if len(recent) > FRONTEND_RESTARTS:
            raise RuntimeError(f"the frontend process ended {len(recent)} times within a minute; giving up")
        self._frontend_starts.append(time.monotonic())
        self._frontend.replace()
        self._say_hello(engine)
        if self._stopping:  # meanwhile: there was none to tell
            self._link.send(Stop(reason="the server was told to end", timeout_s=0.0))

    def _leave_frontend(self, reason: str = "another rank is lost") -> None:
        if self._frontend is not None:
            # During a start nobody can tell yet whose wish a signal is; the frontend then goes by torchrun's end.
            self._frontend.leave(reason, final=bool(self._stopping) and self._is_ready.is_set())

    def _end(self, status: int, reason: str = "rank 0 crashed") -> NoReturn:
        """Ends this process now. Without torchrun the frontend ends with it; else that waits for the next, or for
        torchrun's end, unless it was told to stop. Of several threads that call this the first one goes on.
        """
        self._end_once.acquire()
        if self._watchdog is not None:
            self._watchdog.stand_down()  # torchrun ends the other ranks as well
        self._leave_frontend(reason)
        sys.stderr.flush()
        os._exit(status)


def ranks_message(table: "list[PeerState]") -> "Ranks":
    """The watchdog's table for the frontend. Hosts and places in the program are for the log, not for clients."""
    from infer.serve.link import Ranks, RankState

    return Ranks(
        items=[
            RankState(
                rank=peer.rank, phase=peer.phase, step=peer.step, busy=peer.work_out,
                phase_seconds=peer.phase_seconds, age_seconds=peer.age_seconds,
            )
            for peer in table
        ]
    )  # fmt: skip

