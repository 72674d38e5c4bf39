"""The routes that generate: what intake.py made of a body runs, and becomes a reply or a stream. No torch here."""

import uuid

from aiohttp import web

from infer.serve.client import EngineClient
from infer.serve.expect import AskingRouter
from infer.serve.generation import Generation, reply_stream, reply_whole
from infer.serve.intake import Intake, TakeIn
from infer.serve.link import FrontendConfig
from infer.serve.offload import Offload
from infer.serve.request_log import log_request
from infer.serve.schema import REQUEST_ID, SamplingBody
from infer.serve.text import Tokenizer
from infer.serve.tokenize import TokenizeRoutes
from infer.serve.upload import BodyReader

REQUEST_ID_HEADER = "X-Request-Id"


class Api:
    """The routes that work with the model's text, over one tokenizer and one engine.

    num_taking_in: requests whose bodies are read and understood. num_open: generations under way. settings: what the
    server's flags say.
    """

    def __init__(self, client: EngineClient, tokenizer: Tokenizer, settings: FrontendConfig) -> None:
        self.num_taking_in = self.num_open = 0
        self._settings = settings
        self._client = client
        self._tokenizer = tokenizer
        self._offload = Offload()
        self._bodies = BodyReader(settings.max_body_bytes)
        self._intake = Intake(tokenizer, settings, self._offload)
        self._tokenize = TokenizeRoutes(client, tokenizer, self._intake.prompting, self._bodies, self._offload)

    def add_routes(self, router: AskingRouter) -> None:
        router.add_post("/v1/completions", self.completions)
        router.add_post("/v1/chat/completions", self.chat_completions)
        self._tokenize.add_routes(router)

    def close(self) -> None:
        """Ends the threads that heavy work was done in, and the process that checks grammars."""
        self._offload.close()
        self._intake.close()

    async def completions(self, http: web.Request) -> web.StreamResponse:
        return await self._generate(http, self._intake.completion)

    async def chat_completions(self, http: web.Request) -> web.StreamResponse:
        return await self._generate(http, self._intake.chat)

    async def _generate(self, http: web.Request, take_in: TakeIn) -> web.StreamResponse:
        self._client.check_open()
        hello = self._client.ready()
        self.num_taking_in += 1
        try:
            taken = await take_in(await self._bodies.read(http), hello, lambda body: _base_id(http, body))
        finally:
            self.num_taking_in -= 1
        body, reply = taken.body, taken.reply
        if self._settings.enable_log_requests:
            log_request(http.path, reply.id, taken.requests)
        # The transport's buffer is what a slow client fills; aborting it ends a write that waits for it.
        abort = http.transport.abort if body.stream and http.transport is not None else None
        timeout_s = self._settings.request_timeout
        generation = Generation(
            self._client, body, taken.prompts, taken.requests, self._tokenizer, abort, timeout_s, taken.frames
        )  # fmt: skip
        del taken  # its frames: nobody needs them again, however long the reply takes
        self.num_open += 1
        try:
            if body.stream:
                return await reply_stream(http, body, generation, reply, self._offload)
            return await reply_whole(http, generation, reply, self._offload)
        finally:  # also where the client has gone, which cancels this task
            self.num_open -= 1
            generation.close()


def _base_id(http: web.Request, body: SamplingBody) -> str:
    """What the reply's id ends in: the body's request_id, the X-Request-Id header if it can stand in one, or a new one.

    It is left in http["request_id"], for the headers and the log.
    """
    header = http.headers.get(REQUEST_ID_HEADER, "")
    http["request_id"] = body.request_id or (header if REQUEST_ID.fullmatch(header) else uuid.uuid4().hex)
    return http["request_id"]
