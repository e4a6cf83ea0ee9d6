"""Two ends of a bulk link over real CURVE sockets on loopback, for tests."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

import zmq

from skynet.protocol.bulk import BulkClient, BulkConfig, BulkServer, BulkSink, BulkSource, BytesSource
from skynet.protocol.ids import PeerId
from skynet.protocol.sockets import AsyncPort, SocketFactory

QUICK = BulkConfig(
    block_bytes=16 << 10, window_bytes=64 << 10, max_window_bytes=128 << 10, keepalive_s=0.05, idle_timeout_s=1.0,
    stall_timeout_s=1.3,
)  # fmt: skip
SERVER, CLIENT = PeerId("server.0"), PeerId("client.0")


class Shelf:
    """What a test serves and takes, and what it saw."""

    def __init__(self, **things: bytes) -> None:
        self.things = {name.replace("_", "/"): data for name, data in things.items()}
        self.asked: list[tuple[PeerId, str]] = []
        self.sinks: dict[str, MemorySink] = {}
        self.num_open = 0

    async def open_source(self, peer_id: PeerId, name: str) -> BulkSource | None:
        self.asked.append((peer_id, name))
        if name not in self.things:
            return None
        return CountedSource(self, self.things[name])

    async def open_sink(self, peer_id: PeerId, name: str, size: int | None) -> BulkSink:
        return self.sinks.setdefault(name, MemorySink())


class CountedSource(BytesSource):
    """Bytes that say how far they were read."""

    def __init__(self, shelf: Shelf, data: bytes) -> None:
        super().__init__(data)
        self._shelf = shelf
        shelf.num_open += 1
        self.end_read = 0

    async def read(self, offset: int, num_bytes: int) -> bytes:
        self.end_read = max(self.end_read, offset + num_bytes)
        return await super().read(offset, num_bytes)

    def close(self) -> None:
        self._shelf.num_open -= 1


class MemorySink:
    """Keeps what is sent, over several attempts."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.finished: int | None = None

    @property
    def offset(self) -> int:
        return len(self.data)

    async def write(self, offset: int, data: bytes) -> None:
        assert offset == len(self.data)
        self.data += data

    async def finish(self, size: int) -> None:
        self.finished = size

    def close(self) -> None:
        """Nothing to free."""


@dataclass
class BulkLink:
    """A server and a client, both running."""

    server: BulkServer
    client: BulkClient
    server_sockets: SocketFactory
    client_port: AsyncPort


def socket_factory() -> SocketFactory:
    return SocketFactory(*zmq.curve_keypair())


@contextlib.asynccontextmanager
async def listening(
    shelf: Shelf, sockets: SocketFactory, config: BulkConfig = QUICK
) -> AsyncIterator[tuple[BulkServer, int]]:
    """A bulk server in this loop, and its port number."""
    port = sockets.bind_router("bulk", ["127.0.0.1"])
    serving = sockets.asynchronous(port)
    server = BulkServer(serving, shelf.open_source, shelf.open_sink, config=config)
    task = asyncio.create_task(server.run())
    try:
        yield server, port.number
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        serving.close()


@contextlib.asynccontextmanager
async def bulk_link(
    shelf: Shelf, config: BulkConfig = QUICK, server_config: BulkConfig = QUICK
) -> AsyncIterator[BulkLink]:
    """Both ends in this loop, connected by CURVE over TCP."""
    near, far = socket_factory(), socket_factory()
    far.allow(near.public_key, CLIENT, ["bulk"])
    try:
        async with listening(shelf, far, server_config) as (server, number):
            asking = near.asynchronous(near.connect_dealer(f"tcp://127.0.0.1:{number}", far.public_key, SERVER))
            client = BulkClient(asking, config=config)
            task = asyncio.create_task(client.run())
            try:
                yield BulkLink(server, client, far, asking)
            finally:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                asking.close()
    finally:
        near.close()
        far.close()
