"""The aiohttp application: the routes of api.py, those about the server itself, errors as JSON. No torch here."""

import logging
import time
import uuid
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

import infer
from infer.serve import metrics, openapi
from infer.serve.api import REQUEST_ID_HEADER, Api
from infer.serve.auth import ApiKeys, guard
from infer.serve.client import EngineClient
from infer.serve.cors import Cors
from infer.serve.errors import ApiError
from infer.serve.expect import AskingRouter
from infer.serve.generation import JSON
from infer.serve.link import FrontendConfig, Hello
from infer.serve.metrics import Metrics
from infer.serve.schema import REQUEST_ID

logger = logging.getLogger("infer.frontend")


def error_response(error: ApiError) -> web.Response:
    """OpenAI's error object as a response."""
    return web.Response(
        status=error.status, body=JSON.encode(error.body()), content_type="application/json", headers=error.headers
    )


@web.middleware
async def errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Whatever goes wrong before a reply has begun is told in OpenAI's form."""
    try:
        return await handler(request)
    except ApiError as error:
        return error_response(error)
    except web.HTTPMethodNotAllowed as error:
        allowed = ", ".join(sorted({*error.allowed_methods, "OPTIONS"}))
        if request.method == "OPTIONS":
            return web.Response(status=204, headers={"Allow": allowed})
        usable = ", ".join(sorted(error.allowed_methods))
        message = f"{request.method[:20]} is not allowed for {request.path[:100]}; use {usable}"
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
    """The routes that tell about the server and its model."""

    def __init__(self, client: EngineClient, settings: FrontendConfig, metrics: Metrics) -> None:
        self._client = client
        self._model_path = settings.model_path
        self._metrics = metrics
        self._created = int(time.time())
        document = openapi.document(
            model_names=settings.model_names, max_logprobs=settings.max_logprobs, root_path=settings.root_path,
            secured=bool(settings.api_key),
        )  # fmt: skip
        self._document = JSON.encode(document)

    def add_routes(self, router: AskingRouter) -> None:
        router.add_get("/v1/models", self.models)
        router.add_get("/v1/models/{model:.+}", self.model)
        router.add_get("/health", self.health)
        router.add_get("/ready", self.is_ready)
        router.add_get("/ping", self.ping)
        router.add_post("/ping", self.ping)
        router.add_get("/version", self.version)
        router.add_get("/load", self.load)
        router.add_get("/metrics", self.metrics)
        router.add_get("/openapi.json", self.document)

    async def health(self, request: web.Request) -> web.Response:
        """200 while every rank is heard from, else 503 with the rank, or with the phase of a start-up; and every rank's
        state in either case, as far as it is known."""
        known = {"phase": self._client.phase, "ranks": self._ranks()}
        try:
            self._client.check_alive()
        except ApiError as error:
            return web.json_response({**error.body(), **known}, status=error.status, headers=error.headers)
        return web.json_response({"status": "stopping" if self._client.stop_reason else "ok", **known})

    def _ranks(self) -> list[dict[str, Any]]:
        since = time.monotonic() - self._client.ranks_time
        return [
            {
                "rank": state.rank, "phase": state.phase, "step": None if state.step < 0 else state.step,
                "busy": state.busy, "seconds_in_phase": round(state.phase_seconds + state.age_seconds + since, 1),
                "seconds_since_heard": round(state.age_seconds + since, 1),
            }
            for state in self._client.ranks
        ]  # fmt: skip

    async def ping(self, request: web.Request) -> web.Response:
        """As /health, without a word: what SageMaker asks."""
        self._client.check_alive()
        return web.Response()

    async def is_ready(self, request: web.Request) -> web.Response:
        """200 while the engine takes requests: not during a start or restart, and not once the server is ending."""
        self._client.check_open()
        self._client.check_up()
        return web.json_response({"status": "ready"})

    async def version(self, request: web.Request) -> web.Response:
        return web.json_response({"version": infer.__version__})

    async def load(self, request: web.Request) -> web.Response:
        """How many requests the engine works on, for those who balance load."""
        return web.json_response({"server_load": self._client.num_jobs})

    async def metrics(self, request: web.Request) -> web.Response:
        return web.Response(body=self._metrics.render(), headers={"Content-Type": metrics.CONTENT_TYPE})

    async def document(self, request: web.Request) -> web.Response:
        return web.Response(body=self._document, content_type="application/json")

    async def models(self, request: web.Request) -> web.Response:
        hello = self._client.ready()
        cards = [self._model_card(name, hello) for name in self._client.model_names]
        return web.json_response({"object": "list", "data": cards})

    async def model(self, request: web.Request) -> web.Response:
        hello, name = self._client.ready(), request.match_info["model"]
        self._client.check_model(name)
        return web.json_response(self._model_card(name, hello))

    def _model_card(self, name: str, hello: Hello) -> dict[str, Any]:
        return {
            "id": name, "object": "model", "created": self._created, "owned_by": "infer",
            "root": self._model_path, "parent": None, "max_model_len": hello.max_model_len,
        }  # fmt: skip


def make_app(api: Api, routes: ServerRoutes, settings: FrontendConfig, figures: Metrics) -> web.Application:
    """The application, whose routes answer under the root path as well."""
    cors = Cors(settings.allowed_origins or ())
    keys = ApiKeys(settings.api_key or (), settings.root_path)
    middlewares: list[Middleware] = [metrics.http_metrics(figures), errors_as_json, answer_preflight(cors), guard(keys)]
    app = web.Application(middlewares=middlewares, client_max_size=settings.max_body_bytes)
    asking = AskingRouter(app.router, keys.check, error_response)
    api.add_routes(asking)
    routes.add_routes(asking)
    if settings.root_path:
        under_root = web.Application()
        asking = AskingRouter(under_root.router, keys.check, error_response)
        api.add_routes(asking)
        routes.add_routes(asking)
        app.add_subapp(settings.root_path, under_root)

    async def add_headers(request: web.Request, response: web.StreamResponse) -> None:
        """Of every reply, errors and streams too."""
        response.headers.extend(cors.headers(request))
        if settings.enable_request_id_headers:
            response.headers.setdefault(REQUEST_ID_HEADER, request.get("request_id") or _request_id(request))

    async def close(app: web.Application) -> None:
        api.close()

    app.on_response_prepare.append(add_headers)
    app.on_cleanup.append(close)
    return app


def answer_preflight(cors: Cors) -> Middleware:
    """The middleware that answers browsers which ask whether they may send a request."""

    @web.middleware
    async def preflight(request: web.Request, handler: Handler) -> web.StreamResponse:
        return cors.preflight(request) if cors.is_preflight(request) else await handler(request)

    return preflight


def _request_id(request: web.Request) -> str:
    """The client's own, where it is one that may stand in a log; else a new one."""
    given = request.headers.get(REQUEST_ID_HEADER, "")
    return given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
