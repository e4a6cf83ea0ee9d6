"""Frames between workers that can't reach each other, through the coordinator: both ends of it.

Worker -> coordinator: [peer to reach, sealed message]; an empty peer just says "here I am". Coordinator -> worker:
[peer it came from, sealed message]. What is inside is between the two workers (`sealed.py`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

import zmq

from skynet.errors import MalformedMessage, SkyNetError
from skynet.protocol.codec import Buffer
from skynet.protocol.data_frame import HEADER_BYTES
from skynet.protocol.ids import PeerId
from skynet.protocol.links import PathName
from skynet.protocol.sealed import OVERHEAD_BYTES, SealedSession
from skynet.protocol.sockets import Port, Received, SocketFactory

logger = logging.getLogger(__name__)
RELAY_DOMAIN: Final = "relay"
CHUNK_BYTES: Final = 256 << 10  # of a relayed payload per message
MAX_MESSAGE_BYTES: Final = CHUNK_BYTES + HEADER_BYTES + OVERHEAD_BYTES + 1
MAX_PEER_ID_BYTES: Final = 256
OFFER_INTERVAL_S: Final = 0.2
_FIRST, _MORE = 1, 2  # flags of a chunk


class RelayedGarbage(MalformedMessage):
    """The relay delivered something under this peer's name that the peer can't have sent, or out of order."""

    def __init__(self, peer_id: PeerId, path: object, message: str) -> None:
        super().__init__(f"peer {peer_id}: {message}")
        self.peer_id, self.path = peer_id, path


# -- the worker's end -------------------------------------------------------------------------------------------------


class RelayedPath:
    """One peer through the coordinator. Belongs to the channel's thread."""

    name: PathName = "relayed"

    def __init__(self, peer_id: PeerId, port: Port, session: SealedSession, max_payload_bytes: int) -> None:
        self.port = port
        self.next_offer = 0.0  # when to offer again, monotonic
        self._peer_id = peer_id
        self._session = session
        self._max_bytes = max_payload_bytes + HEADER_BYTES
        self._partial: bytearray | None = None
        self._leaving: deque[bytes] = deque()  # the rest of one frame: sealed in order, so it must leave in order

    @property
    def is_ready(self) -> bool:
        """Whether both have agreed on keys."""
        return self._session.is_ready

    def offer(self) -> None:
        """Ask the peer to agree on keys; repeated until `is_ready`."""
        self._send_raw(self._session.offer())

    def send(self, header: bytes, payload: Buffer) -> None:
        """Seal and queue one frame, in chunks. Raises zmq.Again while the frame before hasn't left."""
        if self.flush():
            raise zmq.Again
        whole = memoryview(payload).cast("B") if len(payload) else memoryview(b"")
        starts = range(0, max(1, whole.nbytes), CHUNK_BYTES)
        for start in starts:
            flags = (_FIRST if start == 0 else 0) | (_MORE if start + CHUNK_BYTES < whole.nbytes else 0)
            parts = (bytes([flags]), header if start == 0 else b"", whole[start : start + CHUNK_BYTES])
            self._leaving.append(self._session.seal(b"".join(parts)))
        self.flush()

    def flush(self) -> bool:
        """Hand on what waits; whether some still does."""
        while self._leaving:
            try:
                self._send_raw(self._leaving[0])
            except zmq.Again:
                return True
            self._leaving.popleft()
        return False

    def receive(self, message: Buffer) -> memoryview | None:
        """A whole frame (header and payload) if this message completes one. Raises MalformedMessage."""
        plaintext = self._session.handle(message, self._send_raw)
        if plaintext is None:
            return None
        flags = plaintext[0] if plaintext else 0xFF
        if flags > (_FIRST | _MORE) or bool(flags & _FIRST) != (self._partial is None):
            raise MalformedMessage(f"peer {self._peer_id}: relayed chunk out of place (flags {flags})")
        if flags == _FIRST:
            return memoryview(bytearray(plaintext))[1:]
        partial = self._partial = bytearray() if self._partial is None else self._partial
        partial += memoryview(plaintext)[1:]
        if len(partial) > self._max_bytes:
            raise MalformedMessage(f"peer {self._peer_id}: relayed frame of more than {self._max_bytes} bytes")
        if flags & _MORE:
            return None
        self._partial = None
        return memoryview(partial)

    def _send_raw(self, message: bytes) -> None:
        self.port.socket.send_multipart([self._peer_id.encode(), message], zmq.NOBLOCK)


class RelayClient:
    """A worker's socket to the relay and its paths through it. Belongs to the channel's thread."""

    def __init__(self, factory: SocketFactory, port: Port) -> None:
        self.port = port
        self._factory = factory
        self._paths: dict[PeerId, RelayedPath] = {}

    def register(self) -> None:
        """Tell the relay that we are here; after each (re)connection."""
        with contextlib.suppress(zmq.Again):
            self.port.socket.send_multipart([b"", b""], zmq.NOBLOCK)

    def reach(self, peer_id: PeerId, now: float) -> RelayedPath | None:
        """The chooser's way to a peer: offers keys until they are agreed on, then returns the path."""
        path = self._path(peer_id)
        if path is None or path.is_ready:
            return path
        if now >= path.next_offer:
            path.next_offer = now + OFFER_INTERVAL_S
            with contextlib.suppress(zmq.Again):
                path.offer()
        return None

    def receive(self, received: Received) -> tuple[PeerId, RelayedPath, memoryview | None] | None:
        """Who sent it, by which path, and the frame it completed. None: nothing of an admitted peer's.

        What the peer can't have sent ends its path: the next offer begins anew. Raises RelayedGarbage then.
        """
        if len(received.frames) != 2:
            return None
        peer_id = PeerId(received.frames[0].bytes[:MAX_PEER_ID_BYTES].decode("utf-8", "replace"))
        path = self._path(peer_id)
        if path is None:
            return None
        try:
            return peer_id, path, path.receive(received.frames[1].buffer)
        except MalformedMessage as exc:
            self.drop(peer_id)
            raise RelayedGarbage(peer_id, path, str(exc)) from exc

    def drop(self, peer_id: PeerId) -> None:
        """Forget what was agreed with this peer."""
        self._paths.pop(peer_id, None)

    def flush(self) -> bool:
        """Hand on what waits for room; whether some still does."""
        is_waiting = False
        for path in self._paths.values():
            is_waiting |= path.flush()
        return is_waiting

    def _path(self, peer_id: PeerId) -> RelayedPath | None:
        path = self._paths.get(peer_id)
        if path is None:
            key = self._factory.registry.key_of(peer_id)
            if key is None:
                return None
            mine = self._factory.public_key
            session = SealedSession(self._factory.shared_secret(key), mine, key, is_initiator=mine < key)
            path = RelayedPath(peer_id, self.port, session, self._factory.config.max_frame_bytes)
            self._paths[peer_id] = path
        return path


# -- the coordinator's end --------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Destination:
    """A connected worker and what waits for its socket to take more."""

    routing_id: bytes
    connection: int
    waiting: deque[list[bytes]] = field(default_factory=deque)
    waiting_bytes: int = 0


def _end_process() -> None:
    """Its workers would look alive and get nothing from each other: whoever starts us again helps them."""
    logger.critical("relay failed, this process ends: workers that can't reach each other need it", exc_info=True)
    sys.stderr.flush()
    os._exit(SkyNetError.exit_code)  # an exception would end this thread alone; requests go on when we are back


class RelayServer:
    """Forwards between admitted workers, on a thread of its own. `start` and `stop` it; stopping twice is fine."""

    def __init__(
        self,
        factory: SocketFactory,
        bind_addresses: Sequence[str],
        port: int = 0,
        max_waiting_bytes: int = 16 << 20,
        on_failed: Callable[[], None] = _end_process,
    ) -> None:
        self._factory = factory
        self._on_failed = on_failed  # called in the relay's thread, in the handler of what ended it
        self._max_waiting_bytes = max_waiting_bytes
        self._gone: deque[tuple[PeerId, int]] = deque()
        self._destinations: dict[PeerId, _Destination] = {}
        self._num_bytes = self._num_dropped = 0
        self._stop_sender, self._stop_receiver = factory.pair()
        self._port = factory.bind_router(
            RELAY_DOMAIN,
            bind_addresses,
            port,
            on_disconnected=lambda peer, connection: self._gone.append((peer, connection)),
            max_queued_messages=64,
        )
        self.port = self._port.number
        self._thread = threading.Thread(target=self._run, name="relay", daemon=True)

    def start(self) -> None:
        """Begin to forward."""
        self._thread.start()

    def stop(self) -> None:
        """Stop forwarding and close the socket."""
        if not self._stop_sender.closed:
            with contextlib.suppress(zmq.Again):  # it has ended already
                self._stop_sender.send(b"", zmq.NOBLOCK)
            self._thread.join(5.0)
            self._stop_sender.close(linger=0)

    @property
    def num_bytes(self) -> int:
        """Forwarded so far."""
        return self._num_bytes

    @property
    def num_dropped(self) -> int:
        """Messages dropped because their destination was unknown, gone or too slow."""
        return self._num_dropped

    def _run(self) -> None:
        try:
            poller = zmq.Poller()
            poller.register(self._port.socket, zmq.POLLIN)
            poller.register(self._stop_receiver, zmq.POLLIN)
            while True:
                is_congested = any(d.waiting for d in self._destinations.values())
                ready = dict(poller.poll(2 if is_congested else 1000))
                if self._stop_receiver in ready:
                    return
                self._forget_gone()
                if self._port.socket in ready and (received := self._port.receive(zmq.NOBLOCK)) is not None:
                    self._forward(received)
                if is_congested:
                    for destination in list(self._destinations.values()):
                        self._flush(destination)
        except Exception:
            self._on_failed()
        finally:
            self._port.close()
            self._stop_receiver.close(linger=0)

    def _forget_gone(self) -> None:
        while self._gone:
            peer_id, connection = self._gone.popleft()
            known = self._destinations.get(peer_id)
            if known is not None and known.connection == connection:
                del self._destinations[peer_id]

    def _forward(self, received: Received) -> None:
        known = self._destinations.get(received.peer_id)
        if known is None or known.routing_id != received.routing_id:
            self._destinations[received.peer_id] = _Destination(received.routing_id, received.connection)
        if len(received.frames) != 2:
            self._num_dropped += 1
            return
        to, message = received.frames
        if not len(to):
            return
        destination = None
        if len(to) <= MAX_PEER_ID_BYTES and len(message) <= MAX_MESSAGE_BYTES:
            peer_id = PeerId(to.bytes.decode("utf-8", "replace"))
            if self._factory.registry.is_allowed(peer_id, RELAY_DOMAIN):
                destination = self._destinations.get(peer_id)
        if destination is None or destination.waiting_bytes + len(message) > self._max_waiting_bytes:
            self._num_dropped += 1
            logger.debug("relayed message dropped from=%s to=%s", received.peer_id, to.bytes[:64])
            return
        destination.waiting.append([destination.routing_id, received.peer_id.encode(), message.bytes])
        destination.waiting_bytes += len(message)
        self._flush(destination)

    def _flush(self, destination: _Destination) -> None:
        while destination.waiting:
            parts = destination.waiting[0]
            try:
                self._port.socket.send_multipart(parts, zmq.NOBLOCK)
                self._num_bytes += len(parts[2])
            except zmq.Again:
                return
            except zmq.ZMQError as exc:
                if exc.errno != zmq.EHOSTUNREACH:
                    raise
                self._num_dropped += 1
            destination.waiting.popleft()
            destination.waiting_bytes -= len(parts[2])
