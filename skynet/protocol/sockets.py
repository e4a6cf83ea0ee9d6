"""The one place where ZeroMQ sockets are made: every TCP socket speaks CURVE, and nobody unknown gets in.

One shared context; its ZAP handler and its guard run before anything binds. Server sockets enforce their ZAP domain, so
without the handler libzmq refuses everyone. A sender is whoever holds its authenticated key (the frame's User-Id).
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import zmq
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from skynet.errors import ConfigError
from skynet.protocol.admitted import PeerRegistry, raw_curve_key
from skynet.protocol.codec import Buffer
from skynet.protocol.guard import SUSPEND_S, GuardConfig, GuardThread, Watch, frame_wire_bytes
from skynet.protocol.ids import PeerId
from skynet.protocol.tcp import PROBE_S, num_probes
from skynet.protocol.zap import ZAP_ENDPOINT, ZapHandler

logger = logging.getLogger(__name__)
TURN_S: Final = 0.002  # that messages which wait may keep an event loop from everything else
MAX_FRAMES: Final = 72  # of one message: a header, 64 tensors and some room
_MONITORED: Final = (
    zmq.Event.ACCEPTED | zmq.Event.CONNECTED | zmq.Event.HANDSHAKE_SUCCEEDED | zmq.Event.DISCONNECTED
    | zmq.Event.HANDSHAKE_FAILED_AUTH | zmq.Event.HANDSHAKE_FAILED_PROTOCOL | zmq.Event.HANDSHAKE_FAILED_NO_DETAIL
    | zmq.Event.MONITOR_STOPPED
)  # fmt: skip
_SRCFD: Final = int(zmq.SRCFD)
_names = itertools.count()


@dataclass(frozen=True, slots=True, kw_only=True)
class SocketConfig:
    """Limits of every socket of one process."""

    max_frame_bytes: int = 64 << 20  # libzmq drops a connection that announces a larger frame
    max_queued_messages: int = 1024  # each way, per connection
    handshake_timeout_s: float = 3.0
    reconnect_interval_s: float = 0.02  # doubles up to 1 s
    io_threads: int = 1
    guard: GuardConfig = field(default_factory=GuardConfig)


class Received(NamedTuple):
    """One message from an admitted peer. The frames' buffers live as long as the frames."""

    peer_id: PeerId
    routing_id: bytes  # whom to answer on a listening socket; b"" on a dialling one
    frames: list[zmq.Frame]
    connection: int  # as `on_disconnected` names it


class Port:
    """A TCP socket with its accounting. Only the thread that made it receives, sends and closes."""

    def __init__(
        self, socket: zmq.Socket[bytes], watch: Watch, factory: SocketFactory, number: int = 0, endpoint: str = ""
    ) -> None:
        self.socket = socket
        self.endpoint = endpoint  # of a dialling socket: where it connects to
        self.number = number  # TCP port of a listening socket, 0 of a dialling one
        self._watch = watch
        self._factory = factory
        self._holder = factory.registry.holder
        self._is_server = watch.peer_id is None
        self._peer_id = watch.peer_id or PeerId("")
        self._recv: Callable[[int, bool], zmq.Frame] = socket.recv  # type: ignore[assignment]

    def receive(self, flags: int = 0) -> Received | None:
        """One message; None if its sender isn't (or no longer) admitted or it had too many frames.

        Raises zmq.Again if there is none and `flags` has NOBLOCK. Poll before you block: a wait has a deadline.
        Written for speed: it is on the path of every exchange.
        """
        recv, watch = self._recv, self._watch
        frame = recv(flags, False)
        routing_id = b""
        if self._is_server:  # a ROUTER puts the routing id in front; the parts of one message arrive together
            routing_id = frame.bytes
            frame = recv(0, False)
        frames = [frame]
        wire_bytes = frame_wire_bytes(len(frame))
        is_excessive = False
        while frame.more and not is_excessive:
            if len(frames) < MAX_FRAMES:
                frame = recv(0, False)
                frames.append(frame)
                wire_bytes += frame_wire_bytes(len(frame))
            else:
                wire_bytes += self._skip_rest()
                is_excessive = True
        fd = int(frame.get(_SRCFD))
        key, peer_id, is_allowed = "", self._peer_id, True
        if self._is_server:
            key = str(frame.get("User-Id"))
            holder = self._holder(key)
            is_allowed = holder is not None and watch.domain in holder.domains
            peer_id = PeerId("") if holder is None else holder.peer_id
        watch.delivered(fd, key, peer_id, wire_bytes)
        if is_excessive:
            logger.warning("message of too many frames peer=%s", peer_id)
            self._factory.punish(peer_id)
            return None
        if not is_allowed:
            if not peer_id:  # a key withdrawn before its connection said anything
                self._factory.guard.cut(peer_id, key)
            return None
        return Received(peer_id, routing_id, frames, fd)

    def _skip_rest(self) -> int:
        """Read the present message to its end without keeping it; returns its bytes on the wire."""
        wire_bytes = 0
        while True:
            frame = self._recv(0, False)
            wire_bytes += frame_wire_bytes(len(frame))
            if not frame.more:
                return wire_bytes

    def close(self) -> None:
        """Close at once; what is still queued is dropped. Twice is fine."""
        self.socket.close(linger=0)


class AsyncPort:
    """The same for an event loop: `receive` waits, `send` queues. It belongs to the loop that made it."""

    def __init__(self, port: Port) -> None:
        self._port = port
        self._socket = port.socket
        self.number = port.number
        self._is_readable = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._yield_at = (
            0.0  # monotonic (an event loop's own time may stand still within a turn): when others must have their turn
        )
        self._fd = int(port.socket.get(zmq.FD))
        self._loop.add_reader(self._fd, self._look)

    async def receive(self) -> Received:
        """The next message of an admitted peer; others are dropped. Put a timeout around it.

        Whoever calls this in a loop leaves the event loop to others every few milliseconds, however many wait.
        """
        while True:
            if time.monotonic() >= self._yield_at:
                await asyncio.sleep(0)  # before a message is taken: cancelled here, none is lost
                self._yield_at = time.monotonic() + TURN_S
            try:
                received = self._port.receive(zmq.NOBLOCK)
            except zmq.Again:
                self._is_readable.clear()
                self._look()  # a message may have come since, and its signal been used up
                await self._is_readable.wait()
                self._yield_at = time.monotonic() + TURN_S
                continue
            if received is not None:
                return received
            self._yield_at = 0.0  # who sends nothing but refused messages doesn't hold the loop

    def send(self, frames: Sequence[Buffer], routing_id: bytes = b"") -> bool:
        """Queue one message at once. False: that peer's queue is full, or it is gone."""
        try:
            self._socket.send_multipart([routing_id, *frames] if routing_id else frames, zmq.NOBLOCK)
        except zmq.ZMQError as exc:
            if exc.errno not in (zmq.EAGAIN, zmq.EHOSTUNREACH):
                raise
            return False
        finally:
            self._look()  # sending handles libzmq's signals, also those that say "readable"
        return True

    def close(self) -> None:
        """Close at once. Twice is fine."""
        if not self._socket.closed:
            self._loop.remove_reader(self._fd)
            self._port.close()

    def _look(self) -> None:
        # The descriptor is edge-triggered: reading EVENTS is what resets it.
        if not self._socket.closed and int(self._socket.get(zmq.EVENTS)) & zmq.POLLIN:
            self._is_readable.set()


class SocketFactory:
    """Makes the sockets of one process under its CURVE keys (Z85); thread-safe, `close` it last."""

    def __init__(
        self,
        public_key: bytes,
        secret_key: bytes,
        *,
        registry: PeerRegistry | None = None,
        config: SocketConfig | None = None,
    ) -> None:
        raw_curve_key(public_key)
        self.public_key = public_key
        self._secret_key = secret_key
        self.config = config or SocketConfig()
        self.registry = registry or PeerRegistry()
        self._lock = threading.Lock()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(self.config.io_threads)
        self._context.set(zmq.MAX_SOCKETS, 8192)
        self._is_closed = False
        self._start_threads()

    def _start_threads(self) -> None:
        self._zap_stop, stop_receiver = self.pair()
        zap_socket = self._context.socket(zmq.ROUTER)
        zap_socket.linger = 0
        zap_socket.bind(ZAP_ENDPOINT)
        self._zap = ZapHandler(self.registry, zap_socket, stop_receiver)
        self._zap.start()
        self.guard = GuardThread(self.registry, *self.pair(), self.config.guard)
        self.registry.on_removed(self.guard.cut)
        self.guard.start()

    # -- who may connect -----------------------------------------------------------------------------------------------

    def allow(self, curve_public_key: bytes, peer_id: PeerId, domains: Collection[str]) -> None:
        """Let this key open our sockets of these ZAP domains, as `peer_id`."""
        self.registry.allow(curve_public_key, peer_id, domains)

    def deny(self, peer_id: PeerId) -> None:
        """Withdraw the peer's key, drop its queued frames and cut its live connections at once."""
        self.registry.deny(peer_id)

    def forget(self, peer_id: PeerId) -> None:
        """Withdraw the key of a peer that has no connection any more."""
        self.registry.forget(peer_id)

    def shared_secret(self, peer_public_key: bytes) -> bytes:
        """X25519 of our CURVE key and a peer's: 32 bytes that only the two can compute. Raises ValueError."""
        ours = X25519PrivateKey.from_private_bytes(raw_curve_key(self._secret_key))
        return ours.exchange(X25519PublicKey.from_public_bytes(raw_curve_key(peer_public_key)))

    def punish(self, peer_id: PeerId) -> None:
        """Cut this peer's connections because of what it sent; it may come back with a clean slate."""
        self.guard.cut(peer_id)

    def suspend(self, peer_id: PeerId) -> None:
        """Cut this peer's connections and let it make no others for a minute: it took more than its part of us."""
        self.registry.suspend(peer_id, time.monotonic() + SUSPEND_S)
        self.guard.cut(peer_id)

    # -- sockets -------------------------------------------------------------------------------------------------------

    def bind_router(
        self,
        domain: str,
        addresses: Sequence[str],
        port: int = 0,
        *,
        on_disconnected: Callable[[PeerId, int], None] | None = None,
        max_queued_messages: int | None = None,
    ) -> Port:
        """A ROUTER on these addresses, all with one port number (0: any free one). Raises ConfigError.

        `on_disconnected(peer, connection)` runs in the guard's thread within milliseconds of a connection's end. A peer
        that reconnected may have a newer one: compare with `Received.connection`.
        """
        if not domain or not addresses:
            raise ConfigError("a server socket needs a ZAP domain and at least one address")
        watch = self._watch(domain, None, on_disconnected=on_disconnected)
        socket = self._tcp_socket(zmq.ROUTER, max_queued_messages)
        socket.curve_server = True
        socket.zap_domain = domain.encode()
        socket.set(zmq.ZAP_ENFORCE_DOMAIN, 1)
        socket.set(zmq.ROUTER_MANDATORY, 1)
        self._monitor(socket, watch)
        try:
            for address in addresses:
                port = self._bind(socket, address, port)
        except zmq.ZMQError as exc:
            socket.close(linger=0)
            raise ConfigError(
                f"can't listen on {address} port {port or 'any'}: {exc.strerror}; choose another"
            ) from exc
        return Port(socket, watch, self, port)

    def connect_dealer(
        self,
        endpoint: str,
        server_public_key: bytes,
        peer_id: PeerId,
        *,
        domain: str = "",
        on_connected: Callable[[], None] | None = None,
        on_refused: Callable[[], None] | None = None,
        on_disconnected: Callable[[PeerId, int], None] | None = None,
        max_queued_messages: int | None = None,
    ) -> Port:
        """A DEALER that talks to the holder of that key and no other. The callbacks run in the guard's thread.

        libzmq reconnects by itself, but not after a refusal: then the socket is dead (sending blocks), `on_refused` is
        called and a new one is needed. What is sent before the connection stands waits for it.
        """
        raw_curve_key(server_public_key)
        watch = self._watch(
            domain or "dial",
            peer_id,
            on_connected=on_connected,
            on_refused=on_refused,
            on_disconnected=on_disconnected,
        )
        socket = self._tcp_socket(zmq.DEALER, max_queued_messages)
        socket.curve_serverkey = server_public_key
        self._monitor(socket, watch)
        try:
            socket.connect(endpoint)
        except zmq.ZMQError as exc:
            socket.close(linger=0)
            raise ConfigError(f"can't connect to {endpoint}: {exc.strerror}") from exc
        return Port(socket, watch, self, endpoint=endpoint)

    def asynchronous(self, port: Port) -> AsyncPort:
        """This port for the running event loop; use it instead of `port` from now on."""
        return AsyncPort(port)

    def pair(self, max_queued_messages: int = 1000) -> tuple[zmq.Socket[bytes], zmq.Socket[bytes]]:
        """Two ends of an in-process wire, to wake one thread from another; each end has one owner at a time."""
        name = f"inproc://pair-{next(_names)}"
        near, far = self._context.socket(zmq.PAIR), self._context.socket(zmq.PAIR)
        for socket in (near, far):
            socket.linger = 0
            socket.sndhwm = socket.rcvhwm = max_queued_messages
        near.bind(name)
        far.connect(name)
        return near, far

    def close(self) -> None:
        """End ZAP, guard and context. Close the sockets first: those left open are named in the log and leak."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
        with contextlib.suppress(zmq.Again):  # it has ended already
            self._zap_stop.send(b"", zmq.NOBLOCK)
        self._zap.join(5.0)
        self._zap_stop.close(linger=0)
        self.guard.stop()
        left = [s for s in list(self._context._sockets or ()) if not s.closed]
        if left:
            logger.error("sockets left open count=%d; the context stays", len(left))
            return
        self._context.term()

    # -- inside --------------------------------------------------------------------------------------------------------

    def _watch(self, domain: str, peer_id: PeerId | None, **callbacks: Any) -> Watch:
        monitor = self._context.socket(zmq.PAIR)
        monitor.linger = 0
        monitor.rcvhwm = 100_000  # libzmq's I/O thread would wait for a full one
        return Watch(domain, monitor, peer_id, **callbacks)

    def _monitor(self, socket: zmq.Socket[bytes], watch: Watch) -> None:
        name = f"inproc://monitor-{next(_names)}"
        socket.monitor(name, _MONITORED)
        watch.monitor.connect(name)
        self.guard.add(watch)

    def _tcp_socket(self, kind: int, max_queued_messages: int | None) -> zmq.Socket[bytes]:
        config = self.config
        socket = self._context.socket(kind)
        socket.curve_publickey = self.public_key
        socket.curve_secretkey = self._secret_key
        socket.linger = 0
        socket.ipv6 = True
        socket.sndhwm = socket.rcvhwm = max_queued_messages or config.max_queued_messages
        socket.maxmsgsize = config.max_frame_bytes
        socket.handshake_ivl = int(config.handshake_timeout_s * 1000)
        socket.reconnect_ivl = int(config.reconnect_interval_s * 1000)
        socket.reconnect_ivl_max = 1000
        socket.tcp_keepalive = 1
        socket.tcp_keepalive_idle = socket.tcp_keepalive_intvl = PROBE_S
        socket.tcp_keepalive_cnt = num_probes(config.guard.dead_peer_s)
        return socket

    @staticmethod
    def _bind(socket: zmq.Socket[bytes], address: str, port: int) -> int:
        host = f"[{address}]" if ":" in address else address
        socket.bind(f"tcp://{host}:{port or '*'}")
        bound = socket.get(zmq.LAST_ENDPOINT)
        assert isinstance(bound, bytes)
        return int(bound.rstrip(b"\0").rpartition(b":")[2])
