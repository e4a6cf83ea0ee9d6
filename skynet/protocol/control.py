"""Control links on an event loop: a node's one to its coordinator, and the coordinator's to all nodes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from functools import partial
from typing import Any, Generic, Self, TypeVar

from skynet.errors import ProtocolError
from skynet.protocol.allowance import Allowance
from skynet.protocol.codec import Decoder, encode
from skynet.protocol.entrance import COORDINATOR, Ticket
from skynet.protocol.ids import PeerId
from skynet.protocol.messages import Ping
from skynet.protocol.sockets import AsyncPort, Received, SocketFactory
from skynet.protocol.toll import Toll

logger = logging.getLogger(__name__)
M = TypeVar("M")
MAX_UNANSWERED = 2  # Pings, one after each lease of silence


class LinkLost(Exception):
    """The connection to the coordinator ended, or it no longer counts us as a member."""


class ControlLink(Generic[M]):
    """A node's link to its coordinator. It belongs to one event loop; a lost one isn't mended: open another."""

    def __init__(
        self, port: AsyncPort, kinds: tuple[type[M], ...], lease_s: float, factory: SocketFactory | None
    ) -> None:
        self._port = port
        self._decoder = Decoder(*kinds)
        self._lease_s = lease_s
        self._own_factory = factory
        self._lost = asyncio.Event()
        self._nonce = 0
        self._is_closed = False

    @classmethod
    async def open(
        cls, ticket: Ticket, kinds: tuple[type[M], ...], factory: SocketFactory | None = None, name: str = "control"
    ) -> Self:
        """Connect with the admitted key. Without a factory of the process's own it makes one, and closes it."""
        own = None if factory else SocketFactory(ticket.process_key.public, ticket.process_key.secret)
        used = factory or own
        assert used is not None
        loop = asyncio.get_running_loop()
        lost = asyncio.Event()
        port = used.connect_dealer(
            ticket.endpoint(name),
            ticket.welcome.coordinator.curve_key,
            COORDINATOR,
            on_disconnected=lambda _peer, _connection: _soon(loop, lost.set),
        )
        link = cls(used.asynchronous(port), kinds, ticket.welcome.lease_s, own)
        link._lost = lost
        return link

    @property
    def is_open(self) -> bool:
        """Whether it was neither closed nor lost, as far as we know."""
        return not self._is_closed and not self._lost.is_set()

    def send(self, message: Any) -> None:
        """Queue a message; if the coordinator is gone it is dropped, and `receive` says so."""
        if not self._is_closed:
            self._port.send(encode(message))

    async def receive(self) -> M:
        """The next message. Raises LinkLost when the connection ends or nothing comes for three leases.

        After the first lease of silence, and the second, the coordinator is asked for a sign of life.
        """
        while True:
            receiving = asyncio.ensure_future(self._port.receive())
            losing = asyncio.ensure_future(self._lost.wait())
            try:
                await asyncio.wait({receiving, losing}, timeout=self._lease_s, return_when=asyncio.FIRST_COMPLETED)
                if receiving.done():
                    self._nonce = 0
                    frames = receiving.result().frames
                    try:
                        return self._decoder.decode([f.buffer for f in frames])[0]
                    except ProtocolError as exc:
                        raise LinkLost(f"the coordinator sent something unreadable: {exc}") from exc
                if losing.done():
                    raise LinkLost("the connection to the coordinator ended")
            finally:
                receiving.cancel()
                losing.cancel()
            if self._nonce >= MAX_UNANSWERED:
                raise LinkLost(f"nothing from the coordinator for {(MAX_UNANSWERED + 1) * self._lease_s:.0f} s")
            self._nonce += 1
            self.send(Ping(nonce=self._nonce))

    async def close(self) -> None:
        """Close; twice is fine."""
        self._is_closed = True
        self._port.close()
        if self._own_factory is not None:
            await asyncio.to_thread(self._own_factory.close)


class Switchboard(Generic[M]):
    """The coordinator's end of one kind of link: a ROUTER, and which connection each peer has."""

    def __init__(
        self,
        port: AsyncPort,
        kinds: tuple[type[M], ...],
        on_message: Callable[[PeerId, M], None],
        on_refused: Callable[[PeerId], None],
        on_flood: Callable[[PeerId], None],
        allowance: Allowance | None = None,
    ) -> None:
        self._port = port
        self._decoder = Decoder(*kinds)
        self._on_message = on_message
        self._on_refused = on_refused  # a peer sent what nobody may: close its link
        self._toll = Toll(on_flood, allowance)
        self._is_closed = False
        self._routes: dict[PeerId, tuple[bytes, int]] = {}  # routing id, connection

    async def run(self) -> None:
        """Hand over every message; one peer's nonsense never disturbs another, nor does its flood."""
        while True:
            received = await self._port.receive()
            self._toll.charge(received.peer_id, partial(self._handle, received))

    def _handle(self, received: Received) -> None:
        self._routes[received.peer_id] = (received.routing_id, received.connection)
        try:
            message, _ = self._decoder.decode([f.buffer for f in received.frames])
            self._on_message(received.peer_id, message)
        except ProtocolError as exc:
            logger.warning("message refused peer=%s reason=%s", received.peer_id, exc)
            self._on_refused(received.peer_id)

    def send(self, peer_id: PeerId, message: Any) -> bool:
        """Queue a message for a peer. False: it has no connection, or doesn't read what it gets."""
        route = self._routes.get(peer_id)
        return route is not None and not self._is_closed and self._port.send(encode(message), route[0])

    def connection_of(self, peer_id: PeerId) -> int | None:
        """Which connection a peer used last; None if it has none."""
        route = self._routes.get(peer_id)
        return None if route is None else route[1]

    def forget(self, peer_id: PeerId) -> None:
        """Its connection is gone."""
        self._routes.pop(peer_id, None)

    def close(self) -> None:
        """Close; twice is fine."""
        self._is_closed = True
        self._port.close()


def _soon(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
    """Run this on the loop; from a thread that may outlive it."""
    with contextlib.suppress(RuntimeError):  # closed
        loop.call_soon_threadsafe(call)
