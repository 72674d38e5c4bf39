"""CORS: which web pages a browser lets call this server (--allowed-origins). No torch here."""

from collections.abc import Sequence

from aiohttp import web
from multidict import CIMultiDict

PREFLIGHT_MAX_AGE_S = 600
ALLOWED_METHODS = "GET, POST, OPTIONS"
ALLOWED_HEADERS = "Authorization, Content-Type, X-Request-Id"
EXPOSED_HEADERS = "X-Request-Id, Retry-After"


class Cors:
    """Adds the headers that let the pages of some origins read replies, and answers browsers that ask beforehand.

    Keys travel in a header that the page itself sets, never in a cookie, so no credentials are allowed.
    """

    def __init__(self, origins: Sequence[str]) -> None:
        self._any = "*" in origins
        self._origins = frozenset(origins)

    def headers(self, request: web.BaseRequest) -> dict[str, str]:
        """What a reply to this request needs; nothing where its origin is not allowed."""
        origin = request.headers.get("Origin")
        if not self._origins or origin is None:
            return {}
        if self._any:
            return {"Access-Control-Allow-Origin": "*", "Access-Control-Expose-Headers": EXPOSED_HEADERS}
        vary = {"Vary": "Origin"}  # a cache must not give this origin's reply to another
        if origin not in self._origins:
            return vary
        return {"Access-Control-Allow-Origin": origin, "Access-Control-Expose-Headers": EXPOSED_HEADERS, **vary}

    def is_preflight(self, request: web.Request) -> bool:
        """Whether a browser asks if it may send another request. It carries no key, whatever the other one will."""
        return (
            bool(self._origins) and request.method == "OPTIONS" and "Origin" in request.headers
            and "Access-Control-Request-Method" in request.headers
        )  # fmt: skip

    def preflight(self, request: web.Request) -> web.Response:
        """The answer to a preflight; one without permission where the origin is not allowed. The headers of every
        reply come later."""
        headers: CIMultiDict[str] = CIMultiDict()
        if self._any or request.headers["Origin"] in self._origins:
            headers["Access-Control-Allow-Methods"] = ALLOWED_METHODS
            headers["Access-Control-Allow-Headers"] = ALLOWED_HEADERS
            headers["Access-Control-Max-Age"] = str(PREFLIGHT_MAX_AGE_S)
        return web.Response(status=204, headers=headers)
