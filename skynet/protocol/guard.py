"""Watches every TCP connection: says when one ends, bounds what one can make us buffer, cuts one off.

libzmq's high-water mark counts whole messages, so an admitted peer that never ends a multipart message grows our
memory without bound. But the kernel counts the bytes a connection received (TCP_INFO), and each frame that reaches us
names its connection (SRCFD), so the difference is what libzmq holds. When that exceeds the bound, the connection is
shut down with shutdown(2) on a duplicate of its descriptor; libzmq then sees an ordinary disconnect and frees what it
held. Where the kernel doesn't tell (not Linux) the bound isn't enforced, and `GuardThread.is_bounding` says so.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import zmq
from zmq.utils.monitor import parse_monitor_message

from skynet.protocol.admitted import PeerRegistry
from skynet.protocol.ids import PeerId
from skynet.protocol.tcp import TcpConnection, bytes_received, host_of, shut_down

logger = logging.getLogger(__name__)

_REFUSALS: Final = frozenset(
    {zmq.Event.HANDSHAKE_FAILED_AUTH, zmq.Event.HANDSHAKE_FAILED_PROTOCOL, zmq.Event.HANDSHAKE_FAILED_NO_DETAIL}
)
_HANDSHAKE_BYTES: Final = 4096  # greeting, CURVE and READY, with room
_SECONDS_PER_CONNECTION: Final = 50e-6  # looking at one costs about 3 us; keep that to a few per cent of a core
SUSPEND_S: Final = 60.0  # how long a peer that overflowed us isn't let in again


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardConfig:
    """How much a connection may make us buffer."""

    max_undelivered_bytes: int = 128 << 20  # received by the kernel and not yet read by the application
    # Before its first frame is read a connection may still be a stranger, so every peer starts with a small message
    # and waits for an answer before it sends more than this.
    max_unidentified_bytes: int = 1 << 20
    max_unidentified: int = 512  # connections per socket that haven't sent a frame yet
    max_unidentified_per_host: int = 64
    interval_s: float = 0.05  # between two looks at the counters; 0.005 while a connection is unidentified


def frame_wire_bytes(payload_bytes: int) -> int:
    """What one frame takes on a CURVE connection: ZMTP flags and length, MESSAGE, nonce, box, flags byte."""
    return payload_bytes + (35 if payload_bytes <= 222 else 42)  # a body of up to 255 bytes has a short length


@dataclass(slots=True)
class Credit:
    """What one connection delivered to the application. Written by the socket's own thread alone."""

    peer_id: PeerId
    num_bytes: int = 0


@dataclass(slots=True, eq=False)
class Watch:
    """One watched socket. `credits` belongs to the socket's thread, the rest to the guard's."""

    domain: str
    monitor: zmq.Socket[bytes]
    peer_id: PeerId | None = None  # the pinned server, for a dialling socket
    on_connected: Callable[[], None] | None = None  # handshake done; called in the guard's thread
    on_refused: Callable[[], None] | None = None  # libzmq doesn't try again after this; called in the guard's thread
    on_disconnected: Callable[[PeerId, int], None] | None = None  # peer and connection; in the guard's thread
    credits: dict[int, Credit] = field(default_factory=dict)  # by fd
    connections: dict[int, TcpConnection] = field(default_factory=dict)

    def delivered(self, fd: int, peer_id: PeerId, wire_bytes: int) -> None:
        """The application read this much from the connection. Called by the socket's thread for each message."""
        credit = self.credits.get(fd)
        if credit is None or credit.peer_id != peer_id:
            credit = self.credits[fd] = Credit(peer_id)
        credit.num_bytes += wire_bytes


class GuardThread:
    """Owns the monitor ends of all watched sockets; `wake_sender` and `wake_receiver` are an inproc pair."""

    is_bounding: Final = sys.platform == "linux"

    def __init__(
        self,
        registry: PeerRegistry,
        wake_sender: zmq.Socket[bytes],
        wake_receiver: zmq.Socket[bytes],
        config: GuardConfig,
    ) -> None:
        self._registry = registry
        self._wake_sender = wake_sender
        self._wake_receiver = wake_receiver
        self._config = config
        self._lock = threading.Lock()  # of the wake sender
        self._added: deque[Watch] = deque()
        self._cuts: deque[PeerId] = deque()
        self._watches: dict[zmq.Socket[bytes], Watch] = {}
        self._num_cut = 0
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="guard", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float = 5.0) -> None:
        """Stop watching and wait for the thread."""
        self._is_stopping = True
        self._wake()
        self._thread.join(timeout_s)
        with self._lock:
            self._wake_sender.close(linger=0)

    def add(self, watch: Watch) -> None:
        """Watch this socket from now on; the guard owns `watch.monitor` and closes it when its socket closes."""
        self._added.append(watch)
        self._wake()

    def cut(self, peer_id: PeerId) -> None:
        """Shut down every live connection of this peer, and those that haven't said yet who they are."""
        self._cuts.append(peer_id)
        self._wake()

    @property
    def num_cut(self) -> int:
        """Connections shut down so far, for overflowing or because their peer was removed."""
        return self._num_cut

    def _wake(self) -> None:
        with self._lock:
            if not self._wake_sender.closed:
                with contextlib.suppress(zmq.Again):  # full: it has plenty of wake-ups to read already
                    self._wake_sender.send(b"", zmq.NOBLOCK)

    # -- the guard's thread -------------------------------------------------------------------------------------------

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._wake_receiver, zmq.POLLIN)
        next_look = 0.0
        try:
            while not self._is_stopping:
                for ready, _ in poller.poll(self._wait_ms(next_look)):
                    self._handle(ready, poller)
                self._take_orders(poller)
                now = time.monotonic()
                if now >= next_look and self.is_bounding:
                    next_look = now + self._look(now)
        except Exception:
            logger.critical("guard ended: lost connections go unseen and buffers unbounded; restart", exc_info=True)
        finally:
            for monitor in self._watches:
                monitor.close(linger=0)
            self._wake_receiver.close(linger=0)

    def _wait_ms(self, next_look: float) -> int:
        if not any(watch.connections for watch in self._watches.values()):
            return 1000
        return max(0, min(1000, int((next_look - time.monotonic()) * 1000) + 1))

    def _take_orders(self, poller: zmq.Poller) -> None:
        while self._added:
            watch = self._added.popleft()
            self._watches[watch.monitor] = watch
            poller.register(watch.monitor, zmq.POLLIN)
        while self._cuts:
            self._cut_now(self._cuts.popleft())

    def _handle(self, ready: zmq.Socket[bytes], poller: zmq.Poller) -> None:
        if ready is self._wake_receiver:
            while ready.poll(0):
                ready.recv()
            return
        watch = self._watches[ready]
        while ready.poll(0):
            event = parse_monitor_message(ready.recv_multipart())
            if event["event"] == zmq.Event.MONITOR_STOPPED:
                poller.unregister(ready)
                del self._watches[ready]
                ready.close(linger=0)
                break
            self._event(watch, event["event"], int(event["value"]))

    def _event(self, watch: Watch, event: int, value: int) -> None:
        if event in (zmq.Event.ACCEPTED, zmq.Event.CONNECTED):
            try:
                seen = os.fstat(value)
            except OSError:
                return  # already closed; its DISCONNECTED follows
            if not stat.S_ISSOCK(seen.st_mode):
                return  # closed, and the number used again for a file
            connection = TcpConnection(value, seen.st_ino, is_accepted=event == zmq.Event.ACCEPTED)
            connection.host = host_of(connection)
            watch.connections[value] = connection
            if connection.is_accepted and self._is_crowded(watch, connection.host):
                logger.info("too many silent connections domain=%s host=%s, one refused", watch.domain, connection.host)
                self._shut(connection)
        elif event == zmq.Event.HANDSHAKE_SUCCEEDED and watch.on_connected is not None:
            watch.on_connected()
        elif event in _REFUSALS and watch.on_refused is not None:
            watch.on_refused()
        elif event == zmq.Event.DISCONNECTED:
            watch.connections.pop(value, None)
            credit = watch.credits.pop(value, None)
            peer_id = watch.peer_id if credit is None else credit.peer_id
            if peer_id is not None and watch.on_disconnected is not None:
                watch.on_disconnected(peer_id, value)

    def _is_crowded(self, watch: Watch, host: str) -> bool:
        silent = [c.host for fd, c in watch.connections.items() if c.is_accepted and fd not in watch.credits]
        return (
            len(silent) > self._config.max_unidentified or silent.count(host) > self._config.max_unidentified_per_host
        )

    def _look(self, now: float) -> float:
        """Compare every connection's counters; returns the seconds until the next look is due."""
        num_connections, has_stranger = 0, False
        for watch in self._watches.values():
            for fd, connection in watch.connections.items():
                num_connections += 1
                credit = watch.credits.get(fd)
                delivered = 0 if credit is None else credit.num_bytes
                received = bytes_received(connection)
                is_stranger = credit is None and connection.is_accepted
                has_stranger |= is_stranger
                bound = self._config.max_unidentified_bytes if is_stranger else self._config.max_undelivered_bytes
                if received is not None and not connection.is_cut and received - delivered > bound + _HANDSHAKE_BYTES:
                    self._overflow(watch, connection, credit, received - delivered, now)
        interval = 0.005 if has_stranger else self._config.interval_s
        return max(interval, num_connections * _SECONDS_PER_CONNECTION)

    def _overflow(
        self, watch: Watch, connection: TcpConnection, credit: Credit | None, undelivered: int, now: float
    ) -> None:
        peer_id = watch.peer_id if credit is None else credit.peer_id
        level = logging.INFO if peer_id is None else logging.WARNING  # strangers don't fill the log
        logger.log(level, "connection cut domain=%s peer=%s undelivered_bytes=%d", watch.domain, peer_id, undelivered)
        if peer_id is not None:
            self._registry.suspend(peer_id, now + SUSPEND_S)
        self._shut(connection)

    def _cut_now(self, peer_id: PeerId) -> None:
        for watch in self._watches.values():
            for fd, connection in watch.connections.items():
                credit = watch.credits.get(fd)
                owner = watch.peer_id if credit is None else credit.peer_id
                if owner == peer_id or owner is None:
                    self._shut(connection)

    def _shut(self, connection: TcpConnection) -> None:
        if not connection.is_cut:
            connection.is_cut = True
            self._num_cut += 1
            shut_down(connection)
