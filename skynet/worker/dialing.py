"""Keeps a way open to one node's bulk server, by whichever of its addresses answers first."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final

from skynet.errors import ConfigError
from skynet.protocol.addresses import format_endpoint
from skynet.protocol.bulk import BulkClient
from skynet.protocol.messages import PeerInfo
from skynet.protocol.sockets import Port, SocketFactory

logger = logging.getLogger(__name__)

DIAL_S: Final = 2.0  # for all addresses at once
MAX_HOSTS: Final = 8
_PAUSE_S: Final = (0.1, 2.0)  # first and longest between two rounds


class PeerDialer:
    """Connects a bulk client with its node and mends the connection. `run` it in a task; that one owns the sockets.

    Only the holder of the node's key answers, so a stranger at one of the addresses does no harm.
    """

    def __init__(self, factory: SocketFactory, info: PeerInfo, client: BulkClient) -> None:
        self._factory = factory
        self._info = info
        self._client = client
        self._loop = asyncio.get_running_loop()

    async def run(self) -> None:
        """Until cancelled. A node that isn't reached, or doesn't know us yet, is tried again."""
        pause_s = _PAUSE_S[0]
        while True:
            attempt = _Attempt(self._loop)
            try:
                port = await self._dial(attempt)
                if port is not None:
                    pause_s = _PAUSE_S[0]
                    await self._use(port, attempt)
            except Exception:  # whatever it is: without this task the node would never be asked again
                logger.exception("dialing failed, trying again peer=%s", self._info.peer_id)
            finally:
                attempt.close()
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _PAUSE_S[1])

    async def _dial(self, attempt: _Attempt) -> Port | None:
        """Try all addresses at once; the first that answers, or None."""
        for host in self._info.hosts[:MAX_HOSTS]:
            try:
                attempt.add(self._factory, format_endpoint(host, self._info.bulk_port), self._info)
            except ConfigError as exc:  # another node's impossible address mustn't fail our load
                logger.warning("address left out peer=%s reason=%s", self._info.peer_id, exc)
        if not attempt.ports:
            return None
        try:
            async with asyncio.timeout(DIAL_S):
                port = await attempt.answered
        except TimeoutError:
            port = None
        if port is None:
            logger.debug("node not reached peer=%s hosts=%s", self._info.peer_id, ",".join(self._info.hosts))
            return None
        attempt.keep(port)
        return port

    async def _use(self, port: Port, attempt: _Attempt) -> None:
        """Until the connection ends; what was under way is resumed by the next one."""
        asynchronous = self._factory.asynchronous(port)
        self._client.attach(asynchronous)
        receiving = asyncio.create_task(self._client.run(), name=f"bulk-receive-{self._info.peer_id}")
        receiving.add_done_callback(lambda _: attempt.lost.set())
        try:
            await attempt.lost.wait()
            self._client.link_lost()
        finally:
            self._client.attach(None)
            receiving.cancel()
            (ended,) = await asyncio.gather(receiving, return_exceptions=True)
            asynchronous.close()
            if isinstance(ended, Exception):
                logger.error("bulk client failed peer=%s reason=%r", self._info.peer_id, ended)


class _Attempt:
    """Sockets to one node's addresses, until one of them has an answer."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.ports: list[Port] = []
        self._num_refused = 0
        self.answered: asyncio.Future[Port | None] = loop.create_future()  # None: everyone refused us
        self.lost = asyncio.Event()  # the connection that was kept ended

    def add(self, factory: SocketFactory, address: str, info: PeerInfo) -> None:
        """Dial one address. Raises ConfigError for an impossible one."""
        port = factory.connect_dealer(
            f"tcp://{address}",
            info.curve_key,
            info.peer_id,
            domain="bulk",
            on_connected=lambda: self._soon(lambda: self._answer(port)),
            on_refused=lambda: self._soon(self._refuse),
            on_disconnected=lambda _peer, _connection: self._soon(lambda: self._lose(port)),
        )
        self.ports.append(port)

    def keep(self, chosen: Port) -> None:
        """Close all others."""
        for port in self.ports:
            if port is not chosen:
                port.close()
        self.ports = [chosen]

    def close(self) -> None:
        """Close what is left; twice is fine."""
        for port in self.ports:
            port.close()
        self.answered.cancel()

    def _answer(self, port: Port) -> None:
        if not self.answered.done():
            self.answered.set_result(port)

    def _refuse(self) -> None:
        self._num_refused += 1
        if self._num_refused == len(self.ports) and not self.answered.done():
            self.answered.set_result(None)

    def _lose(self, port: Port) -> None:
        if self.answered.done() and not self.answered.cancelled() and self.answered.result() is port:
            self.lost.set()

    def _soon(self, call: Callable[[], None]) -> None:
        """From the guard's thread, which may outlive the loop."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(call)
