"""Clients that ask before they send a body (`Expect: 100-continue`, RFC 9110 10.1.1). No torch here."""

import functools
from collections.abc import Callable

from aiohttp import web
from aiohttp.typedefs import Handler

from infer.serve.errors import ApiError

# What may refuse a request by its head alone: raises ApiError.
Check = Callable[[web.Request], None]


class AskingRouter:
    """Adds routes to a router whose answer to Expect is ours: aiohttp asks for the body before any middleware runs, so
    that a client without a key would be invited to send one, and refuses other expectations in plain text."""

    def __init__(self, router: web.UrlDispatcher, check: Check, refuse: Callable[[ApiError], web.Response]) -> None:
        self._router = router
        self._answer = functools.partial(_answer, check, refuse)

    def add_get(self, path: str, handler: Handler) -> None:
        self._router.add_get(path, handler, expect_handler=self._answer)

    def add_post(self, path: str, handler: Handler) -> None:
        self._router.add_post(path, handler, expect_handler=self._answer)


async def _answer(
    check: Check, refuse: Callable[[ApiError], web.Response], request: web.Request
) -> web.StreamResponse | None:
    """The refusal, or None once the client was told to go on."""
    try:
        expected = request.headers.get("Expect", "")
        if expected.lower() != "100-continue":
            raise ApiError(417, f"Expect may be 100-continue, not {expected[:40]!r}", code="expectation_failed")
        check(request)
    except ApiError as error:
        return refuse(error)
    await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    request.writer.output_size = 0  # the reply proper has not begun
    return None
