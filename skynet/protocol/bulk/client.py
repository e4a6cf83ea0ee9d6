"""The asking side of bulk transfers: several at once over one socket, each resumed where it broke."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import AsyncGenerator
from typing import assert_never

from skynet.errors import ProtocolError, TransferFailed
from skynet.protocol.bulk.flow import BulkConfig, InFlow, MessagePort, OutFlow, frames_of, payload
from skynet.protocol.bulk.messages import (
    BulkCredit,
    BulkData,
    BulkEnd,
    BulkError,
    BulkGet,
    BulkMessage,
    BulkPut,
    BulkReady,
    client_decoder,
)
from skynet.protocol.bulk.sources import BulkSource
from skynet.protocol.codec import Buffer

logger = logging.getLogger(__name__)

MAX_FETCH_BYTES = 64 << 20
_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 1.0


class _Upload:
    """A put under way: answered by BulkReady, then by BulkEnd."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.ready: asyncio.Future[BulkReady] = loop.create_future()
        self.stored: asyncio.Future[int] = loop.create_future()
        self.flow: OutFlow | None = None

    def fail(self, failure: TransferFailed) -> None:
        if self.flow is not None:
            self.flow.fail(failure)
        for future in (self.ready, self.stored):
            if not future.done():
                future.set_exception(failure)
                future.exception()  # seen, even if nobody waits for this one


class BulkClient:
    """Fetches from and sends to one server. `run` must be running in a task of the owner's.

    Without a port every transfer waits a few seconds for one: see `attach`.
    """

    def __init__(self, port: MessagePort | None = None, *, config: BulkConfig | None = None) -> None:
        self._port = port
        self._config = config or BulkConfig()
        self._decoder = client_decoder()
        self._transfers: dict[int, InFlow | _Upload] = {}
        self._numbers = itertools.count(1)

    async def run(self) -> None:
        """Receive until cancelled; then what is under way fails, as cancelled unless the link was lost before."""
        assert self._port is not None
        port = self._port
        try:
            while True:
                received = await port.receive()
                try:
                    self._handle([frame.buffer for frame in received.frames])
                except ProtocolError as exc:
                    logger.warning("bulk answer refused peer=%s reason=%s", received.peer_id, exc)
                    self._fail_all(TransferFailed(f"{received.peer_id}: {exc}", "refused"))
        finally:
            self._fail_all(TransferFailed("this side closed the link", "cancelled"))

    def attach(self, port: MessagePort | None) -> None:
        """Use this port from now on; run `run` anew for it. None: there is no way to the server just now."""
        self._port = port

    @property
    def is_attached(self) -> bool:
        """Whether there is a way to the server."""
        return self._port is not None

    def link_lost(self) -> None:
        """The connection broke (the socket's monitor says so): resume at once instead of after a silence."""
        self._fail_all(TransferFailed("the connection broke", "broken"))

    async def fetch(
        self,
        name: str,
        offset: int = 0,
        size: int | None = None,
        *,
        into: bytearray | None = None,
        max_bytes: int = MAX_FETCH_BYTES,
    ) -> bytearray:
        """Those bytes of `name`, appended to `into` if given: after a failure it holds what came, to go on from there.

        Raises TransferFailed (code not_found, refused, busy, unreadable, timeout, broken).
        """
        data = bytearray() if into is None else into
        async with contextlib.aclosing(self.stream(name, offset, size)) as blocks:
            async for block in blocks:
                if len(data) + len(block) > max_bytes:
                    raise TransferFailed(f"{name}: more than {max_bytes} bytes", "refused")
                data += block
        return data

    async def stream(self, name: str, offset: int = 0, size: int | None = None) -> AsyncGenerator[bytes, None]:
        """Those bytes block by block; resumes where it broke. Close it (`aclosing`). Raises TransferFailed."""
        end, failures = None if size is None else offset + size, 0
        while True:
            transfer = next(self._numbers)
            flow = self._transfers[transfer] = InFlow(transfer, self._send, self._config, offset)
            is_over = False
            try:
                left = None if end is None else end - offset
                self._open(
                    BulkGet(transfer=transfer, name=name, offset=offset, size=left, credit=self._config.window_bytes)
                )
                async with contextlib.aclosing(flow.blocks()) as blocks:
                    async for block in blocks:
                        offset, failures = offset + len(block), 0
                        yield block
                is_over = True
                return
            except TransferFailed as exc:
                is_over = exc.code != "timeout"
                failures += 1
                await self._pause(exc, failures)
            finally:
                self._transfers.pop(transfer, None)
                if not is_over:
                    self._send(BulkError(transfer=transfer, code="cancelled", reason="no longer wanted"), b"")

    async def upload(self, name: str, source: BulkSource) -> int:
        """Send a source's bytes; returns their number once the server stored them. Resumes where that one is.

        Doesn't close the source. Raises TransferFailed.
        """
        failures = 0
        while True:
            transfer = next(self._numbers)
            upload = self._transfers[transfer] = _Upload()
            try:
                self._open(BulkPut(transfer=transfer, name=name, size=source.size))
                return await self._upload(transfer, upload, source)
            except TransferFailed as exc:
                failures += 1
                await self._pause(exc, failures)
            finally:
                if self._transfers.pop(transfer, None) is not None and not upload.stored.done():
                    self._send(BulkError(transfer=transfer, code="cancelled", reason="no longer wanted"), b"")

    async def _upload(self, transfer: int, upload: _Upload, source: BulkSource) -> int:
        try:
            async with asyncio.timeout(self._config.idle_timeout_s):
                ready = await upload.ready
            upload.flow = OutFlow(transfer, self._send, self._config, ready.credit)
            await upload.flow.run(source, ready.offset, None)
            async with asyncio.timeout(self._config.stall_timeout_s):
                return await upload.stored
        except TimeoutError as exc:
            raise TransferFailed("the server doesn't answer", "timeout") from exc

    async def _pause(self, exc: TransferFailed, failures: int) -> None:
        """Before another attempt, where one may help; else raise."""
        if exc.code not in ("broken", "busy") or failures > self._config.max_resumes:
            raise exc
        await asyncio.sleep(min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2 ** (failures - 1)))

    def _send(self, message: BulkMessage, data: Buffer) -> bool:
        return self._port is not None and self._port.send(frames_of(message, data))

    def _open(self, message: BulkGet | BulkPut) -> None:
        if not self._send(message, b""):
            raise TransferFailed("no way to this peer, or its queue is full", "busy")

    def _fail_all(self, failure: TransferFailed) -> None:
        for transfer in self._transfers.values():
            transfer.fail(failure)

    def _handle(self, frames: list[memoryview]) -> None:
        message, tensors = self._decoder.decode(frames)
        running = self._transfers.get(message.transfer)
        match message:
            case BulkError(code=code, reason=reason):
                if running is not None:
                    running.fail(TransferFailed(reason, code))
            case BulkData(offset=offset):
                if isinstance(running, InFlow):
                    running.on_data(offset, payload(tensors))
            case BulkEnd(offset=offset):
                if isinstance(running, InFlow):
                    running.on_end(offset)
                elif running is not None and not running.stored.done():
                    running.stored.set_result(offset)
            case BulkReady():
                if isinstance(running, _Upload) and not running.ready.done():
                    running.ready.set_result(message)
            case BulkCredit(credit=credit):
                if isinstance(running, _Upload) and running.flow is not None:
                    running.flow.on_credit(credit)
            case _:
                assert_never(message)
