"""The API of Text Generation Inference, which Hugging Face's clients speak."""

from __future__ import annotations

import secrets

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from skynet.coordinator.gateway.bodies import read_and
from skynet.coordinator.gateway.desk import Desk
from skynet.coordinator.gateway.errors import ApiError
from skynet.coordinator.gateway.reply import Reply
from skynet.coordinator.gateway.served_names import ServedName
from skynet.coordinator.gateway.tgi_answers import TgiAnswer, tgi_body
from skynet.coordinator.gateway.tgi_requests import read_generate


def routes(desk: Desk, served: ServedName) -> APIRouter:
    """`/generate`, `/generate_stream`, and `/`, which does as its body says."""
    router = APIRouter()

    async def answer(request: Request, *, is_stream: bool | None) -> Response:
        name, seed = f"tgi-{secrets.token_hex(12)}", secrets.randbits(63)
        try:
            asked = await read_and(
                request, desk.config, lambda body: read_generate(body, desk.config, name, seed, is_stream)
            )
        except ApiError as exc:
            return JSONResponse(tgi_body(exc), exc.status, exc.headers)
        return Reply(desk, TgiAnswer(name, served, asked, is_list=is_stream is None))

    @router.post("/generate", response_model=None)
    async def generate(request: Request) -> Response:
        return await answer(request, is_stream=False)

    @router.post("/generate_stream", response_model=None)
    async def generate_stream(request: Request) -> Response:
        return await answer(request, is_stream=True)

    @router.post("/", response_model=None)
    async def either(request: Request) -> Response:
        return await answer(request, is_stream=None)

    return router
