"""The coordinator's Unix socket for its own user: one length-prefixed message each way. Its 0600 mode is the lock."""

from __future__ import annotations

import asyncio
import struct
from pathlib import Path
from typing import Final

from skynet.errors import MalformedMessage

SOCKET_NAME: Final = "admin.sock"
LENGTH: Final = struct.Struct(">I")
MAX_BYTES: Final = 1 << 20


def socket_path(config_dir: Path) -> Path:
    """Where a coordinator that keeps its keys in this directory listens for admins."""
    return config_dir / SOCKET_NAME


async def send_frame(writer: asyncio.StreamWriter, data: bytes) -> None:
    """One length-prefixed frame."""
    writer.write(LENGTH.pack(len(data)) + data)
    await writer.drain()


async def read_frame(reader: asyncio.StreamReader) -> bytes:
    """One length-prefixed frame. Raises MalformedMessage for one that is too long, EOFError at the end."""
    (length,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
    if length > MAX_BYTES:
        raise MalformedMessage(f"a command has at most {MAX_BYTES} bytes, this one {length}")
    return await reader.readexactly(length)
