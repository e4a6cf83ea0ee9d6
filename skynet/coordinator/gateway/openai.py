"""OpenAI's API: models, chat completions and completions."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping
from typing import Any

from fastapi import APIRouter, Request, Response

from skynet.coordinator.gateway.bodies import read_and
from skynet.coordinator.gateway.config import GatewayConfig
from skynet.coordinator.gateway.desk import Desk
from skynet.coordinator.gateway.openai_answers import Kind, OpenAiAnswer
from skynet.coordinator.gateway.openai_requests import Asked, read_chat, read_completion
from skynet.coordinator.gateway.reply import Reply
from skynet.coordinator.gateway.served_names import ServedName

Read = Callable[[Mapping[str, Any], GatewayConfig, ServedName, str, int], Asked]


def routes(desk: Desk, served: ServedName) -> APIRouter:
    """Everything under /v1 that OpenAI has."""
    router = APIRouter()

    async def answer(request: Request, kind: Kind, prefix: str, read: Read) -> Response:
        name = f"{prefix}-{secrets.token_hex(12)}"
        seed = secrets.randbits(63)
        asked = await read_and(request, desk.config, lambda body: read(body, desk.config, served, name, seed))
        return Reply(desk, OpenAiAnswer(name, kind, served, int(time.time()), asked))

    @router.post("/v1/chat/completions", response_model=None)
    async def chat(request: Request) -> Response:
        return await answer(request, "chat.completion", "chatcmpl", read_chat)

    @router.post("/v1/completions", response_model=None)
    async def completion(request: Request) -> Response:
        return await answer(request, "text_completion", "cmpl", read_completion)

    def described() -> dict[str, object]:
        return {"id": served.model_id, "object": "model", "created": served.since, "owned_by": "skynet"}

    @router.get("/v1/models")
    async def models() -> dict[str, object]:
        return {"object": "list", "data": [described()]}

    @router.get("/v1/models/{model:path}")
    async def model(model: str) -> dict[str, object]:
        served.check(model)
        return described()

    return router
