"""Who may call: API keys as bearer tokens. No torch here."""

import hashlib
import hmac
from collections.abc import Sequence

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from infer.serve.errors import ApiError

OPEN_PATHS = frozenset({"/health", "/ready", "/ping"})  # for those who watch the server; they tell nothing of requests


class ApiKeys:
    """The check of every request against the server's keys."""

    def __init__(self, keys: Sequence[str], root_path: str = "") -> None:
        self._digests = [_digest(key.encode()) for key in keys]
        self._root_path = root_path

    def accepts(self, key: str) -> bool:
        """Whether this is one of the keys. The time it takes tells neither how much of it is right nor which key."""
        presented = _digest(key.encode("utf-8", "surrogateescape"))
        found = False
        for digest in self._digests:
            found |= hmac.compare_digest(presented, digest)
        return found

    def check(self, request: web.Request) -> None:
        """Raises ApiError (401) unless the request may be served."""
        path = request.path
        if self._root_path and path.startswith(self._root_path + "/"):
            path = path[len(self._root_path) :]
        if not self._digests or path in OPEN_PATHS:
            return
        scheme, _, key = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() == "bearer" and self.accepts(key.strip()):
            return
        missing = "the request has no API key; send it as `Authorization: Bearer KEY`"
        wrong = "the API key is not one of this server's"
        raise ApiError(
            401, wrong if scheme else missing, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"}
        )


def _digest(key: bytes) -> bytes:
    """Of one length whatever the key's, so that comparing takes the same time."""
    return hashlib.sha256(key).digest()


def guard(keys: ApiKeys) -> Middleware:
    """A middleware that lets only requests with a key through."""

    @web.middleware
    async def check_key(request: web.Request, handler: Handler) -> web.StreamResponse:
        keys.check(request)
        return await handler(request)

    return check_key
