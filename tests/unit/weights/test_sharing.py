"""A worker's ways to other nodes' chunks: by any of their addresses, as soon as they let it in, again after a break."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import pytest
import zmq

from skynet.models.checkpoint import build_manifest
from skynet.models.manifest import Manifest
from skynet.models.store.store import StoreConfig
from skynet.protocol.allowance import Allowance
from skynet.protocol.bulk.flow import frames_of
from skynet.protocol.bulk.messages import BulkCredit
from skynet.protocol.ids import PeerId
from skynet.protocol.messages import PeerInfo
from skynet.protocol.sockets import Port, SocketFactory
from skynet.worker.sharing import ChunkSharing

from .links import socket_factory

ME, OTHER = PeerId("me.0"), PeerId("other.0")
DEADLINE_S = 10.0


class Pair:
    """Two workers' sharing in one loop: ours has nothing, the other has a model."""

    def __init__(self, manifest: Manifest, checkpoint: Path, directory: Path) -> None:
        self.manifest = manifest
        self.near, self.far = socket_factory(), socket_factory()
        self.ours = ChunkSharing(self.near, ["127.0.0.1"], StoreConfig(cache_dir=directory / "ours"), _nobody_lies)
        self.theirs = ChunkSharing(self.far, ["127.0.0.1"], StoreConfig(cache_dir=directory / "theirs"), _nobody_lies)
        self.theirs.offer(manifest, [checkpoint])
        self.sources = contextlib.AsyncExitStack()  # while ours loads

    def let_in(self) -> None:
        self.far.allow(self.near.public_key, ME, {"bulk"})

    async def use(self, hosts: Sequence[str]) -> None:
        info = PeerInfo(
            peer_id=OTHER, curve_key=self.far.public_key, hosts=tuple(hosts), data_port=0, bulk_port=self.theirs.port
        )
        await self.sources.enter_async_context(self.ours.sources([info]))

    async def fetch(self, number: int) -> None:
        """One chunk, as a loader thread fetches it."""
        chunk = self.manifest.file("model.safetensors").chunk(number)
        data = await asyncio.to_thread(self.ours.chunks().fetch, chunk, threading.Event())
        assert data is not None
        assert len(data) == chunk.num_bytes


def _nobody_lies(peer: PeerId, chunk: object) -> None:
    raise AssertionError(f"{peer} is said to have sent a wrong chunk {chunk}")


Play = Callable[[Callable[[Pair], Coroutine[None, None, None]]], None]


@pytest.fixture
def play(checkpoint: Path, tmp_path: Path) -> Play:
    manifest = build_manifest(checkpoint, tmp_path / "theirs")

    async def run(act: Callable[[Pair], Coroutine[None, None, None]]) -> None:
        pair = Pair(manifest, checkpoint, tmp_path)
        serving = asyncio.create_task(pair.theirs.run())
        try:
            async with asyncio.timeout(DEADLINE_S):
                await act(pair)
        finally:
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)
            await pair.sources.aclose()
            for sharing in (pair.ours, pair.theirs):
                await sharing.close()
            for factory in (pair.near, pair.far):
                await asyncio.to_thread(factory.close)

    return lambda act: asyncio.run(run(act))


@contextlib.asynccontextmanager
async def strangers(port: int) -> AsyncIterator[Sequence[str]]:
    """Addresses that don't lead to the other node: nobody listens, somebody says nothing, somebody has another key."""
    mute = socket.create_server(("127.0.0.3", port))  # connections wait in its queue
    stranger: SocketFactory = socket_factory()
    router = stranger.bind_router("bulk", ["127.0.0.4"], port)
    try:
        yield "127.0.0.2", "127.0.0.3", "127.0.0.4"
    finally:
        router.close()
        await asyncio.to_thread(stranger.close)
        mute.close()


def test_a_node_is_reached_by_the_one_address_that_leads_to_it(play: Play) -> None:
    async def act(pair: Pair) -> None:
        pair.let_in()
        async with strangers(pair.theirs.port) as wrong:
            await pair.use([*wrong, "no-such-host.invalid", "127.0.0.1"])
            async with asyncio.timeout(2):  # in parallel, not one deadline after the other
                await pair.fetch(0)

    play(act)


def test_a_node_that_lets_us_in_late_is_asked_again(play: Play) -> None:
    async def act(pair: Pair) -> None:
        refused = asyncio.Event()
        loop = asyncio.get_running_loop()

        def on_refused() -> None:
            loop.call_soon_threadsafe(refused.set)

        knocking = pair.near.connect_dealer(
            f"tcp://127.0.0.1:{pair.theirs.port}", pair.far.public_key, OTHER, on_refused=on_refused
        )
        await pair.use(["127.0.0.1"])
        await refused.wait()  # and ours, which knocked at the same time
        knocking.close()
        fetching = asyncio.create_task(pair.fetch(0))
        pair.let_in()
        await fetching

    play(act)


def test_after_a_break_the_way_is_found_again(play: Play) -> None:
    async def act(pair: Pair) -> None:
        pair.let_in()
        await pair.use(["127.0.0.1"])
        await pair.fetch(0)
        for number in (1, 0):
            pair.far.punish(ME)
            await pair.fetch(number)

    play(act)


def test_after_a_load_its_sources_are_let_go(play: Play) -> None:
    """Also those that aren't there: nobody dials for ever whom it needs no more."""

    async def act(pair: Pair) -> None:
        before = asyncio.all_tasks()
        pair.let_in()
        await pair.use(["127.0.0.1"])
        await pair.fetch(0)
        assert len(pair.ours.links()) == 1
        await pair.sources.aclose()
        assert pair.ours.links() == []
        assert asyncio.all_tasks() == before

    play(act)


def test_dialing_that_fails_in_an_unforeseen_way_is_told_and_tried_again(
    play: Play, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def act(pair: Pair) -> None:
        dial, num_calls = pair.near.connect_dealer, itertools.count()

        def fail_once(*args: Any, **kwargs: Any) -> Port:
            if next(num_calls) == 0:
                raise OSError("too many open files")
            return dial(*args, **kwargs)

        monkeypatch.setattr(pair.near, "connect_dealer", fail_once)
        pair.let_in()
        await pair.use(["127.0.0.1"])
        await pair.fetch(0)

    play(act)
    assert "dialing failed, trying again peer=other.0" in caplog.text


def test_flood_of_bulk_messages_keeps_its_sender_out_for_a_while(play: Play) -> None:
    def flood(pair: Pair, port: Port) -> None:
        frames = frames_of(BulkCredit(transfer=1, credit=1))
        while not pair.far.registry._suspended:
            if port.socket.poll(10, zmq.POLLOUT):
                port.socket.send_multipart(frames, zmq.NOBLOCK)

    async def act(pair: Pair) -> None:
        pair.let_in()
        await pair.use(["127.0.0.1"])
        await pair.fetch(0)
        assert pair.theirs._server._toll is not None
        pair.theirs._server._toll._allowance = Allowance(share=0.1, burst_s=0.05)
        port = pair.near.connect_dealer(f"tcp://127.0.0.1:{pair.theirs.port}", pair.far.public_key, OTHER)
        try:
            await asyncio.to_thread(flood, pair, port)
            assert set(pair.far.registry._suspended) == {ME}
        finally:
            port.close()

    play(act)
