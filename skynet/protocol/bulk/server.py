"""The serving side of bulk transfers: one per listening socket, one task per transfer, all bounded."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import assert_never

from skynet.errors import NotPermitted, ProtocolError, SkyNetError, TransferFailed
from skynet.protocol.bulk.flow import BulkConfig, InFlow, MessagePort, OutFlow, Send, error_message, frames_of, payload
from skynet.protocol.bulk.messages import (
    BulkCredit,
    BulkData,
    BulkEnd,
    BulkError,
    BulkGet,
    BulkPut,
    BulkReady,
    server_decoder,
)
from skynet.protocol.bulk.sources import BulkSink, BulkSource
from skynet.protocol.ids import PeerId
from skynet.protocol.sockets import Received
from skynet.protocol.toll import Toll

logger = logging.getLogger(__name__)

OpenSource = Callable[[PeerId, str], Awaitable[BulkSource | None]]  # None: there is no such thing here
OpenSink = Callable[[PeerId, str, int | None], Awaitable[BulkSink]]
Key = tuple[bytes, int]  # routing id, transfer


@dataclass(slots=True)
class _Transfer:
    peer_id: PeerId
    flow: OutFlow | InFlow
    task: asyncio.Task[None]


class BulkServer:
    """Serves and takes named bytes. `open_source` and `open_sink` decide who may: they raise NotPermitted.

    They see the authenticated sender. Memory: at most max_transfers windows, and what each source holds.
    """

    def __init__(
        self,
        port: MessagePort,
        open_source: OpenSource,
        open_sink: OpenSink | None = None,
        *,
        config: BulkConfig | None = None,
        on_protocol_error: Callable[[PeerId], None] | None = None,
        toll: Toll | None = None,
    ) -> None:
        self._port = port
        self._open_source = open_source
        self._open_sink = open_sink
        self._config = config or BulkConfig()
        self._on_protocol_error = on_protocol_error
        self._toll = toll
        self._decoder = server_decoder()
        self._transfers: dict[Key, _Transfer] = {}

    @property
    def num_transfers(self) -> int:
        """Transfers under way."""
        return len(self._transfers)

    async def run(self) -> None:
        """Serve until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                received = await self._port.receive()
                if self._toll is None:
                    self._take_message(received, tasks)
                else:
                    self._toll.charge(received.peer_id, partial(self._take_message, received, tasks))

    def drop_peer(self, peer_id: PeerId) -> None:
        """End every transfer of a peer that is gone or no longer welcome."""
        for transfer in list(self._transfers.values()):
            if transfer.peer_id == peer_id:
                transfer.flow.fail(TransferFailed(f"{peer_id} is gone", "cancelled"))

    def _take_message(self, received: Received, tasks: asyncio.TaskGroup) -> None:
        try:
            self._handle(received, tasks)
        except ProtocolError as exc:
            logger.warning("bulk message refused peer=%s reason=%s", received.peer_id, exc)
            if self._on_protocol_error is not None:
                self._on_protocol_error(received.peer_id)

    def _handle(self, received: Received, tasks: asyncio.TaskGroup) -> None:
        message, tensors = self._decoder.decode([frame.buffer for frame in received.frames])
        key = (received.routing_id, message.transfer)
        running = self._transfers.get(key)
        match message:
            case BulkGet() | BulkPut():
                if running is None:  # else sent twice
                    self._start(received, message, tasks)
            case BulkCredit() | BulkData() | BulkEnd() if running is None:
                self._sender(received.routing_id)(
                    BulkError(transfer=message.transfer, code="broken", reason="no such transfer here (any more)"), b""
                )
            case BulkCredit(credit=credit):
                if running is not None and isinstance(running.flow, OutFlow):
                    running.flow.on_credit(credit)
            case BulkData(offset=offset):
                if running is not None and isinstance(running.flow, InFlow):
                    running.flow.on_data(offset, payload(tensors))
            case BulkEnd(offset=offset):
                if running is not None and isinstance(running.flow, InFlow):
                    running.flow.on_end(offset)
            case BulkError(code=code, reason=reason):
                if running is not None:
                    running.flow.fail(TransferFailed(f"{received.peer_id}: {reason}", code))
            case _:
                assert_never(message)

    def _sender(self, routing_id: bytes) -> Send:
        return lambda message, data: self._port.send(frames_of(message, data), routing_id)

    def _start(self, received: Received, message: BulkGet | BulkPut, tasks: asyncio.TaskGroup) -> None:
        send, key = self._sender(received.routing_id), (received.routing_id, message.transfer)
        if (problem := self._why_not(received.peer_id)) is not None:
            send(BulkError(transfer=message.transfer, code="busy", reason=problem), b"")
            return
        flow: OutFlow | InFlow
        work: Callable[[], Awaitable[None]]
        if isinstance(message, BulkGet):
            flow = OutFlow(message.transfer, send, self._config, message.credit)
            work = partial(self._serve, received.peer_id, message, flow)
        else:
            flow = InFlow(message.transfer, send, self._config, 0)
            work = partial(self._take, received.peer_id, message, flow, send)
        task = tasks.create_task(
            self._contain(key, received.peer_id, message.name, work, send), name=f"bulk-{message.name}"
        )
        self._transfers[key] = _Transfer(received.peer_id, flow, task)

    def _why_not(self, peer_id: PeerId) -> str | None:
        """Transfers that a reconnected peer left behind make room for its new ones."""
        of_peer = [t for t in self._transfers.values() if t.peer_id == peer_id]
        if len(of_peer) >= self._config.max_transfers_per_peer:
            now = asyncio.get_running_loop().time()
            for transfer in of_peer:
                if now - transfer.flow.heard > 3 * self._config.keepalive_s:
                    transfer.flow.fail(TransferFailed("abandoned", "timeout"))
            return (
                f"{len(of_peer)} transfers are under way for you, at most {self._config.max_transfers_per_peer} may be"
            )
        if len(self._transfers) >= self._config.max_transfers:
            return f"{len(self._transfers)} transfers are under way, at most {self._config.max_transfers} may be"
        return None

    async def _contain(
        self, key: Key, peer_id: PeerId, name: str, work: Callable[[], Awaitable[None]], send: Send
    ) -> None:
        """Run one transfer; whatever goes wrong ends it alone."""
        try:
            await work()
        except TransferFailed as exc:
            logger.debug("bulk transfer ended peer=%s name=%s code=%s reason=%s", peer_id, name, exc.code, exc)
            if exc.code not in ("cancelled", "timeout"):
                send(error_message(key[1], exc), b"")
        except SkyNetError as exc:
            logger.info("bulk transfer failed peer=%s name=%s reason=%s", peer_id, name, exc)
            send(error_message(key[1], exc, "refused" if isinstance(exc, NotPermitted) else "unreadable"), b"")
        except Exception:
            logger.exception("bulk transfer failed peer=%s name=%s", peer_id, name)
            send(BulkError(transfer=key[1], code="unreadable", reason="internal error; its log says more"), b"")
        finally:
            self._transfers.pop(key, None)

    async def _serve(self, peer_id: PeerId, message: BulkGet, flow: OutFlow) -> None:
        source = await self._open_source(peer_id, message.name)
        if source is None:
            raise TransferFailed(f"{message.name}: not here", "not_found")
        try:
            await flow.run(source, message.offset, message.size)
        finally:
            source.close()

    async def _take(self, peer_id: PeerId, message: BulkPut, flow: InFlow, send: Send) -> None:
        if self._open_sink is None:
            raise TransferFailed(f"{message.name}: nothing can be sent here", "refused")
        sink = await self._open_sink(peer_id, message.name, message.size)
        try:
            offset = sink.offset
            flow.start_at(offset)
            send(BulkReady(transfer=message.transfer, offset=offset, credit=self._config.window_bytes), b"")
            async for block in flow.blocks():
                if message.size is not None and offset + len(block) > message.size:
                    raise TransferFailed(f"{message.name}: more bytes than the {message.size} announced", "refused")
                await sink.write(offset, block)
                offset += len(block)
            if message.size not in (None, offset):
                raise TransferFailed(f"{message.name}: {offset} bytes, {message.size} were announced", "refused")
            await sink.finish(offset)
            send(BulkEnd(transfer=message.transfer, offset=offset), b"")
        finally:
            sink.close()
