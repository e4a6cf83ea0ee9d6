"""A worker's bulk side: gives its chunks to others, and gets manifests and chunks from them."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from skynet.errors import SkyNetError
from skynet.models.manifest import ChunkRef, Manifest, ManifestDigest
from skynet.models.store.links import LoopLink, PeerLink, fetch_manifest
from skynet.models.store.peers import PeerChunks
from skynet.models.store.serving import ModelShelf
from skynet.models.store.store import StoreConfig
from skynet.protocol.bulk import BulkClient, BulkServer
from skynet.protocol.ids import PeerId
from skynet.protocol.messages import PeerInfo
from skynet.protocol.sockets import AsyncPort, SocketFactory

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Source:
    """A way to one node's chunks. Owned by the agent's loop."""

    info: PeerInfo
    port: AsyncPort
    link: LoopLink
    running: asyncio.Task[None]


class ChunkSharing:
    """Owns the worker's bulk socket and its links to other nodes' ones. Lives on the agent's loop."""

    def __init__(
        self,
        factory: SocketFactory,
        hosts: Sequence[str],
        store: StoreConfig,
        on_bad_sender: Callable[[PeerId, ChunkRef], None],
    ) -> None:
        self._factory = factory
        self._store = store
        self._loop = asyncio.get_running_loop()
        self._shelf = ModelShelf(store)
        self._on_bad_sender = on_bad_sender
        self._sources: dict[PeerId, _Source] = {}
        port = factory.bind_router("bulk", hosts)
        self.port = port.number
        self._port = factory.asynchronous(port)
        self._server = BulkServer(self._port, self._shelf.open_source, on_protocol_error=factory.punish)

    async def run(self) -> None:
        """Serve until cancelled."""
        await self._server.run()

    async def close(self) -> None:
        """Close every socket; twice is fine."""
        for peer_id in list(self._sources):
            await self._disconnect(peer_id)
        self._port.close()

    async def use_sources(self, peers: Sequence[PeerInfo]) -> None:
        """From whom chunks may be had now; links to others are closed."""
        wanted = {peer.peer_id: peer for peer in peers if peer.bulk_port and peer.hosts}
        for peer_id, source in list(self._sources.items()):
            if wanted.get(peer_id) != source.info:
                await self._disconnect(peer_id)
        for peer_id, info in wanted.items():
            if peer_id not in self._sources:
                try:
                    self._connect(info)
                except SkyNetError as exc:  # another node's impossible address mustn't fail our load
                    logger.warning("source left out peer=%s reason=%s", peer_id, exc)

    def _connect(self, info: PeerInfo) -> None:
        host = info.hosts[0]
        endpoint = f"tcp://[{host}]:{info.bulk_port}" if ":" in host else f"tcp://{host}:{info.bulk_port}"
        port = self._factory.asynchronous(
            self._factory.connect_dealer(
                endpoint,
                info.curve_key,
                info.peer_id,
                domain="bulk",
                on_disconnected=lambda _peer, _connection: self._soon(client.link_lost),
            )
        )
        client = BulkClient(port)
        running = asyncio.create_task(client.run(), name=f"bulk-{info.peer_id}")
        self._sources[info.peer_id] = _Source(info, port, LoopLink(info.peer_id, client, self._loop), running)

    def _soon(self, call: Callable[[], None]) -> None:
        """From the guard's thread, which may outlive the loop."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(call)

    async def _disconnect(self, peer_id: PeerId) -> None:
        source = self._sources.pop(peer_id)
        source.running.cancel()
        await asyncio.gather(source.running, return_exceptions=True)
        source.port.close()

    # -- called from loader threads

    def links(self) -> Sequence[PeerLink]:
        """The ways to chunks that are open now."""
        return [source.link for source in list(self._sources.values())]

    def manifest(self, digest: ManifestDigest, cancel: threading.Event) -> Manifest:
        """From the machine's cache or another node. Raises WeightError, StepAborted."""
        return fetch_manifest(digest, self.links(), self._store.cache_dir, cancel)

    def chunks(self) -> PeerChunks:
        """Every other node as one source of chunks."""
        return PeerChunks(self.links, self._on_bad_sender)

    def offer(self, manifest: Manifest, directories: Sequence[Path]) -> None:
        """Others may have these chunks from us."""
        self._shelf.add(manifest, directories)
