"""Watches every TCP connection: says when one ends or is dead, bounds what one can make us buffer, cuts one off.

libzmq's high-water mark counts whole messages, so an admitted peer that never ends a multipart message grows our
memory without bound. But the kernel counts the bytes a connection received (TCP_INFO), and each frame that reaches us
names its connection (SRCFD), so the difference is what libzmq holds. When that exceeds the bound, the connection is
shut down with shutdown(2) on a duplicate of its descriptor; libzmq then sees an ordinary disconnect and frees what it
held. A connection whose peer's kernel answers nothing any more is ended the same way (tcp.py). Where the kernel doesn't
tell (not Linux) neither is done, and `GuardThread.is_bounding` says so. Should this thread fail, the process ends.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket as sockets
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

from skynet.errors import SkyNetError
from skynet.protocol.admitted import PeerRegistry
from skynet.protocol.ids import PeerId
from skynet.protocol.tcp import TcpConnection, TcpState, host_of, probe_when_idle, shut_down, tcp_state

logger = logging.getLogger(__name__)

_REFUSALS: Final = frozenset(
    {zmq.Event.HANDSHAKE_FAILED_AUTH, zmq.Event.HANDSHAKE_FAILED_PROTOCOL, zmq.Event.HANDSHAKE_FAILED_NO_DETAIL}
)
_HANDSHAKE_BYTES: Final = 4096  # greeting, CURVE and READY, with room
_SECONDS_PER_CONNECTION: Final = 50e-6  # looking at one costs about 3 us; keep that to a few per cent of a core
SUSPEND_S: Final = 60.0  # how long a peer that overflowed us isn't let in again


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardConfig:
    """How much a connection may make us buffer, and how long its peer may be dead."""

    max_undelivered_bytes: int = 128 << 20  # received by the kernel and not yet read by the application
    # Before its first frame is read a connection may still be a stranger, so every peer starts with a small message
    # and waits for an answer before it sends more than this.
    max_unidentified_bytes: int = 1 << 20
    max_unidentified: int = 512  # connections per socket that haven't sent a frame yet
    max_unidentified_per_host: int = 64
    dead_peer_s: int = 4  # no sign of life from the peer's kernel for this long ends a connection; the default lease
    interval_s: float = 0.05  # between two looks at the counters
    handshake_interval_s: float = 0.005  # the same while a connection may be anybody's:
    handshake_s: float = 3.0  # for so long from its start; then libzmq has ended it, or its key is admitted


def frame_wire_bytes(payload_bytes: int) -> int:
    """What one frame takes on a CURVE connection: ZMTP flags and length, MESSAGE, nonce, box, flags byte."""
    return payload_bytes + (35 if payload_bytes <= 222 else 42)  # a body of up to 255 bytes has a short length


@dataclass(slots=True)
class Credit:
    """What one connection delivered to the application. Written by the socket's own thread alone."""

    peer_id: PeerId
    key: str  # that it authenticated with (Z85), "" for a server's that we dialled
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

    def delivered(self, fd: int, key: str, peer_id: PeerId, wire_bytes: int) -> None:
        """The application read this much from the connection. Called by the socket's thread for each message."""
        credit = self.credits.get(fd)
        if credit is None or credit.key != key:
            credit = self.credits[fd] = Credit(peer_id, key)
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
        self._cuts: deque[tuple[PeerId, str | None]] = deque()
        self._plain: list[TcpConnection] = []
        self._added_plain: deque[TcpConnection] = deque()
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

    def add_plain(self, socket: sockets.socket) -> None:
        """End this TCP connection, which isn't libzmq's, when its peer's kernel is gone; until somebody closes it."""
        if socket.family in (sockets.AF_INET, sockets.AF_INET6):
            probe_when_idle(socket, self._config.dead_peer_s)
            fd = socket.fileno()
            self._added_plain.append(TcpConnection(fd, os.fstat(fd).st_ino, is_accepted=False))
            self._wake()

    def cut(self, peer_id: PeerId, key: str | None = None) -> None:
        """Shut down this peer's live connections, or those of one of its keys, and ours to it.

        One that hasn't sent a frame yet may be anybody's and stays. Its first frame says under which key it came.
        """
        self._cuts.append((peer_id, key))
        self._wake()

    @property
    def num_cut(self) -> int:
        """Connections shut down so far: overflowed, dead, or their peer was removed."""
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
        except zmq.ContextTerminated:
            logger.debug("guard ended: every socket is gone")
        except Exception:
            if not self._is_stopping:
                _end_process()
        finally:
            for monitor in self._watches:
                monitor.close(linger=0)
            self._wake_receiver.close(linger=0)

    def _wait_ms(self, next_look: float) -> int:
        if not self._plain and not any(watch.connections for watch in self._watches.values()):
            return 1000
        return max(0, min(1000, int((next_look - time.monotonic()) * 1000) + 1))

    def _take_orders(self, poller: zmq.Poller) -> None:
        while self._added:
            watch = self._added.popleft()
            self._watches[watch.monitor] = watch
            poller.register(watch.monitor, zmq.POLLIN)
        while self._added_plain:
            self._plain.append(self._added_plain.popleft())
        while self._cuts:
            self._cut_now(*self._cuts.popleft())

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
        """Ask the kernel about every connection; returns the seconds until the next look is due."""
        has_stranger = False
        for watch in self._watches.values():
            for fd, connection in watch.connections.items():
                credit = watch.credits.get(fd)
                is_new = now - connection.opened_at < self._config.handshake_s
                has_stranger |= credit is None and connection.is_accepted and is_new
                delivered = 0 if credit is None else credit.num_bytes  # before the kernel's count, which only grows
                state = tcp_state(connection)
                if state is not None and not connection.is_cut:
                    self._judge(watch, connection, credit, state, state.bytes_received - delivered, now)
        self._look_at_plain()
        num_connections = len(self._plain) + sum(len(watch.connections) for watch in self._watches.values())
        interval = self._config.handshake_interval_s if has_stranger else self._config.interval_s
        return max(interval, num_connections * _SECONDS_PER_CONNECTION)

    def _look_at_plain(self) -> None:
        states = [(connection, tcp_state(connection)) for connection in self._plain]
        self._plain = [connection for connection, state in states if state is not None]
        for connection, state in states:
            if state is not None and state.is_dead(self._config.dead_peer_s):
                self._end_dead("lane", None, connection, state)

    def _judge(
        self,
        watch: Watch,
        connection: TcpConnection,
        credit: Credit | None,
        state: TcpState,
        undelivered: int,
        now: float,
    ) -> None:
        is_stranger = credit is None and connection.is_accepted
        bound = self._config.max_unidentified_bytes if is_stranger else self._config.max_undelivered_bytes
        if undelivered > bound + _HANDSHAKE_BYTES:
            self._overflow(watch, connection, credit, undelivered, now)
        elif state.is_dead(self._config.dead_peer_s):
            self._end_dead(watch.domain, watch.peer_id if credit is None else credit.peer_id, connection, state)

    def _end_dead(self, domain: str, peer_id: PeerId | None, connection: TcpConnection, state: TcpState) -> None:
        if not connection.is_cut:
            logger.info("connection dead domain=%s peer=%s silent_s=%.1f", domain, peer_id, state.silent_s)
            self._shut(connection)

    def _overflow(
        self, watch: Watch, connection: TcpConnection, credit: Credit | None, undelivered: int, now: float
    ) -> None:
        peer_id = watch.peer_id if credit is None else credit.peer_id
        level = logging.INFO if peer_id is None else logging.WARNING  # strangers don't fill the log
        logger.log(level, "connection cut domain=%s peer=%s undelivered_bytes=%d", watch.domain, peer_id, undelivered)
        if peer_id is not None:
            self._registry.suspend(peer_id, now + SUSPEND_S)
        self._shut(connection)

    def _cut_now(self, peer_id: PeerId, key: str | None) -> None:
        for watch in self._watches.values():
            for fd, connection in watch.connections.items():
                credit = watch.credits.get(fd)
                is_its_own = credit is not None and credit.peer_id == peer_id and key in (None, credit.key)
                if is_its_own or watch.peer_id == peer_id:
                    self._shut(connection)

    def _shut(self, connection: TcpConnection) -> None:
        if not connection.is_cut:
            connection.is_cut = True
            self._num_cut += 1
            shut_down(connection)


def _end_process() -> None:
    """Fail closed: unguarded, one peer could fill our memory, and losses and removals would go unseen."""
    logger.critical("guard failed, this process ends: without it no peer is bounded or cut off", exc_info=True)
    sys.stderr.flush()
    os._exit(SkyNetError.exit_code)  # an exception would end this thread alone, and nothing is left to be saved
