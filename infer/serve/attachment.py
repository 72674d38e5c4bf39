"""Rank 0's end of the frontend: found or started, connected, replaced, left. No torch here.

Under torchrun there is one frontend for all generations of ranks: the first rank 0 starts it, later ones find it by its
claim. Without torchrun it is this process's own and ends with it.
"""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

from infer.claim import SOCKET_NAME, agent_directory, claim
from infer.launch import RankEnv
from infer.serve.link import Bye, Closed, EngineLink, FrontendConfig, Message
from infer.serve.spawn import FrontendHandle, spawn_frontend

FIND_SECONDS = 30.0  # a frontend that is there but does not answer is starting or ending; both take less
FIND_POLL_SECONDS = 0.05
LEAVE_SECONDS = 0.2  # last words may take so long
FRONTEND = "frontend"
STOP_SECONDS = 5.0  # a frontend of this process's own may take so long to tell its clients


class Attachment:
    """inbox_put: gets what the frontend sends, as EngineLink has it."""

    def __init__(self, env: RankEnv, settings: FrontendConfig, inbox_put: Callable[[Message | Closed], None]) -> None:
        """settings: with the identity of what this process serves."""
        self._env, self._inbox_put = env, inbox_put
        self._settings = dataclasses.replace(settings, agent_pid=env.agent_pid)
        self._handle: FrontendHandle | None = None  # where this process started it
        self._link: EngineLink | None = None

    def prepare(self) -> None:
        """Starts the frontend, which takes a second, unless there is one. Raises ValueError."""
        self._handle = None
        if not self._env.agent_pid:
            self._handle = spawn_frontend(self._settings)
            return
        try:
            directory = agent_directory(self._env.agent_pid, FRONTEND)
            lock_fd = claim(directory)
        except OSError as error:
            raise ValueError(f"no directory for the engine's socket: {error}; set TMPDIR to another") from None
        if lock_fd is not None:
            self._handle = spawn_frontend(self._settings, directory, lock_fd)

    def connect(self) -> None:
        """Waits for the frontend and connects to it. Raises ValueError where it cannot start, ConnectionError."""
        deadline = time.monotonic() + FIND_SECONDS
        while True:
            if self._handle is not None:
                self._handle.wait_ready()
            try:
                self._link = EngineLink.connect(
                    self._socket_path(), self._inbox_put, generation=self._env.restart_count,
                    identity=self._settings.identity,
                )  # fmt: skip
                return
            except ConnectionError:
                if self._handle is not None or time.monotonic() > deadline:
                    raise
            time.sleep(FIND_POLL_SECONDS)
            self.prepare()  # it may have ended meanwhile

    def _socket_path(self) -> Path:
        if self._handle is not None:
            return self._handle.socket_path
        return agent_directory(self._env.agent_pid, FRONTEND) / SOCKET_NAME

    @property
    def link(self) -> EngineLink:
        assert self._link is not None, "connect() comes first"
        return self._link

    def replace(self) -> None:
        """After the frontend is gone, or has turned this engine away: another, or the same again if it lives on."""
        self.link.close()  # the caller may have done so
        if self._handle is not None and (not self._env.agent_pid or self._handle.poll() is not None):
            self._handle.stop()
        self.prepare()
        self.connect()

    def leave(self, reason: str, final: bool = False) -> None:
        """This process is going to end; and with final, or without torchrun, the frontend too. May be called twice."""
        is_own = not self._env.agent_pid
        if self._link is not None:
            self._link.send(Bye(reason=reason, final=final or is_own))
            self._link.close(LEAVE_SECONDS)
        if is_own and self._handle is not None:
            # Without a link it has no clients; with one it ends by itself, and a signal might come at its very end.
            self._handle.stop(STOP_SECONDS, ask=self._link is None)
