"""Bulk transfers between real sockets: every byte in order, within credit, resumed after a break, nothing left."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from skynet.errors import NotPermitted, TransferFailed
from skynet.protocol.bulk import BulkSource, BytesSource, FileSource
from skynet.protocol.bulk.flow import BulkConfig, OutFlow, frames_of
from skynet.protocol.bulk.messages import BulkCredit, BulkGet, BulkMessage
from skynet.protocol.codec import Buffer
from skynet.protocol.ids import PeerId

from .links import CLIENT, QUICK, Shelf, bulk_link

DEADLINE_S = 10.0
DATA = random.Random(1).randbytes(1_000_003)


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run one async test with a deadline."""

    async def bounded() -> None:
        async with asyncio.timeout(DEADLINE_S):
            await test()

    asyncio.run(bounded())


async def until(condition: Callable[[], bool]) -> None:
    """Let the loop turn until it holds; the test's deadline bounds it."""
    while not condition():  # noqa: ASYNC110 - what it looks at has no event to wait for
        await asyncio.sleep(0.005)


def test_a_fetch_brings_every_byte_and_names_its_authenticated_sender() -> None:
    async def test() -> None:
        shelf = Shelf(chunk=DATA, empty=b"")
        async with bulk_link(shelf) as link:
            assert await link.client.fetch("chunk") == DATA
            assert await link.client.fetch("chunk", 1000, 70_000) == DATA[1000:71_000]
            assert await link.client.fetch("chunk", len(DATA)) == b""
            assert await link.client.fetch("empty") == b""
            assert shelf.asked[0] == (CLIENT, "chunk")
            await until(lambda: shelf.num_open == link.server.num_transfers == 0)

    run(test)


def test_several_transfers_share_one_link() -> None:
    async def test() -> None:
        shelf = Shelf(chunk=DATA)
        async with bulk_link(shelf) as link:
            starts = range(0, 800_000, 100_000)
            got = await asyncio.gather(*(link.client.fetch("chunk", start, 200_000) for start in starts))
            assert got == [DATA[start : start + 200_000] for start in starts]

    run(test)


def test_what_is_not_there_is_not_found_and_what_lies_behind_the_end_is_refused() -> None:
    async def test() -> None:
        async with bulk_link(Shelf(chunk=DATA)) as link:
            for name, offset, code in (("absent", 0, "not_found"), ("chunk", len(DATA) + 1, "refused")):
                with pytest.raises(TransferFailed) as caught:
                    await link.client.fetch(name, offset)
                assert caught.value.code == code

    run(test)


def test_who_may_not_have_it_is_refused() -> None:
    async def test() -> None:
        shelf = Shelf(chunk=DATA)

        async def refuse(peer_id: PeerId, name: str) -> BulkSource | None:
            raise NotPermitted(f"{peer_id} may not have {name}")

        shelf.open_source = refuse  # type: ignore[method-assign]
        async with bulk_link(shelf) as link:
            with pytest.raises(TransferFailed, match="may not have chunk") as caught:
                await link.client.fetch("chunk")
            assert caught.value.code == "refused"

    run(test)


def test_more_than_the_caller_bargained_for_is_refused() -> None:
    async def test() -> None:
        async with bulk_link(Shelf(chunk=DATA)) as link:
            with pytest.raises(TransferFailed, match="more than 100000 bytes"):
                await link.client.fetch("chunk", max_bytes=100_000)
            await until(lambda: link.server.num_transfers == 0)

    run(test)


def test_a_sender_reads_no_more_than_the_credit_it_has() -> None:
    async def test() -> None:
        sent: list[tuple[BulkMessage, int]] = []

        def send(message: BulkMessage, data: Buffer) -> bool:
            sent.append((message, memoryview(data).nbytes))
            return True

        shelf = Shelf(chunk=DATA)
        source = await shelf.open_source(CLIENT, "chunk")
        assert source is not None
        flow = OutFlow(1, send, QUICK, credit=1 << 40)  # believed up to max_window_bytes only
        task = asyncio.create_task(flow.run(source, 0, None))
        await until(lambda: sum(n for _, n in sent) == QUICK.max_window_bytes)
        flow.on_credit(1000)
        await until(lambda: sum(n for _, n in sent) > QUICK.max_window_bytes)
        flow.on_credit(0)
        await asyncio.sleep(0)
        assert sum(n for _, n in sent) == source.end_read == QUICK.max_window_bytes + 1000  # type: ignore[attr-defined]
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    run(test)


def test_a_reader_that_vanished_or_stalls_frees_the_servers_state() -> None:
    async def test() -> None:
        shelf = Shelf(chunk=DATA)
        async with bulk_link(shelf) as link:
            silent = BulkGet(transfer=10**6, name="chunk", offset=0, size=None, credit=1000)
            stalled = BulkGet(transfer=10**6 + 1, name="chunk", offset=0, size=None, credit=1000)
            started = asyncio.get_running_loop().time()
            for message in (silent, stalled):
                link.client_port.send(frames_of(message))
            await until(lambda: link.server.num_transfers == 2)
            while link.server.num_transfers:  # one says that it is there, and takes nothing
                link.client_port.send(frames_of(BulkCredit(transfer=stalled.transfer, credit=0)))
                await asyncio.sleep(QUICK.keepalive_s)
            assert shelf.num_open == 0
            assert asyncio.get_running_loop().time() - started >= QUICK.stall_timeout_s

    run(test)


def test_transfers_beyond_the_bound_wait_their_turn() -> None:
    async def test() -> None:
        few = BulkConfig(block_bytes=16 << 10, window_bytes=64 << 10, keepalive_s=0.05, max_transfers_per_peer=2)
        shelf = Shelf(chunk=DATA)
        most = 0
        async with bulk_link(shelf, server_config=few) as link:
            fetches = [asyncio.create_task(link.client.fetch("chunk", 0, 300_000)) for _ in range(6)]
            while not all(f.done() for f in fetches):
                most = max(most, link.server.num_transfers)
                await asyncio.sleep(0.001)
            assert all(f.result() == DATA[:300_000] for f in fetches)
            assert most == 2

    run(test)


def test_a_transfer_goes_on_where_the_connection_broke() -> None:
    async def test() -> None:
        shelf = Shelf(chunk=DATA)
        offsets: list[int] = []
        async with bulk_link(shelf) as link:
            got = bytearray()
            cuts = {5: True, 20: True}
            async with contextlib.aclosing(link.client.stream("chunk")) as blocks:
                num_blocks = 0
                async for block in blocks:
                    got += block
                    num_blocks += 1
                    if cuts.pop(num_blocks, False):
                        link.server_sockets.guard.cut(CLIENT)  # the TCP connection, for real
                    offsets.append(len(got))
            assert got == DATA
            assert len(shelf.asked) >= 3  # asked again after each cut (and each silence), and not from the start:
            assert offsets == sorted(offsets)
            await until(lambda: shelf.num_open == 0)

    run(test)


def test_a_client_that_stops_listening_ends_the_transfer_at_the_server() -> None:
    async def test() -> None:
        shelf = Shelf(chunk=DATA)
        async with bulk_link(shelf) as link:
            async with contextlib.aclosing(link.client.stream("chunk")) as blocks:
                await anext(blocks)
            await until(lambda: link.server.num_transfers == shelf.num_open == 0)

    run(test)


class Growing:
    """A source of unknown length whose end is still to come."""

    size = None

    def __init__(self) -> None:
        self.parts: asyncio.Queue[bytes] = asyncio.Queue(maxsize=8)

    async def read(self, offset: int, num_bytes: int) -> bytes:
        return await self.parts.get()

    def close(self) -> None:
        """Nothing to free."""


def test_a_stream_stays_open_longer_than_the_idle_timeout_while_nothing_comes() -> None:
    async def test() -> None:
        shelf, growing = Shelf(), Growing()

        async def open_source(peer_id: PeerId, name: str) -> BulkSource | None:
            return growing

        shelf.open_source = open_source  # type: ignore[method-assign]
        async with bulk_link(shelf) as link, contextlib.aclosing(link.client.stream("log")) as blocks:
            growing.parts.put_nowait(b"one")
            assert await anext(blocks) == b"one"
            later = asyncio.get_running_loop().call_later(1.2 * QUICK.idle_timeout_s, growing.parts.put_nowait, b"two")
            assert await anext(blocks) == b"two"
            growing.parts.put_nowait(b"")
            with pytest.raises(StopAsyncIteration):
                await anext(blocks)
            later.cancel()
            await until(lambda: link.server.num_transfers == 0)

    run(test)


def test_an_upload_is_stored_whole_and_resumes_from_what_the_server_has() -> None:
    async def test() -> None:
        shelf = Shelf()
        async with bulk_link(shelf) as link:
            assert await link.client.upload("snapshot", BytesSource(DATA)) == len(DATA)
            assert shelf.sinks["snapshot"].data == DATA
            assert shelf.sinks["snapshot"].finished == len(DATA)
            started = shelf.sinks["half"] = type(shelf.sinks["snapshot"])()
            started.data += DATA[:500_000]
            source = await Shelf(x=DATA).open_source(CLIENT, "x")
            assert source is not None
            await link.client.upload("half", source)
            assert started.data == DATA

    run(test)


def test_a_file_range_is_served_and_a_missing_file_is_not_found(tmp_path: Path) -> None:
    async def test() -> None:
        path = tmp_path / "file"
        path.write_bytes(DATA)
        source = FileSource(path, 10, 1000)
        assert await source.read(990, 100) == DATA[1000:1010]
        assert await source.read(1000, 100) == b""
        source.close()
        assert FileSource(path, len(DATA) + 5).size == 0
        with pytest.raises(TransferFailed, match="absent: no such file") as caught:
            FileSource(tmp_path / "absent")
        assert caught.value.code == "not_found"

    run(test)


def test_garbage_from_a_peer_disturbs_no_other_transfer() -> None:
    async def test() -> None:
        shelf = Shelf(chunk=DATA)
        async with bulk_link(shelf) as link:
            fetch = asyncio.create_task(link.client.fetch("chunk"))
            for frames in (
                [b""],
                [b"\xc1" * 40],
                [b"x"] * 40,
                [frames_of(BulkCredit(transfer=1, credit=0))[0], b"more"],
            ):
                link.client_port.send(frames)
            assert await fetch == DATA

    run(test)
