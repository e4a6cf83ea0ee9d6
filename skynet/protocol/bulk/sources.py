"""Where the bytes of a transfer come from and where they go."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Protocol

from skynet.errors import TransferFailed


class BulkSource(Protocol):
    """Bytes to send."""

    @property
    def size(self) -> int | None:
        """How many there are; None while that isn't known (a log that grows, an answer that streams)."""

    async def read(self, offset: int, num_bytes: int) -> bytes:
        """1 to `num_bytes` bytes from `offset`, waiting for them if they are still to come; b"" at the end.

        Raises a SkyNetError, which ends the transfer. May be cancelled.
        """

    def close(self) -> None:
        """Called once, however the transfer ends."""


class BulkSink(Protocol):
    """A place for bytes that a peer sends."""

    @property
    def offset(self) -> int:
        """How many bytes are here already, so that a broken transfer goes on from there."""

    async def write(self, offset: int, data: bytes) -> None:
        """Take the next bytes. Raises a SkyNetError, which ends the transfer."""

    async def finish(self, size: int) -> None:
        """All `size` bytes were written: check and keep them. Raises a SkyNetError."""

    def close(self) -> None:
        """Called once, however the transfer ends."""


class BytesSource:
    """Bytes in memory."""

    def __init__(self, data: bytes | memoryview) -> None:
        self._data = memoryview(data)
        self.size: int | None = len(self._data)

    async def read(self, offset: int, num_bytes: int) -> bytes:
        return bytes(self._data[offset : offset + num_bytes])

    def close(self) -> None:
        """Nothing to free."""


class FileSource:
    """A range of a file, read in a thread so that the event loop stays free."""

    def __init__(self, path: Path, offset: int = 0, size: int | None = None) -> None:
        """Opens the file. Raises TransferFailed (not_found, unreadable)."""
        self._path, self._offset = path, offset
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as exc:
            raise TransferFailed(f"{path.name}: no such file here", "not_found") from exc
        except OSError as exc:
            raise TransferFailed(f"{path.name}: can't be read: {exc.strerror}", "unreadable") from exc
        available = max(0, os.fstat(self._fd).st_size - offset)
        self.size: int | None = available if size is None else min(size, available)
        self._is_reading = self._is_closed = False

    async def read(self, offset: int, num_bytes: int) -> bytes:
        assert self.size is not None
        try:
            return await asyncio.to_thread(
                self._read, max(0, min(num_bytes, self.size - offset)), self._offset + offset
            )
        except OSError as exc:
            raise TransferFailed(f"{self._path.name}: can't be read: {exc.strerror}", "unreadable") from exc

    def _read(self, num_bytes: int, offset: int) -> bytes:
        self._is_reading = True
        try:
            return b"" if self._is_closed else os.pread(self._fd, num_bytes, offset)
        finally:
            self._is_reading = False
            if self._is_closed:
                self._close_file()

    def close(self) -> None:
        self._is_closed = True
        if not self._is_reading:  # a thread that outlives a cancelled read closes it instead
            self._close_file()

    def _close_file(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
