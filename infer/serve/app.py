"""The aiohttp application: the routes of api.py, those about the server itself, errors as JSON. No torch here."""

import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

import infer
from infer.serve.api import Api
from infer.serve.client import EngineClient
from infer.serve.errors import ApiError
from infer.serve.generation import JSON
from infer.serve.link import Hello
from infer.serve.upload import MAX_BODY_BYTES

logger = logging.getLogger("infer.frontend")


def error_response(error: ApiError) -> web.Response:
    """OpenAI's error object as a response."""
    return web.Response(
        status=error.status, body=JSON.encode(error.body()), content_type="application/json", headers=error.headers
    )


@web.middleware
async def errors_as_json(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Whatever goes wrong before a reply has begun is told in OpenAI's form."""
    try:
        return await handler(request)
    except ApiError as error:
        return error_response(error)
    except web.HTTPMethodNotAllowed as error:
        allowed = ", ".join(sorted(error.allowed_methods))
        message = f"{request.method[:20]} is not allowed for {request.path[:100]}; use {allowed}"
        return error_response(ApiError(405, message, code="method_not_allowed", headers={"Allow": allowed}))
    except web.HTTPNotFound:
        return error_response(ApiError(404, f"there is no route {request.path[:100]}", code="not_found"))
    except web.HTTPException as error:
        return error_response(ApiError(error.status, error.reason))
    except ConnectionError:
        raise  # the client is gone; there is nobody to tell
    except Exception:
        logger.exception("Failed to handle %s %s", request.method, request.path[:100])
        return error_response(ApiError(500, "internal error; the server's log has the details", type="server_error"))


class ServerRoutes:
    """The routes that tell about the server and its model. model_path: what /v1/models tells as the model's root."""

    def __init__(self, client: EngineClient, model_path: str) -> None:
        self._client = client
        self._model_path = model_path
        self._created = int(time.time())

    def add_routes(self, router: web.UrlDispatcher) -> None:
        router.add_get("/v1/models", self.models)
        router.add_get("/v1/models/{model:.+}", self.model)
        router.add_get("/health", self.health)
        router.add_get("/version", self.version)

    async def health(self, request: web.Request) -> web.Response:
        """200 once the engine is connected and ready, else 503 with the phase it is in."""
        self._client.ready()
        return web.json_response({"status": "ok"})

    async def version(self, request: web.Request) -> web.Response:
        return web.json_response({"version": infer.__version__})

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [self._model_card(self._client.ready())]})

    async def model(self, request: web.Request) -> web.Response:
        hello = self._client.ready()
        self._client.check_model(request.match_info["model"])
        return web.json_response(self._model_card(hello))

    def _model_card(self, hello: Hello) -> dict[str, Any]:
        return {
            "id": self._client.model_name, "object": "model", "created": self._created, "owned_by": "infer",
            "root": self._model_path, "parent": None, "max_model_len": hello.max_model_len,
        }  # fmt: skip


def make_app(api: Api, routes: ServerRoutes) -> web.Application:
    app = web.Application(middlewares=[errors_as_json], client_max_size=MAX_BODY_BYTES)
    api.add_routes(app.router)
    routes.add_routes(app.router)

    async def close(app: web.Application) -> None:
        api.close()

    app.on_cleanup.append(close)
    return app
