"""POST /tokenize and POST /detokenize: what the tokenizer makes of a text, as vLLM has them. No torch here."""

from typing import Any

from aiohttp import web

from infer.serve.client import EngineClient
from infer.serve.errors import bad_request
from infer.serve.expect import AskingRouter
from infer.serve.generation import JSON
from infer.serve.offload import INLINE_BYTES, Offload
from infer.serve.prompting import Prompting
from infer.serve.schema_tokenize import TokenizeChatBody, TokenizeTextBody, parse_detokenize, parse_tokenize
from infer.serve.text import Tokenizer
from infer.serve.upload import BodyReader

MAX_CHARS = 1 << 20  # of a text to tokenize: it need not fit the model's context, to see by how much it does not
MAX_INLINE_TOKENS = 2000  # more are decoded, or spelled one by one, off the event loop
MAX_INLINE_ENTRIES = 20_000  # larger replies become JSON there


class TokenizeRoutes:
    """Both routes over one tokenizer."""

    def __init__(
        self, client: EngineClient, tokenizer: Tokenizer, prompting: Prompting, bodies: BodyReader, offload: Offload
    ) -> None:
        self._client = client
        self._tokenizer = tokenizer
        self._prompting = prompting
        self._bodies = bodies
        self._offload = offload

    def add_routes(self, router: AskingRouter) -> None:
        router.add_post("/tokenize", self.tokenize)
        router.add_post("/detokenize", self.detokenize)

    async def tokenize(self, request: web.Request) -> web.Response:
        """The token ids a generating route would work on: of a text, or of a conversation in the chat template."""
        hello = self._client.ready()
        data = await self._bodies.read(request)
        body = await self._offload.run(len(data) > INLINE_BYTES, lambda: parse_tokenize(data))
        self._client.check_model(body.model)
        [token_ids] = await self._prompting.encode([await self._text(body, len(data))], body.add_special_tokens)
        strings = await self._strings(token_ids) if body.return_token_strs else None
        return await self._reply(
            {
                "count": len(token_ids), "max_model_len": hello.max_model_len, "tokens": token_ids,
                "token_strs": strings,
            }
        )  # fmt: skip

    async def detokenize(self, request: web.Request) -> web.Response:
        """The text that token ids stand for, special tokens included."""
        hello = self._client.ready()
        data = await self._bodies.read(request)
        body = await self._offload.run(len(data) > INLINE_BYTES, lambda: parse_detokenize(data))
        self._client.check_model(body.model)
        heavy = len(body.tokens) > MAX_INLINE_TOKENS
        text = await self._offload.run(heavy, lambda: self._decode(body.tokens, hello.vocab_size))
        return await self._reply({"prompt": text})

    def _decode(self, tokens: list[int], vocab_size: int) -> str:
        low, high = min(tokens, default=0), max(tokens, default=0)
        if low < 0 or high >= vocab_size:
            bad = low if low < 0 else high
            raise bad_request(f"tokens holds {bad}; the vocabulary has ids 0 to {vocab_size - 1}", "tokens")
        return self._tokenizer.decode(tokens, skip_special_tokens=False)

    async def _text(self, body: TokenizeTextBody | TokenizeChatBody, num_bytes: int) -> str:
        if isinstance(body, TokenizeTextBody):
            _check_chars(len(body.prompt), "prompt")
            return body.prompt
        chat = await self._offload.run(num_bytes > INLINE_BYTES, body.chat)
        _check_chars(await self._prompting.chat_chars(chat, num_bytes), "messages")
        text = await self._prompting.render_chat(chat, num_bytes)
        _check_chars(len(text), "messages")
        return text

    async def _strings(self, token_ids: list[int]) -> list[str]:
        """Each token as the vocabulary spells it, as in vLLM."""
        heavy = len(token_ids) > MAX_INLINE_TOKENS
        return await self._offload.run(heavy, lambda: list(map(self._tokenizer.vocabulary.piece, token_ids)))

    async def _reply(self, value: dict[str, Any]) -> web.Response:
        heavy = len(value.get("tokens") or value.get("prompt") or ()) > MAX_INLINE_ENTRIES
        data = await self._offload.run(heavy, lambda: JSON.encode(value))
        return web.Response(body=data, content_type="application/json")


def _check_chars(size: int, name: str) -> None:
    if size > MAX_CHARS:
        raise bad_request(f"{name} has {size} characters; this route takes {MAX_CHARS}", name)
