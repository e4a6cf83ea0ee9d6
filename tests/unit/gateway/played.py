"""The gateway's application over an engine that is played: what it is asked is kept, what it says the test decides."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from skynet.coordinator.gateway.config import GatewayConfig
from skynet.coordinator.gateway.desk import Desk, Room
from skynet.coordinator.gateway.gateway import application, guarded
from skynet.coordinator.gateway.served_names import ServedName
from skynet.protocol.ids import PeerId, RequestId
from skynet.protocol.messages import Finished, Submit, ToClient, Tokens

SERVED = ServedName("tiny", frozenset({"tiny", "some/tiny"}), 128, lambda i: f"<{i}>", frozenset({0}), 1)
Headers = Sequence[tuple[str, str]]
OWN: Headers = (("host", "localhost:8000"), ("content-type", "application/json"))


def whole_answer(submit: Submit) -> list[ToClient]:
    """Two tokens and an end."""
    name = submit.request_id
    return [
        Tokens(request_id=name, position=0, token_ids=(7,), text="one "),
        Tokens(request_id=name, position=1, token_ids=(8,), text="two"),
        Finished(request_id=name, reason="length", prompt_tokens=3, completion_tokens=2),
    ]


@dataclass
class World:
    """Engine and gateway."""

    says: Callable[[Submit], Sequence[ToClient]] = whole_answer
    config: GatewayConfig = field(default_factory=GatewayConfig)
    room: Room = field(default_factory=lambda: Room(512, 256))
    submits: list[tuple[PeerId, Submit]] = field(default_factory=list)
    cancelled: list[RequestId] = field(default_factory=list)
    asked: asyncio.Event = field(default_factory=asyncio.Event)
    num_requests: int = 0
    why_not_ready: str | None = None

    def __post_init__(self) -> None:
        self.desk = Desk(self, self.config, self.room)
        self.app = guarded(application(self.desk, SERVED, lambda: self.why_not_ready), self.config)

    def submit(self, submit: Submit, client: PeerId) -> None:
        self.submits.append((client, submit))
        for message in self.says(submit):
            assert self.desk.tell(client, message)
        self.asked.set()

    def cancel(self, client: PeerId, request_id: RequestId) -> None:
        self.cancelled.append(request_id)
        done = Finished(request_id=request_id, reason="cancelled", prompt_tokens=1, completion_tokens=0)
        assert self.desk.tell(client, done), "what comes for a request that is over must not be kept"


@dataclass
class Exchange:
    """One request, and what came for it."""

    world: World
    method: str = "POST"
    path: str = "/v1/completions"
    body: Sequence[bytes] = ()
    headers: Headers = OWN
    status: int = 0
    answer_headers: dict[str, str] = field(default_factory=dict)
    answer: bytes = b""
    gone: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self) -> Exchange:
        """Until it is answered."""
        parts = list(self.body) or [b""]

        async def receive() -> dict[str, Any]:
            if parts:
                return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}
            await self.gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                self.status = message["status"]
                self.answer_headers = {k.decode(): v.decode() for k, v in message["headers"]}
            else:
                self.answer += message.get("body", b"")

        scope: dict[str, Any] = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": self.method,
            "scheme": "http", "path": self.path, "raw_path": self.path.encode(), "query_string": b"", "root_path": "",
            "headers": [(k.lower().encode(), v.encode("latin-1")) for k, v in self.headers],
            "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 8000),
        }  # fmt: skip
        await self.world.app(scope, receive, send)
        return self

    @property
    def json(self) -> Any:
        return json.loads(self.answer)

    @property
    def events(self) -> list[Any]:
        """Of a stream, the last one apart."""
        lines = self.answer.decode().split("\n\n")
        assert lines.pop() == ""
        return [line.removeprefix("data:").strip() for line in lines]


def post(world: World, path: str, body: object) -> Exchange:
    """Ask, and wait for the whole answer."""
    exchange = Exchange(world, path=path, body=[json.dumps(body).encode()])
    return asyncio.run(exchange.run())
