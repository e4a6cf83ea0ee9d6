"""A TCP connection, seen and ended through the kernel, which acknowledges whether or not its process runs.

A connection that carries nothing is probed by TCP keepalive. One that carries something isn't: TCP_USER_TIMEOUT would
end it, but ends a living peer's too whose buffers are full, so we look ourselves who answers the kernel's repetitions.
"""

from __future__ import annotations

import errno
import os
import socket as sockets
import stat
import struct
import time
from dataclasses import dataclass, field
from typing import Final, NamedTuple

# Of struct tcp_info: retransmits, probes; unacked, ms since the last ACK; bytes_received (Linux 4.1), snd_wnd (5.4).
_INFO: Final = struct.Struct("=2xBB20xI28xI68xQ92xI")
_MIN_INFO_BYTES: Final = 136
_MIN_UNANSWERED: Final = 2  # the last one's answer may be on its way
PROBE_S: Final = 1  # an idle connection is probed this often


@dataclass(slots=True)
class TcpConnection:
    """The inode tells this TCP socket from a later one with the same descriptor."""

    fd: int
    inode: int
    is_accepted: bool
    opened_at: float = field(default_factory=time.monotonic)
    host: str = ""
    is_cut: bool = False


class TcpState(NamedTuple):
    """What the kernel knows of a connection."""

    bytes_received: int
    num_unanswered: int  # repetitions of data, or questions for room, that its kernel owes us an answer to
    silent_s: float  # since its kernel last acknowledged anything

    def is_dead(self, after_s: float) -> bool:
        """Whether the way or the other host is gone. A process that doesn't read isn't: its kernel answers."""
        return self.num_unanswered >= _MIN_UNANSWERED and self.silent_s >= after_s


def probe_when_idle(socket: sockets.socket, dead_s: int) -> None:
    """Have the kernel end this connection when its peer's kernel answers nothing for so long while it is idle."""
    socket.setsockopt(sockets.SOL_SOCKET, sockets.SO_KEEPALIVE, 1)
    names = {"TCP_KEEPIDLE": PROBE_S, "TCP_KEEPINTVL": PROBE_S, "TCP_KEEPCNT": num_probes(dead_s)}
    for name, value in names.items():
        if option := getattr(sockets, name, None):  # macOS lacks some
            socket.setsockopt(sockets.IPPROTO_TCP, option, value)


def num_probes(dead_s: int) -> int:
    """How many unanswered ones end an idle connection."""
    return max(1, dead_s // PROBE_S - 1)


def tcp_state(connection: TcpConnection) -> TcpState | None:
    """What the kernel says now; None if the descriptor is no longer this connection."""
    with _duplicate(connection) as duplicate:
        if duplicate is None:
            return None
        try:
            info = duplicate.getsockopt(sockets.IPPROTO_TCP, sockets.TCP_INFO, 256)
        except OSError:
            return None
    if len(info) < _MIN_INFO_BYTES:
        return None
    whole = info.ljust(_INFO.size, b"\0")
    num_repeated, num_probed, num_unacknowledged, silent_ms, num_bytes, window = _INFO.unpack_from(whole)
    # With no room left at the other side, only what it says to probes counts.
    num_unanswered = (num_repeated if window else 0) if num_unacknowledged else num_probed
    return TcpState(num_bytes, num_unanswered, silent_ms / 1000)


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
    """End it both ways; whoever owns the socket sees an ordinary end."""
    with _duplicate(connection) as duplicate:
        if duplicate is None:
            return
        try:
            duplicate.shutdown(sockets.SHUT_RDWR)
        except OSError as exc:
            if exc.errno != errno.ENOTCONN:  # it ended by itself
                raise


def host_of(connection: TcpConnection) -> str:
    """The peer's address, "" if the connection is gone."""
    with _duplicate(connection) as duplicate:
        if duplicate is None:
            return ""
        try:
            return str(duplicate.getpeername()[0])
        except OSError:
            return ""
