"""A worker's bulk side: gives its chunks to others, and gets manifests and chunks from them."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from skynet.models.manifest import ChunkRef, Manifest, ManifestDigest
from skynet.models.store.links import LoopLink, PeerLink, fetch_manifest
from skynet.models.store.peers import PeerChunks
from skynet.models.store.serving import ModelShelf
from skynet.models.store.store import StoreConfig
from skynet.protocol.bulk import BulkClient, BulkServer
from skynet.protocol.ids import PeerId
from skynet.protocol.messages import PeerInfo
from skynet.protocol.sockets import SocketFactory
from skynet.protocol.toll import Toll
from skynet.worker.dialing import PeerDialer

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Source:
    """A way to one node's chunks. Owned by the agent's loop."""

    client: BulkClient
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
        self._server = BulkServer(
            self._port, self._shelf.open_source, on_protocol_error=factory.punish, toll=Toll(factory.suspend)
        )

    async def run(self) -> None:
        """Serve until cancelled."""
        await self._server.run()

    async def close(self) -> None:
        """Close every socket; twice is fine."""
        for peer_id in list(self._sources):
            await self._disconnect(peer_id)
        self._port.close()

    @asynccontextmanager
    async def sources(self, peers: Sequence[PeerInfo]) -> AsyncIterator[None]:
        """From whom chunks may be had meanwhile. One load at a time; after it nobody is dialled who may be gone."""
        try:
            for info in peers:
                if info.bulk_port and info.hosts and info.peer_id not in self._sources:
                    self._sources[info.peer_id] = self._connect(info)
            yield
        finally:
            for peer_id in list(self._sources):
                await self._disconnect(peer_id)

    def _connect(self, info: PeerInfo) -> _Source:
        client = BulkClient()
        running = asyncio.create_task(PeerDialer(self._factory, info, client).run(), name=f"bulk-{info.peer_id}")
        return _Source(client, LoopLink(info.peer_id, client, self._loop), running)

    async def _disconnect(self, peer_id: PeerId) -> None:
        source = self._sources.pop(peer_id, None)
        if source is None:
            return  # `close` came between
        source.running.cancel()
        await asyncio.gather(source.running, return_exceptions=True)

    # -- called from loader threads

    def links(self) -> Sequence[PeerLink]:
        """The ways to other nodes, open or not."""
        return [source.link for source in list(self._sources.values())]

    def manifest(self, digest: ManifestDigest, cancel: threading.Event) -> Manifest:
        """From the machine's cache or another node. Raises WeightError, StepAborted."""
        return fetch_manifest(digest, self.links(), self._store.cache_dir, cancel)

    def chunks(self) -> PeerChunks:
        """Every other node as one source of chunks."""
        return PeerChunks(lambda: [link for link in self.links() if link.is_open], self._on_bad_sender)

    def offer(self, manifest: Manifest, directories: Sequence[Path]) -> None:
        """Others may have these chunks from us."""
        self._shelf.add(manifest, directories)
