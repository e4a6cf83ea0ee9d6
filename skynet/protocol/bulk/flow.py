"""The two halves of a transfer: OutFlow sends within credit, InFlow receives and grants it. Both sides use both."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from skynet.errors import TransferCode, TransferFailed
from skynet.protocol.bulk.messages import (
    MAX_BLOCK_BYTES,
    MAX_REASON_CHARS,
    BulkCredit,
    BulkData,
    BulkEnd,
    BulkError,
    BulkMessage,
)
from skynet.protocol.bulk.sources import BulkSource
from skynet.protocol.codec import Buffer, WireTensor, encode
from skynet.protocol.sockets import Received

T = TypeVar("T")
Send = Callable[[BulkMessage, Buffer], bool]  # False: the queue is full or the peer is gone


class MessagePort(Protocol):
    """What a transfer needs of a socket; `skynet.protocol.sockets.AsyncPort` is one."""

    async def receive(self) -> Received: ...

    def send(self, frames: Sequence[Any], routing_id: bytes = b"") -> bool: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class BulkConfig:
    """Limits of bulk transfers, the same on both sides."""

    block_bytes: int = 256 << 10  # of one message
    window_bytes: int = 2 << 20  # credit a receiver keeps granted
    max_window_bytes: int = 4 << 20  # credit a sender believes
    keepalive_s: float = 1.0  # each side says a word this often
    idle_timeout_s: float = 15.0  # a side that says nothing for so long is gone
    stall_timeout_s: float = 120.0  # a receiver that is there but takes nothing for so long is dropped
    retry_s: float = 0.02  # between two attempts to send into a full queue
    max_transfers: int = 64  # that a server serves at once
    max_transfers_per_peer: int = 16
    max_resumes: int = 8  # without a byte in between

    def __post_init__(self) -> None:
        if (
            not 0 < self.block_bytes <= min(self.window_bytes, MAX_BLOCK_BYTES)
            or self.window_bytes > self.max_window_bytes
        ):
            raise ValueError(f"blocks of {self.block_bytes} bytes must fit the window of {self.window_bytes} bytes")


def frames_of(message: BulkMessage, data: Buffer = b"") -> list[Buffer]:
    """A bulk message, with its bytes if it has any."""
    size = memoryview(data).nbytes
    return encode(message, [WireTensor("uint8", (size,), data)] if size else [])


def payload(tensors: Sequence[WireTensor]) -> bytes:
    """The bytes that came with a message; b"" if there were none."""
    return b"".join(bytes(t.data) for t in tensors)


def error_message(transfer: int, exc: BaseException, code: TransferCode = "unreadable") -> BulkError:
    """What to tell the other side about an exception."""
    return BulkError(transfer=transfer, code=getattr(exc, "code", code), reason=str(exc)[:MAX_REASON_CHARS])


class _Flow:
    """What both halves share: a failure from outside, and when the other side was last heard."""

    def __init__(self, transfer: int, send: Send, config: BulkConfig) -> None:
        self.transfer = transfer
        self._send = send
        self._config = config
        self._changed = asyncio.Event()
        self._failure: TransferFailed | None = None
        self.heard = self._now()

    def fail(self, failure: TransferFailed) -> None:
        """End this transfer; the first failure counts."""
        self._failure = self._failure or failure
        self._changed.set()

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    def _touch(self) -> None:
        self.heard = self._now()
        self._changed.set()

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._now() - self.heard > self._config.idle_timeout_s:
            raise TransferFailed(f"no word from the other side for {self._config.idle_timeout_s} s", "timeout")

    async def _wait(self) -> bool:
        """Wait for a change or the next keepalive; False for the latter."""
        try:
            async with asyncio.timeout(self._config.keepalive_s):
                await self._changed.wait()
        except TimeoutError:
            return False
        return True


class OutFlow(_Flow):
    """Sends a source's bytes. Reads one block at a time, and only what there is credit for."""

    def __init__(self, transfer: int, send: Send, config: BulkConfig, credit: int) -> None:
        super().__init__(transfer, send, config)
        self._credit = min(credit, config.max_window_bytes)
        self._took = self._now()  # when the receiver last granted something

    def on_credit(self, num_bytes: int) -> None:
        self._credit = min(self._credit + num_bytes, self._config.max_window_bytes)
        if num_bytes:
            self._took = self._now()
        self._touch()

    async def run(self, source: BulkSource, offset: int, size: int | None) -> int:
        """Send [offset, offset + size), or to the end, then BulkEnd; returns where it ended. Raises TransferFailed."""
        end = None if size is None else offset + size
        if source.size is not None:
            if offset > source.size:
                raise TransferFailed(f"offset {offset} lies behind the end at {source.size}", "refused")
            end = source.size if end is None else min(end, source.size)
        while end is None or offset < end:
            room = min(await self._room(offset), self._config.block_bytes)
            data = await self._while_alive(
                source.read(offset, room if end is None else min(room, end - offset)), offset
            )
            if not data:
                break
            self._credit -= len(data)
            await self._push(BulkData(transfer=self.transfer, offset=offset), data)
            offset += len(data)
        await self._push(BulkEnd(transfer=self.transfer, offset=offset), b"")
        return offset

    async def _room(self, offset: int) -> int:
        while self._credit <= 0:
            self._changed.clear()
            self._check_taking()
            if not await self._wait():
                self._send(BulkData(transfer=self.transfer, offset=offset), b"")
        self._check()
        return self._credit

    async def _while_alive(self, reading: Coroutine[Any, Any, T], offset: int) -> T:
        task = asyncio.ensure_future(reading)
        try:
            while not (await asyncio.wait({task}, timeout=self._config.keepalive_s))[0]:
                self._check()
                self._send(BulkData(transfer=self.transfer, offset=offset), b"")
            return task.result()
        finally:
            task.cancel()

    async def _push(self, message: BulkMessage, data: Buffer) -> None:
        while not self._send(message, data):
            self._check_taking()
            await asyncio.sleep(self._config.retry_s)

    def _check_taking(self) -> None:
        self._check()
        if self._now() - self._took > self._config.stall_timeout_s:
            raise TransferFailed(f"the receiver took nothing for {self._config.stall_timeout_s} s", "timeout")


class InFlow(_Flow):
    """Receives a row of bytes in order, and grants credit as its user takes them."""

    def __init__(self, transfer: int, send: Send, config: BulkConfig, offset: int) -> None:
        super().__init__(transfer, send, config)
        self._blocks: deque[bytes] = deque()  # bounded by the credit granted
        self._expected = offset
        self._granted = offset + config.window_bytes
        self._end: int | None = None

    def start_at(self, offset: int) -> None:
        """Expect the first byte there; before anything came."""
        self._expected, self._granted = offset, offset + self._config.window_bytes

    def on_data(self, offset: int, data: bytes) -> None:
        self._touch()
        if not data:
            return
        if offset != self._expected or self._end is not None:
            self.fail(TransferFailed(f"expected byte {self._expected}, got byte {offset}: some were lost", "broken"))
        elif offset + len(data) > self._granted:
            self.fail(TransferFailed(f"{offset + len(data) - self._granted} bytes more than granted", "refused"))
        else:
            self._expected += len(data)
            self._blocks.append(data)

    def on_end(self, offset: int) -> None:
        self._touch()
        self._end = offset
        if offset != self._expected:
            self.fail(TransferFailed(f"ended at byte {offset}, got {self._expected}: some were lost", "broken"))

    async def blocks(self) -> AsyncGenerator[bytes, None]:
        """The bytes, block by block, to the end. Raises TransferFailed, after handing out what came before."""
        ungranted = 0
        while True:
            while self._blocks:
                block = self._blocks.popleft()
                yield block
                ungranted += len(block)
                if ungranted >= self._config.window_bytes // 2:
                    self._granted += ungranted
                    self._send(BulkCredit(transfer=self.transfer, credit=ungranted), b"")
                    ungranted = 0
            self._changed.clear()
            self._check()
            if self._end is not None:
                return
            if not await self._wait():
                self._send(BulkCredit(transfer=self.transfer, credit=0), b"")
