"""A TCP connection of libzmq's, seen and ended through the kernel."""

from __future__ import annotations

import errno
import os
import socket as sockets
import stat
import struct
from dataclasses import dataclass
from typing import Final

_BYTES_RECEIVED: Final = struct.Struct("=Q")  # struct tcp_info, Linux 4.1 on
_BYTES_RECEIVED_OFFSET: Final = 128


@dataclass(slots=True)
class TcpConnection:
    """Held by the guard thread. The inode tells this TCP socket from a later one with the same descriptor."""

    fd: int
    inode: int
    is_accepted: bool
    host: str = ""
    is_cut: bool = False


def bytes_received(connection: TcpConnection) -> int | None:
    """The kernel's count, None if the descriptor is no longer this connection."""
    with _duplicate(connection) as duplicate:
        if duplicate is None:
            return None
        try:
            info = duplicate.getsockopt(sockets.IPPROTO_TCP, sockets.TCP_INFO, 256)
        except OSError:
            return None
    if len(info) < _BYTES_RECEIVED_OFFSET + 8:
        return None
    count: int = _BYTES_RECEIVED.unpack_from(info, _BYTES_RECEIVED_OFFSET)[0]
    return count


class _duplicate:  # noqa: N801  (reads as a function)
    """The connection's TCP socket under a descriptor of our own, or None if libzmq closed it meanwhile."""

    def __init__(self, connection: TcpConnection) -> None:
        self._connection = connection
        self._socket: sockets.socket | None = None

    def __enter__(self) -> sockets.socket | None:
        try:
            fd = os.dup(self._connection.fd)
        except OSError:
            return None
        seen = os.fstat(fd)
        if seen.st_ino != self._connection.inode or not stat.S_ISSOCK(seen.st_mode):  # closed, the number used again
            os.close(fd)
            return None
        duplicate = sockets.socket(fileno=fd)
        if duplicate.family not in (sockets.AF_INET, sockets.AF_INET6):
            duplicate.close()
            return None
        self._socket = duplicate
        return duplicate

    def __exit__(self, *_: object) -> None:
        if self._socket is not None:
            self._socket.close()


def shut_down(connection: TcpConnection) -> None:
    with _duplicate(connection) as duplicate:
        if duplicate is None:
            return
        try:
            duplicate.shutdown(sockets.SHUT_RDWR)
        except OSError as exc:
            if exc.errno != errno.ENOTCONN:  # it ended by itself
                raise


def host_of(connection: TcpConnection) -> str:
    with _duplicate(connection) as duplicate:
        if duplicate is None:
            return ""
        try:
            return str(duplicate.getpeername()[0])
        except OSError:
            return ""
