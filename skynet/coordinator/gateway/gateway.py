"""The HTTP server on the coordinator's event loop: its socket, its routes, its guards, its start and end."""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
import time
from collections.abc import Callable, Generator
from typing import Final

import uvicorn
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from skynet.coordinator.engine import Engine
from skynet.coordinator.gateway import openai, tgi
from skynet.coordinator.gateway.config import GatewayConfig
from skynet.coordinator.gateway.desk import ClientGone, Desk, Room
from skynet.coordinator.gateway.errors import ApiError, openai_body
from skynet.coordinator.gateway.guards import Guard
from skynet.coordinator.gateway.metrics import Metrics
from skynet.coordinator.gateway.reply import CLIENT_CLOSED
from skynet.coordinator.gateway.served_names import ServedName
from skynet.coordinator.replica import Phase
from skynet.errors import ConfigError
from skynet.protocol.addresses import format_endpoint
from skynet.protocol.ids import PeerId
from skynet.protocol.messages import ToClient

logger = logging.getLogger(__name__)
DIALECTS: Final[tuple[Callable[[Desk, ServedName], APIRouter], ...]] = (
    openai.routes,
    tgi.routes,
)  # here dialects are added
STOP_S: Final = 2  # for answers under way to end with an error when the coordinator stops


class Gateway:
    """Binds its port when made; `run` serves, `close` gives the port back."""

    def __init__(self, config: GatewayConfig, engine: Engine) -> None:
        """Raises ConfigError if the port can't be had."""
        self._socket = listen(config)
        self._engine = engine
        self.url = f"http://{format_endpoint(config.host, self._socket.getsockname()[1])}"
        room = Room(engine.config.max_requests, engine.config.max_node_requests)
        metrics = Metrics(engine)
        self.desk = Desk(engine, config, room, metrics.answered)
        served = ServedName.of(engine.model, int(time.time()))
        app = application(self.desk, served, self._why_not_ready)
        app.include_router(metrics.routes())
        self._server = _Server(
            uvicorn.Config(
                guarded(app, config),
                log_config=None,
                log_level=logging.WARNING,
                access_log=False,
                lifespan="off",
                ws="none",
                proxy_headers=False,
                server_header=False,
                timeout_graceful_shutdown=STOP_S,
                limit_concurrency=config.max_connections,
            )
        )

    def owns(self, client: PeerId) -> bool:
        """Whether the engine's client is one of ours."""
        return self.desk.owns(client)

    def tell(self, client: PeerId, message: ToClient) -> bool:
        """From the engine to one of ours. False: it doesn't read."""
        return self.desk.tell(client, message)

    async def run(self) -> None:
        """Until cancelled."""
        logger.info("gateway ready url=%s", self.url)
        try:
            await self._server.serve(sockets=[self._socket])
        finally:
            self.desk.stop()
            if self._server.started:
                await self._server.shutdown(sockets=[self._socket])

    def close(self) -> None:
        """Twice is fine."""
        self._socket.close()

    def _why_not_ready(self) -> str | None:
        if any(replica.phase is Phase.SERVING for replica in self._engine.replicas):
            return None
        return self._engine.why_waiting or "no replica serves"


class _Server(uvicorn.Server):
    """Signals are the coordinator's."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


def guarded(app: ASGIApp, config: GatewayConfig) -> ASGIApp:
    """Nothing passes that the guard refuses, whatever the route."""
    guard = Guard.of(config.host, config.names)

    async def checked(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            guard.check(scope["method"], scope["scheme"], scope["headers"])
        except ApiError as exc:
            logger.warning("refused code=%s method=%s", exc.code, scope["method"][:16])
            await as_response(exc)(scope, receive, send)
        else:
            await app(scope, receive, send)

    return checked


def application(desk: Desk, served: ServedName, why_not_ready: Callable[[], str | None]) -> FastAPI:
    """All routes. Without pages of documentation: they load scripts from elsewhere."""
    app = FastAPI(title="SkyNet", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    for dialect in DIALECTS:
        app.include_router(dialect(desk, served))

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready", response_model=None)
    async def ready() -> Response:
        why = why_not_ready()
        return JSONResponse({"status": why or "ok"}, 503 if why else 200)

    @app.exception_handler(ApiError)
    async def refused(_: Request, exc: Exception) -> Response:
        assert isinstance(exc, ApiError)
        return as_response(exc)

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, exc: Exception) -> Response:
        assert isinstance(exc, HTTPException)
        return as_response(ApiError(exc.status_code, f"{request.method[:16]} {request.url.path[:200]}: {exc.detail}"))

    @app.exception_handler(ClientGone)
    async def gone(_: Request, __: Exception) -> Response:
        return Response(status_code=CLIENT_CLOSED)

    @app.exception_handler(Exception)
    async def failed(_: Request, exc: Exception) -> Response:
        """A bug of ours; the server logs it with its traceback."""
        return as_response(ApiError(500, f"the gateway failed at this: {type(exc).__name__}"))

    return app


def as_response(error: ApiError) -> Response:
    """In the form that OpenAI's clients know."""
    return JSONResponse(openai_body(error), error.status, error.headers)


def listen(config: GatewayConfig) -> socket.socket:
    """A port that nobody chose may be another if it is taken. Raises ConfigError."""
    try:
        return _bound(config.host, config.port)
    except OSError as exc:
        if config.is_chosen or exc.errno != errno.EADDRINUSE:
            place = format_endpoint(config.host, config.port)
            raise ConfigError(
                f"--http {place}: can't listen there ({exc.strerror}); choose another port, or --http off"
            ) from exc
    logger.warning("port taken, another is used port=%d", config.port)
    return _bound(config.host, 0)


def _bound(host: str, port: int) -> socket.socket:
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
        bound.listen(1024)  # a taken port shows here at the latest
        bound.setblocking(False)
    except BaseException:
        bound.close()
        raise
    return bound
