"""One answer over HTTP, whatever the dialect: asked of the engine, streamed or whole, ended with its client."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final, Protocol

from starlette.responses import Response
from starlette.types import Scope

from skynet.coordinator.gateway.desk import Answered, Ask, ClientGone, Desk, Event, Receive
from skynet.coordinator.gateway.errors import ApiError
from skynet.errors import foreign_text
from skynet.protocol.messages import Finished, Submit

logger = logging.getLogger(__name__)
CLIENT_CLOSED: Final = 499  # for our log alone: nobody is there to see it
GRACE_S: Final = 5.0  # to read the last of an answer whose time is over
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]  # ASGI's
EVENT_STREAM: Final = "text/event-stream; charset=utf-8"
JSON: Final = "application/json"


class Answer(Protocol):
    """A request in some dialect's terms, and how its answer is written there. Without clock and sockets."""

    @property
    def name(self) -> str:
        """What the request is called in the log, and where the dialect has a place for it."""

    @property
    def submits(self) -> tuple[Submit, ...]:
        """What is asked; events come with indexes into this."""

    @property
    def is_stream(self) -> bool: ...

    @property
    def prompt_param(self) -> str:
        """Which parameter holds the prompt, for errors."""

    def take(self, event: Event) -> bytes:
        """Something new. What to send if this is a stream; may be empty."""

    def last(self) -> bytes:
        """All has come. The rest of the stream, or the whole body."""

    def failure(self, error: ApiError) -> bytes:
        """What a stream that has begun ends with instead."""

    def refusal(self, error: ApiError) -> bytes:
        """The body of an answer that hasn't begun."""


class Reply(Response):
    """Asks while it is sent. Its status is known when the first token is there."""

    def __init__(self, desk: Desk, answer: Answer) -> None:
        super().__init__(media_type=EVENT_STREAM if answer.is_stream else JSON)
        self._desk = desk
        self._answer = answer
        self._is_begun = False
        self._prompt_tokens: dict[int, int] = {}
        self._completion_tokens = 0
        self._first_at: float | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        began, why = time.monotonic(), ""
        try:
            async with (
                asyncio.timeout(self._desk.config.deadline_s + GRACE_S),  # for who doesn't read
                self._desk.asking(self._answer.submits, receive, self._answer.prompt_param) as ask,
            ):
                await self._answer_all(ask, send)
        except ClientGone:
            self.status_code, why = CLIENT_CLOSED, "the client has gone"
        except TimeoutError:
            self.status_code, why = CLIENT_CLOSED, "the client doesn't read"  # returning ends its connection
        except ApiError as exc:
            why = str(exc)
            await self._fail(exc, send)
        finally:
            prompt_tokens, total_s = sum(self._prompt_tokens.values()), time.monotonic() - began
            first_s = None if self._first_at is None else self._first_at - began
            self._desk.on_answered(
                Answered(scope["path"], self.status_code, prompt_tokens, self._completion_tokens, first_s, total_s)
            )
            logger.info(
                "answered request=%s path=%s status=%d prompt_tokens=%d completion_tokens=%d s=%.3f why=%s",
                self._answer.name, scope["path"], self.status_code, prompt_tokens,
                self._completion_tokens, total_s, foreign_text(why, 200) or "-",
            )  # fmt: skip

    async def _answer_all(self, ask: Ask, send: Send) -> None:
        async for event in ask:
            self._first_at = self._first_at or time.monotonic()
            piece = self._answer.take(event)
            if isinstance(event.message, Finished):
                self._prompt_tokens[event.choice] = event.message.prompt_tokens
                self._completion_tokens += event.message.completion_tokens
            if piece and self._answer.is_stream:
                await self._begin(send)
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        last = self._answer.last()
        if not self._answer.is_stream:
            self.headers["content-length"] = str(len(last))
        await self._begin(send)
        await send({"type": "http.response.body", "body": last})

    async def _begin(self, send: Send) -> None:
        if not self._is_begun:
            self._is_begun = True
            self.headers["cache-control"] = "no-store"
            if self._answer.is_stream:
                self.headers["x-accel-buffering"] = "no"  # a proxy that waits for the end makes streams useless
                del self.headers["content-length"]
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})

    async def _fail(self, error: ApiError, send: Send) -> None:
        if self._is_begun:
            await send({"type": "http.response.body", "body": self._answer.failure(error)})
            return
        self.status_code = error.status
        refusal = Response(self._answer.refusal(error), error.status, error.headers, JSON)
        await send({"type": "http.response.start", "status": error.status, "headers": refusal.raw_headers})
        await send({"type": "http.response.body", "body": refusal.body})
