"""What a client sent, made a value that we trust: bounded, JSON, of the right types, with nothing in it ignored."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar

import pydantic
import pydantic_core
from starlette.requests import ClientDisconnect, Request

from skynet.coordinator.gateway.config import GatewayConfig
from skynet.coordinator.gateway.desk import ClientGone
from skynet.coordinator.gateway.errors import ApiError
from skynet.protocol.messages import Submit

MAX_SHOWN: Final = 200  # characters of a client's own words in our errors
LARGE_BODY: Final = 64 << 10  # bytes: beyond that, reading takes milliseconds
T = TypeVar("T", bound=pydantic.BaseModel)
R = TypeVar("R")


class Body(pydantic.BaseModel):
    """Types as they are written in JSON: no text is taken for a number, nor a number for text."""

    model_config = pydantic.ConfigDict(
        strict=True, extra="forbid", frozen=True, allow_inf_nan=False, hide_input_in_errors=True
    )


async def read_body(request: Request, config: GatewayConfig) -> bytes:
    """Raises ApiError for one that is too large or comes too slowly, and ClientGone."""
    limit = config.max_body_bytes
    length = request.headers.get("content-length", "0")
    if not length.isascii() or not length.isdigit() or int(length[:20]) > limit:
        raise _too_large(limit)
    chunks, size = [], 0
    try:
        async with asyncio.timeout(config.body_s):
            async for chunk in request.stream():
                size += len(chunk)
                if size > limit:
                    raise _too_large(limit)
                chunks.append(chunk)
    except TimeoutError as exc:
        raise ApiError(408, f"the request's body didn't come within {config.body_s:.0f} s") from exc
    except ClientDisconnect as exc:
        raise ClientGone from exc
    return b"".join(chunks)


async def read_and(request: Request, config: GatewayConfig, read: Callable[[dict[str, Any]], R]) -> R:
    """What a body is made by this pure function: beside the event loop where that takes long. Raises ApiError."""
    body = await read_body(request, config)
    if len(body) > LARGE_BODY:
        return await asyncio.to_thread(lambda: read(parse_object(body)))
    return read(parse_object(body))


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"the request's body has more than {limit} bytes", code="body_too_large")


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object in a body. Raises ApiError."""
    try:
        found = pydantic_core.from_json(body, allow_inf_nan=False)
    except (ValueError, RecursionError) as exc:
        raise ApiError(400, f"the body isn't JSON: {shown(str(exc))}", code="invalid_json") from exc
    if not isinstance(found, dict):
        raise ApiError(400, f"the body is {_json_name(found)}, expected an object", code="invalid_json")
    return found


def supported_part(
    body: Mapping[str, Any], harmless: frozenset[str], unsupported: Mapping[str, tuple[object, ...]]
) -> dict[str, Any]:
    """A body without nulls and without what changes nothing: harmless parameters, and unsupported ones at values that
    ask for nothing. Raises ApiError naming an unsupported parameter that asks for something."""
    kept = {}
    for name, value in body.items():
        if value is None or name in harmless:
            continue
        if name not in unsupported:
            kept[name] = value
        elif not any(value == neutral and type(value) is type(neutral) for neutral in unsupported[name]):
            raise ApiError(400, f"{name} isn't supported here; leave it out", param=name, code="unsupported_parameter")
    return kept


def validated(kind: type[T], body: Mapping[str, Any]) -> T:
    """A body as its type. Raises ApiError naming the first parameter that is wrong."""
    try:
        return kind.model_validate(body)
    except pydantic.ValidationError as exc:
        first = exc.errors(include_url=False, include_input=False, include_context=False)[0]
        param = shown(".".join(map(str, first["loc"])))
        if first["type"] == "extra_forbidden":
            raise ApiError(400, f"{param}: there is no such parameter", param=param, code="unknown_parameter") from exc
        if first["type"] == "missing":
            raise ApiError(400, f"{param} is missing", param=param, code="missing_parameter") from exc
        said = shown(first["msg"].removeprefix("Value error, "))
        raise ApiError(400, f"{param}: {said}" if param else said, param=param or None, code="invalid_value") from exc


def submit_of(**fields: Any) -> Submit:
    """Raises ApiError for what doesn't go together, or is too long."""
    try:
        return Submit(**fields)
    except ValueError as exc:
        raise ApiError(400, shown(str(exc)), code="invalid_value") from exc


def shown(text: str) -> str:
    """Words that may be a client's own, in bounded length."""
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."


def _json_name(value: object) -> str:
    names = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
