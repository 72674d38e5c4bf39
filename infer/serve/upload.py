"""Reading request bodies: bounded in size, in time and in memory, whatever clients do. No torch here."""

import asyncio

from aiohttp import web

from infer.serve.errors import ApiError, bad_request

MAX_BODY_BYTES = 8 << 20  # unless --max-body-bytes says otherwise
SMALL_BODY_BYTES = 1 << 20  # up to here a body needs no slot, so that slots are held only by clients that do send
MAX_LARGE_BODIES = 16  # read at the same time; together with the largest size this bounds the memory of large uploads
SMALL_BODY_TIMEOUT_S = 60.0  # for the first SMALL_BODY_BYTES
LARGE_STEP_TIMEOUT_S = 15.0  # for each further SMALL_BODY_BYTES
SLOT_TIMEOUT_S = 10.0


class BodyReader:
    """Reads the bodies of all requests of one server. max_body_bytes: the largest it takes."""

    def __init__(self, max_body_bytes: int = MAX_BODY_BYTES) -> None:
        self._max_body_bytes = max_body_bytes
        self._slots = asyncio.Semaphore(MAX_LARGE_BODIES)

    async def read(self, request: web.Request) -> bytes:
        """The JSON body, not parsed. Raises ApiError: 408 too slow, 413 too large, 415 not JSON, 503 no slot free."""
        if request.content_type != "application/json":
            raise ApiError(415, f"send Content-Type: application/json, not {request.content_type[:60]!r}")
        if request.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise ApiError(415, "compressed bodies are not taken; send the JSON as it is")
        self._check_size(request.content_length or 0)
        body = bytearray()
        try:
            if not await self._read_until(request, body, SMALL_BODY_BYTES, SMALL_BODY_TIMEOUT_S):
                await self._read_large(request, body)
        except web.RequestPayloadError as error:
            raise bad_request(f"the body broke off: {error}") from None
        return bytes(body)

    async def _read_large(self, request: web.Request, body: bytearray) -> None:
        """The rest of a body that has more than SMALL_BODY_BYTES. While it waits for a slot, TCP holds the client."""
        try:
            async with asyncio.timeout(SLOT_TIMEOUT_S):
                await self._slots.acquire()
        except TimeoutError:
            message = f"{MAX_LARGE_BODIES} other large bodies are being read; try again, or send less than 1 MiB"
            raise ApiError(503, message, type="service_unavailable", headers={"Retry-After": "5"}) from None
        try:
            while not await self._read_until(request, body, len(body) + SMALL_BODY_BYTES, LARGE_STEP_TIMEOUT_S):
                pass
        finally:
            self._slots.release()

    async def _read_until(self, request: web.Request, body: bytearray, size: int, timeout_s: float) -> bool:
        """Reads on until `body` has more than `size` bytes (False) or is complete (True). Raises ApiError."""
        try:
            async with asyncio.timeout(timeout_s):
                while len(body) <= size:
                    chunk = await request.content.readany()
                    if not chunk:
                        return True
                    body += chunk
                    self._check_size(len(body))
        except TimeoutError:
            raise ApiError(408, f"the body came too slowly: {len(body)} bytes so far", code="timeout") from None
        return False

    def _check_size(self, num_bytes: int) -> None:
        if num_bytes > self._max_body_bytes:
            message = f"the body is over {self._max_body_bytes} bytes (--max-body-bytes)"
            raise ApiError(413, message, code="request_too_large")
