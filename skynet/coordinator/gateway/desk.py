"""The gateway as the engine's client: what an HTTP request asks, and what comes for it, token by token."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Protocol

from skynet.coordinator.gateway.config import GatewayConfig
from skynet.coordinator.gateway.errors import ApiError, from_failed
from skynet.coordinator.requests import node_of
from skynet.protocol.ids import PeerId, RequestId
from skynet.protocol.messages import Failed, Finished, Notice, Submit, ToClient, Tokens

MAX_INBOX: Final = 256  # messages that an HTTP client hasn't read; the engine keeps the rest and tells it later
OURS: Final = "http/"  # how our users' names begin; no node's does, being 26 letters and digits
ANYONE: Final = f"{OURS}anyone"  # the user of requests without a key
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]  # ASGI's


class ClientGone(Exception):
    """Nobody reads this answer any more; it is cancelled already."""


class Asked(Protocol):
    """What the desk needs of the engine."""

    @property
    def num_requests(self) -> int: ...

    def submit(self, submit: Submit, client: PeerId) -> None: ...

    def cancel(self, client: PeerId, request_id: RequestId) -> None: ...


@dataclass(frozen=True, slots=True)
class Room:
    """How many requests may be in progress."""

    total: int
    of_one_user: int


class Event(NamedTuple):
    """Something new of one of the answers asked for."""

    choice: int  # which of them
    message: Tokens | Finished


class Answered(NamedTuple):
    """A request that has ended, for figures."""

    path: str
    status: int
    prompt_tokens: int
    completion_tokens: int
    first_s: float | None  # to the first token, if there was one
    total_s: float


class Ask:
    """One HTTP request's submissions. Iterate to get what comes; `close` frees what hasn't ended."""

    def __init__(self, desk: Desk, client: PeerId, submits: Sequence[Submit], prompt_param: str) -> None:
        self.client = client
        self.notice: str | None = None  # why it waits
        self.is_gone = False
        self._desk = desk
        self._prompt_param = prompt_param
        self._index = {submit.request_id: index for index, submit in enumerate(submits)}
        self._open = set(self._index)  # not ended yet
        self._inbox: deque[Tokens | Finished | Failed] = deque()
        self._arrived = asyncio.Event()
        self._error: ApiError | None = None

    @property
    def num_open(self) -> int:
        """Submissions that the engine still works on."""
        return len(self._open)

    def take(self, message: ToClient) -> bool:
        """From the engine. False: not read as fast as it comes."""
        if isinstance(message, Notice):
            self.notice = message.text
        elif isinstance(message, Tokens | Finished | Failed) and message.request_id in self._open:
            if len(self._inbox) >= MAX_INBOX:
                return False
            if not isinstance(message, Tokens):
                self._open.discard(message.request_id)
            self._inbox.append(message)
            self._arrived.set()
        return True

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        """Raises ApiError if an answer fails, and ClientGone."""
        while not self._inbox:
            if self.is_gone:
                raise ClientGone
            if self._error is not None:
                raise self._error
            if not self._open:
                raise StopAsyncIteration
            self._arrived.clear()
            await self._arrived.wait()  # ended by `end` at the deadline, if by nothing else
        message = self._inbox.popleft()
        if isinstance(message, Failed):
            raise from_failed(message, self._prompt_param, self._desk.config.retry_after_s)
        return Event(self._index[message.request_id], message)

    def end(self, error: ApiError | None) -> None:
        """Free everything now, and say why; None: nobody is there to hear it."""
        self.is_gone = self.is_gone or error is None
        self._error = self._error or error
        self.close()
        self._inbox.clear()
        self._arrived.set()

    def close(self) -> None:
        """Cancel what hasn't ended; twice is fine."""
        unfinished, self._open = self._open, set()  # from here on, what comes for them falls on the floor
        self._desk.cancel(self, sorted(unfinished))


class Desk:
    """Who asks what. Its clients are in this process, and the engine tells them by `tell`."""

    def __init__(
        self,
        engine: Asked,
        config: GatewayConfig,
        room: Room,
        on_answered: Callable[[Answered], None] = lambda answered: None,
    ) -> None:
        self.config = config
        self.on_answered = on_answered
        self._engine = engine
        self._room = room
        self._asks: dict[PeerId, Ask] = {}
        self._numbers = itertools.count(1)

    def owns(self, client: PeerId) -> bool:
        """Whether this is, or was, one of ours."""
        return client.startswith(OURS)

    def tell(self, client: PeerId, message: ToClient) -> bool:
        """From the engine to a client of ours. True for one that has gone: it wants nothing more."""
        ask = self._asks.get(client)
        return ask is None or ask.take(message)

    @contextlib.asynccontextmanager
    async def asking(
        self, submits: Sequence[Submit], receive: Receive, prompt_param: str, user: str = ANYONE
    ) -> AsyncIterator[Ask]:
        """Submit these, and cancel at the end, at the deadline or when the client is gone, whichever is first."""
        self._check_room(len(submits), user)
        client = PeerId(f"{user}.{next(self._numbers)}")
        ask = self._asks[client] = Ask(self, client, submits, prompt_param)
        loop = asyncio.get_running_loop()
        late = ApiError(504, f"the answer wasn't complete in {self.config.deadline_s:.0f} s", code="deadline_exceeded")
        deadline = loop.call_later(self.config.deadline_s, ask.end, late)
        watch = asyncio.create_task(_end_when_gone(receive, ask), name=f"watch-{client}")
        try:
            for submit in submits:
                self._engine.submit(submit, client)
            yield ask
        finally:
            deadline.cancel()
            watch.cancel()
            ask.close()
            del self._asks[client]

    def _check_room(self, num_new: int, user: str) -> None:
        own = sum(ask.num_open for client, ask in self._asks.items() if node_of(client) == user)
        for num_open, limit in ((self._engine.num_requests, self._room.total), (own, self._room.of_one_user)):
            if num_new > limit:
                raise ApiError(400, f"this asks for {num_new} answers at once, {limit} at most are possible", param="n")
            if num_open + num_new > limit:
                raise ApiError(
                    429,
                    f"{num_open} requests are in progress, at most {limit} run and wait; try again later",
                    code="queue_full",
                    retry_after_s=self.config.retry_after_s,
                )

    def cancel(self, ask: Ask, request_ids: Sequence[RequestId]) -> None:
        """Free these in the engine."""
        for request_id in request_ids:
            self._engine.cancel(ask.client, request_id)

    def stop(self) -> None:
        """End everything: the coordinator stops."""
        for ask in list(self._asks.values()):
            ask.end(ApiError(503, "the coordinator is stopping", code="stopping"))


async def _end_when_gone(receive: Receive, ask: Ask) -> None:
    """The request's body is read: what still can come is that the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
    ask.end(None)
