"""A machine without a copy gets a model from other nodes over real CURVE links, in spite of liars and broken links."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from skynet.errors import StepAborted, TransferFailed, WeightError
from skynet.models.checkpoint import build_manifest
from skynet.models.manifest import ChunkRef, Manifest, ManifestDigest
from skynet.models.store.links import LoopLink, PeerLink, fetch_manifest
from skynet.models.store.peers import PeerChunks
from skynet.models.store.reads import TensorRead
from skynet.models.store.serving import ModelShelf
from skynet.models.store.store import StoreConfig, WeightStore
from skynet.models.store.swarm_source import SwarmSource
from skynet.protocol.bulk import BulkClient, BulkConfig, BulkServer, BulkSource, BytesSource
from skynet.protocol.ids import PeerId
from skynet.protocol.plan import Span
from skynet.protocol.sockets import SocketFactory

from .links import socket_factory

DEADLINE_S = 20.0
CONFIG = BulkConfig(block_bytes=64 << 10, window_bytes=256 << 10, keepalive_s=0.05, idle_timeout_s=1.0)


class Nodes:
    """Other nodes, each with its own sockets, in one background event loop; `links` are this machine's ways to them."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever)
        self._thread.start()
        self.links: list[PeerLink] = []
        self.asked: dict[PeerId, list[str]] = {}
        self.factories: list[SocketFactory] = []
        self._own = socket_factory()
        self._stack = contextlib.AsyncExitStack()

    def add(self, name: str, shelf: ModelShelf) -> PeerId:
        peer_id = PeerId(name)
        asyncio.run_coroutine_threadsafe(self._start(peer_id, shelf), self.loop).result(DEADLINE_S)
        return peer_id

    async def _start(self, peer_id: PeerId, shelf: ModelShelf) -> None:
        factory, asked = socket_factory(), self.asked.setdefault(peer_id, [])
        self.factories.append(factory)
        factory.allow(self._own.public_key, PeerId("me.0"), ["bulk"])

        async def open_source(asker: PeerId, name: str) -> BulkSource | None:
            asked.append(name)
            return await shelf.open_source(asker, name)

        port = factory.bind_router("bulk", ["127.0.0.1"])
        serving = factory.asynchronous(port)
        dialled = self._own.connect_dealer(f"tcp://127.0.0.1:{port.number}", factory.public_key, peer_id)
        asking = self._own.asynchronous(dialled)
        client = BulkClient(asking, config=CONFIG)
        for work, socket in ((BulkServer(serving, open_source, config=CONFIG).run(), serving), (client.run(), asking)):
            task = asyncio.create_task(work)
            self._stack.callback(socket.close)
            self._stack.push_async_callback(asyncio.wait, [task])
            self._stack.callback(task.cancel)
        self.links.append(LoopLink(peer_id, client, self.loop))

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._stack.aclose(), self.loop).result(DEADLINE_S)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(DEADLINE_S)
        self.loop.close()
        for factory in (self._own, *self.factories):
            factory.close()


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    opened = Nodes()
    yield opened
    opened.close()


@pytest.fixture
def manifest(checkpoint: Path, tmp_path: Path) -> Manifest:
    return build_manifest(checkpoint, tmp_path / "their-cache")


def shelf_of(manifest: Manifest, checkpoint: Path, tmp_path: Path) -> ModelShelf:
    shelf = ModelShelf(StoreConfig(cache_dir=tmp_path / "their-cache"))
    shelf.add(manifest, [checkpoint])
    return shelf


def empty_store(manifest: Manifest, tmp_path: Path, source: PeerChunks) -> WeightStore:
    return WeightStore(manifest, StoreConfig(cache_dir=tmp_path / "my-cache"), remote=[source])


class Liar(ModelShelf):
    """Sends chunks of the right length and another content."""

    async def open_source(self, peer_id: PeerId, name: str) -> BulkSource | None:
        honest = await super().open_source(peer_id, name)
        if honest is None or honest.size is None or not name.startswith("chunk/"):
            return honest
        honest.close()
        return BytesSource(bytes(honest.size))


def test_a_machine_without_a_copy_gets_everything_from_several_nodes(
    nodes: Nodes, manifest: Manifest, checkpoint: Path, tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    shelf = shelf_of(manifest, checkpoint, tmp_path)
    peers = [nodes.add(f"peer{i}.0", shelf) for i in range(3)]
    found = fetch_manifest(manifest.digest, nodes.links, tmp_path / "my-cache")
    assert found == manifest
    with empty_store(found, tmp_path, PeerChunks(lambda: nodes.links)) as store:
        source = SwarmSource(store)
        source.announce(TensorRead(name) for name in tensors)
        for name, expected in tensors.items():
            assert torch.equal(source.read(name), expected)
        assert (store.small_files() / "config.json").read_bytes() == (checkpoint / "config.json").read_bytes()
        assert set(store.progress.bytes_by_source) == {"swarm"}
        assert store.progress.bytes_done == store.progress.bytes_total == sum(f.num_bytes for f in manifest.files)
    chunks_asked = [name for peer in peers for name in nodes.asked[peer] if name.startswith("chunk/")]
    assert len(chunks_asked) < 2 * len(set(chunks_asked))  # each once, but for what went silent on a busy machine
    assert sum(any(n.startswith("chunk/") for n in nodes.asked[p]) for p in peers) >= 2


def test_only_what_moved_is_fetched_when_the_plan_changes(
    nodes: Nodes, manifest: Manifest, checkpoint: Path, tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    nodes.add("peer.0", shelf_of(manifest, checkpoint, tmp_path))
    with empty_store(manifest, tmp_path, PeerChunks(lambda: nodes.links)) as store:
        SwarmSource(store).read("wide.weight", 0, [Span(0, 10)])
    with empty_store(manifest, tmp_path, PeerChunks(lambda: nodes.links)) as store:
        assert torch.equal(SwarmSource(store).read("wide.weight", 0, [Span(0, 700)]), tensors["wide.weight"])
        assert set(store.progress.bytes_by_source) == {"cache", "swarm"}


def test_a_node_that_sends_wrong_bytes_is_named_and_the_chunk_comes_from_another(
    nodes: Nodes, manifest: Manifest, checkpoint: Path, tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    liar_shelf = Liar(StoreConfig(cache_dir=tmp_path / "their-cache"))
    liar_shelf.add(manifest, [checkpoint])
    liar = nodes.add("liar.0", liar_shelf)
    noted: list[tuple[PeerId, ChunkRef]] = []
    source = PeerChunks(lambda: nodes.links, lambda peer, chunk: noted.append((peer, chunk)), patience_s=0.0)
    with empty_store(manifest, tmp_path, source) as store:
        with pytest.raises(WeightError, match="nowhere to be had"):
            SwarmSource(store).read("norm.weight")
        assert [peer for peer, _ in noted] == [liar]
        nodes.add("honest.0", shelf_of(manifest, checkpoint, tmp_path))
        for name, expected in tensors.items():
            assert torch.equal(SwarmSource(store).read(name), expected)
    assert len(noted) == 1


def test_a_node_that_has_nothing_is_passed_over(
    nodes: Nodes, manifest: Manifest, checkpoint: Path, tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    nodes.add("empty.0", ModelShelf(StoreConfig(cache_dir=tmp_path / "nothing")))
    nodes.add("full.0", shelf_of(manifest, checkpoint, tmp_path))
    assert fetch_manifest(manifest.digest, nodes.links, tmp_path / "my-cache") == manifest
    with empty_store(manifest, tmp_path, PeerChunks(lambda: nodes.links)) as store:
        assert torch.equal(SwarmSource(store).read("embed.weight"), tensors["embed.weight"])
    with pytest.raises(WeightError, match=r"none of 2 nodes sent it \(empty\.0: .*check that the coordinator runs"):
        fetch_manifest(ManifestDigest("0" * 64), nodes.links, tmp_path / "my-cache")


class Gone:
    """A node that nobody has a connection to."""

    peer_id = PeerId("gone.0")
    is_open = False

    def fetch(
        self, name: str, offset: int, size: int | None, into: bytearray, max_bytes: int, cancel: threading.Event
    ) -> None:
        raise TransferFailed("waited in vain", "busy")


def test_a_manifest_is_had_from_who_is_reached_before_anybody_is_waited_for(
    nodes: Nodes, manifest: Manifest, checkpoint: Path, tmp_path: Path
) -> None:
    nodes.add("full.0", shelf_of(manifest, checkpoint, tmp_path))
    asked: list[str] = []

    class Watched(Gone):
        def fetch(self, name: str, *_: object) -> None:
            asked.append(name)

    assert fetch_manifest(manifest.digest, [Watched(), nodes.links[0]], tmp_path / "my-cache") == manifest
    assert not asked


class Breaking:
    """A link that breaks in the middle of each chunk, after so many bytes of it."""

    def __init__(self, link: PeerLink, after_bytes: int) -> None:
        self.peer_id = link.peer_id
        self._link, self._after_bytes = link, after_bytes
        self.breaks = 0
        self.is_open = True

    def fetch(
        self, name: str, offset: int, size: int | None, into: bytearray, max_bytes: int, cancel: threading.Event
    ) -> None:
        self._link.fetch(name, offset, self._after_bytes, into, max_bytes, cancel)
        self.breaks += 1
        raise TransferFailed(f"{self.peer_id}: cut", "broken")


def test_a_chunk_that_broke_off_goes_on_from_another_node(
    nodes: Nodes, manifest: Manifest, checkpoint: Path, tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    shelf = shelf_of(manifest, checkpoint, tmp_path)
    nodes.add("breaking.0", shelf)
    nodes.add("steady.0", shelf)
    breaking = Breaking(nodes.links[0], 100_000)
    seen: list[int] = []

    class Watched(Breaking):
        def fetch(
            self, name: str, offset: int, size: int | None, into: bytearray, max_bytes: int, cancel: threading.Event
        ) -> None:
            seen.append(offset)
            self._link.fetch(name, offset, size, into, max_bytes, cancel)

    steady = Watched(nodes.links[1], 0)

    def links() -> Sequence[PeerLink]:  # the steady one appears when it is needed
        return [breaking, steady] if breaking.breaks else [breaking]

    with empty_store(manifest, tmp_path, PeerChunks(links)) as store:
        for name, expected in tensors.items():
            assert torch.equal(SwarmSource(store).read(name), expected)
    assert breaking.breaks
    assert seen.count(100_000) == breaking.breaks  # the other node sends the rest, no more


def test_cancelling_ends_a_fetch_that_waits_for_nodes(manifest: Manifest, tmp_path: Path) -> None:
    asked = threading.Event()

    def nobody() -> list[PeerLink]:
        asked.set()
        return []

    failed: list[BaseException] = []
    with empty_store(manifest, tmp_path, PeerChunks(nobody, patience_s=DEADLINE_S)) as store:

        def read() -> None:
            try:
                SwarmSource(store).read("norm.weight")
            except StepAborted as exc:
                failed.append(exc)

        thread = threading.Thread(target=read)
        thread.start()
        assert asked.wait(DEADLINE_S)
        store.cancel()
        thread.join(DEADLINE_S / 2)
        assert not thread.is_alive()
    assert failed


def test_two_stores_on_one_machine_fetch_each_chunk_once(
    nodes: Nodes, manifest: Manifest, checkpoint: Path, tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    peer = nodes.add("peer.0", shelf_of(manifest, checkpoint, tmp_path))
    with (
        empty_store(manifest, tmp_path, PeerChunks(lambda: nodes.links)) as one,
        empty_store(manifest, tmp_path, PeerChunks(lambda: nodes.links)) as other,
    ):
        for store in (one, other):
            SwarmSource(store).announce(TensorRead(name) for name in tensors)
        for name, expected in tensors.items():
            assert torch.equal(SwarmSource(one).read(name), expected)
            assert torch.equal(SwarmSource(other).read(name), expected)
    # Both stores asking for everything would be twice the number; a transfer that went silent is asked for again.
    assert len(nodes.asked[peer]) < 2 * len(set(nodes.asked[peer]))
