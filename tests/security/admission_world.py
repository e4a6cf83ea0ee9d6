"""A real listener, gatekeeper and store on loopback, and clients that behave badly."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from skynet.coordinator.admission import Admitted, Gatekeeper
from skynet.coordinator.store import Mode, Store
from skynet.protocol.addresses import Interface, local_interfaces
from skynet.protocol.admission import Admission, AdmissionListener, ListenerConfig, request_admission
from skynet.protocol.hello import Applicant, Hello, Refused, Welcome
from skynet.protocol.identity import NodeKey, ProcessKey, SwarmKey
from skynet.protocol.roles import Role
from skynet.protocol.tls import client_context

HOST = "127.0.0.1"
LENGTH = struct.Struct(">I")


@dataclass
class World:
    """One swarm that listens."""

    swarm_key: SwarmKey
    store: Store
    gatekeeper: Gatekeeper
    listener: AdmissionListener

    async def ask(self, applicant: Applicant, timeout_s: float = 10.0) -> Admission:
        port = self.listener.port
        return await request_admission(HOST, port, pinned_key=None, hello=applicant.hello, timeout_s=timeout_s)

    async def connect(self, *, tls: bool = True, source: str | None = None) -> Stranger:
        reader, writer = await asyncio.open_connection(
            HOST,
            self.listener.port,
            ssl=client_context() if tls else None,
            server_hostname="" if tls else None,
            local_addr=(source, 0) if source else None,
        )
        return Stranger(reader, writer)

    async def settled(self) -> None:
        """Wait until every connection is closed."""
        async with asyncio.timeout(20):
            while self.listener.num_connections:  # noqa: ASYNC110 - the listener tells strangers nothing
                await asyncio.sleep(0.005)


@dataclass
class Stranger:
    """A connection whose other end may do anything."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def receive(self) -> bytes:
        (length,) = LENGTH.unpack(await self.reader.readexactly(4))
        return await self.reader.readexactly(length)

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        with contextlib.suppress(ConnectionError):
            await self.writer.drain()

    async def send_framed(self, data: bytes) -> None:
        await self.send(LENGTH.pack(len(data)) + data)

    async def closed_by_listener(self, within_s: float = 20.0) -> bytes:
        """What still came before the listener closed; fails if it doesn't close in time."""
        async with asyncio.timeout(within_s):
            try:
                return await self.reader.read()
            except OSError:
                return b""

    def close(self) -> None:
        self.writer.transport.abort()


def applicant(node: NodeKey | None = None, role: Role = Role.WORKER, **facts: object) -> Applicant:
    return Applicant(
        node_key=node or NodeKey.generate(),
        process_key=ProcessKey.generate(),
        role=role,
        suffix="cpu",
        **facts,  # type: ignore[arg-type]
    )


@contextlib.asynccontextmanager
async def world(
    directory: Path, mode: Mode = Mode.LAN, config: ListenerConfig | None = None, forces_invite: bool = False
) -> AsyncIterator[World]:
    swarm_key, process_key = SwarmKey.load_or_create(directory), ProcessKey.generate()
    interfaces: tuple[Interface, ...] = tuple(local_interfaces())
    with Store.open(directory / "store.db") as store:
        store.claim(swarm_key.public_key, "home")
        store.set_mode(mode)
        gatekeeper = Gatekeeper(store, forces_invite=forces_invite)

        async def admit(hello: Hello, source: str) -> Welcome | Refused:
            decision = await asyncio.to_thread(gatekeeper.decide, hello, source, interfaces, time.time())
            if not isinstance(decision, Admitted):
                return decision
            certificate = process_key.certify(swarm_key, swarm_key.public_key, time.time())
            return decision.welcome(certificate, {"control": 1}, lease_s=4.0)

        async with AdmissionListener(swarm_key, admit, [HOST], config=config) as listener:
            yield World(swarm_key, store, gatekeeper, listener)


@contextlib.asynccontextmanager
async def false_listener(
    serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]], tls: ssl.SSLContext | None = None
) -> AsyncIterator[int]:
    """Something else on a port of loopback; yields the port."""
    writers: list[asyncio.StreamWriter] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        with contextlib.suppress(OSError, asyncio.CancelledError):
            await serve(reader, writer)

    server = await asyncio.start_server(handle, HOST, 0, ssl=tls)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for writer in writers:
            writer.transport.abort()
        await asyncio.sleep(0)
