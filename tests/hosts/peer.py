"""What a host does in these tests. Each line of input is a command as a JSON list, each answer a line of JSON."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable

from skynet.protocol.addresses import is_lan_source, listen_addresses, local_interfaces
from skynet.protocol.discovery import Advertiser, discover
from skynet.protocol.identity import PublicKey, SwarmKey


class NoPins:
    def keys_of(self, name: str) -> tuple[PublicKey, ...]:
        return ()


class Peer:
    def __init__(self) -> None:
        self.advertiser: Advertiser | None = None
        self.server: asyncio.Server | None = None
        self.visitors: list[str] = []

    async def advertise(self, name: str) -> object:
        key = SwarmKey.generate()
        self.advertiser = Advertiser(name, key, 47100, listen_addresses(local_interfaces()))
        await self.advertiser.start()
        return key.fingerprint

    async def silence(self) -> object:
        if self.advertiser is not None:
            await self.advertiser.stop()
        return None

    async def discover(self, timeout_s: float, swarm: str | None = None) -> object:
        started = time.monotonic()
        adverts = await discover(timeout_s, swarm, NoPins())
        found = [{"name": a.name, "fingerprint": a.fingerprint, "hosts": a.hosts, "port": a.port} for a in adverts]
        return {"found": found, "seconds": time.monotonic() - started}

    async def interfaces(self) -> object:
        return [[i.name, i.address, i.is_virtual, i.gateways] for i in local_interfaces()]

    async def serve(self, port: int) -> object:
        """Send whoever connects as many bytes as they ask for."""

        async def visit(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self.visitors.append(writer.get_extra_info("peername")[0])
            writer.write(bytes(int(await reader.readline())))
            writer.close()

        self.server = await asyncio.start_server(visit, "0.0.0.0", port)
        return None

    async def visited(self) -> object:
        """Who came, and whether they count as neighbours."""
        return [[source, is_lan_source(source, local_interfaces())] for source in self.visitors]

    async def fetch(self, host: str, port: int, num_bytes: int, timeout_s: float) -> object:
        """How long that many bytes took; an error's name if they didn't come."""
        started = time.monotonic()
        try:
            async with asyncio.timeout(timeout_s):
                reader, writer = await asyncio.open_connection(host, port)
                writer.write(b"%d\n" % num_bytes)
                await reader.readexactly(num_bytes)
                writer.close()
        except OSError as exc:
            return type(exc).__name__
        return time.monotonic() - started


async def main() -> None:
    peer = Peer()
    commands: dict[str, Callable[..., Awaitable[object]]] = {
        command.__name__: command
        for command in (
            peer.advertise,
            peer.silence,
            peer.discover,
            peer.interfaces,
            peer.serve,
            peer.visited,
            peer.fetch,
        )
    }
    while line := await asyncio.to_thread(sys.stdin.readline):
        name, *words = json.loads(line)
        print(json.dumps(await commands[name](*words)), flush=True)
    await peer.silence()


asyncio.run(main())
