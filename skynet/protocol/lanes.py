"""The lanes of one channel: listening, dialling, and who has one."""

from __future__ import annotations

import contextlib
import errno
import hmac
import logging
import secrets
import socket as sockets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import zmq
from zmq.backend import zmq_poll

from skynet.protocol.ids import PeerId
from skynet.protocol.lane import KEY_BYTES, TICKET_BYTES, Lane, LaneEnded, LaneOffer

logger = logging.getLogger(__name__)
OPEN_S: Final = 3.0  # for a dial to connect, and for its ticket to come
MAX_STRANGERS: Final = 64  # connections without a ticket yet
_POLLIN: Final = int(zmq.POLLIN)
_POLLOUT: Final = int(zmq.POLLOUT)


@dataclass(slots=True)
class _Stranger:
    """A connection that hasn't shown its ticket yet."""

    socket: sockets.socket
    since: float
    shown: bytes = b""


class LaneListener:
    """Accepts lanes of those who show a ticket. Belongs to the channel's thread, which polls `sockets`."""

    def __init__(self, addresses: Sequence[str], max_payload_bytes: int) -> None:
        self._listeners = _listen(addresses)
        self.port: int = self._listeners[0].getsockname()[1] if self._listeners else 0
        self._max_bytes = max_payload_bytes
        self._offers: dict[PeerId, LaneOffer] = {}
        self._strangers: list[_Stranger] = []

    @property
    def sockets(self) -> list[sockets.socket]:
        """Readable when `serve` has something to do."""
        return [*self._listeners, *(s.socket for s in self._strangers)]

    def offer(self, peer_id: PeerId) -> LaneOffer:
        """A fresh offer for this peer; former ones no longer hold."""
        made = LaneOffer(self.port, secrets.token_bytes(TICKET_BYTES), secrets.token_bytes(KEY_BYTES))
        self._offers[peer_id] = made
        return made

    def withdraw(self, peer_id: PeerId) -> None:
        """The offer no longer holds."""
        self._offers.pop(peer_id, None)

    def serve(self, now: float, opened: Callable[[PeerId, Lane], None]) -> None:
        """Accept who waits, read tickets, drop who takes too long; `opened` gets each lane."""
        for listener in self._listeners:
            with contextlib.suppress(BlockingIOError, ConnectionError):
                accepted = listener.accept()[0]
                accepted.setblocking(False)
                self._strangers.append(_Stranger(accepted, now))
        for stranger in list(self._strangers):
            is_over = now > stranger.since + OPEN_S or len(self._strangers) > MAX_STRANGERS
            if self._read_ticket(stranger) and len(stranger.shown) == TICKET_BYTES:
                self._strangers.remove(stranger)
                self._open(stranger, opened)
            elif is_over:
                self._strangers.remove(stranger)
                stranger.socket.close()

    def close(self) -> None:
        """Close the listeners and all strangers."""
        for socket in self.sockets:
            socket.close()

    @staticmethod
    def _read_ticket(stranger: _Stranger) -> bool:
        """Whether it is still there."""
        try:
            more = stranger.socket.recv(TICKET_BYTES - len(stranger.shown))
        except BlockingIOError:
            return True
        except OSError:
            more = b""
        stranger.shown += more
        if not more:
            stranger.since = float("-inf")
        return bool(more)

    def _open(self, stranger: _Stranger, opened: Callable[[PeerId, Lane], None]) -> None:
        for peer_id, offer in self._offers.items():
            if hmac.compare_digest(offer.ticket, stranger.shown):
                del self._offers[peer_id]
                lane = Lane(stranger.socket, offer.key, is_dialler=False, max_payload_bytes=self._max_bytes)
                opened(peer_id, lane)
                return
        stranger.socket.close()


def _listen(addresses: Sequence[str]) -> list[sockets.socket]:
    """Listeners on those of these addresses that have the first one's port free. None is fine too."""
    listeners: list[sockets.socket] = []
    for address in addresses:
        family = sockets.AF_INET6 if ":" in address else sockets.AF_INET
        port = listeners[0].getsockname()[1] if listeners else 0
        try:
            listeners.append(sockets.create_server((address, port), family=family, backlog=64))
        except OSError as exc:
            logger.info("no lanes on address=%s reason=%s", address, exc)
    for listener in listeners:
        listener.setblocking(False)
    return listeners


@dataclass(slots=True, eq=False)
class _Dial:
    """A lane that is being connected."""

    peer_id: PeerId
    socket: sockets.socket
    offer: LaneOffer
    until: float


class Lanes:
    """Belongs to the channel's thread."""

    def __init__(
        self,
        addresses: Sequence[str],
        max_payload_bytes: int,
        watch: Callable[[sockets.socket], None] = lambda socket: None,
    ) -> None:
        """`watch` gets each lane's socket: to end it when its peer's host is gone without a word."""
        self._max_bytes = max_payload_bytes
        self._watch = watch
        self._listener = LaneListener(addresses, max_payload_bytes)
        self._dials: dict[PeerId, _Dial] = {}
        self._lanes: dict[PeerId, Lane] = {}
        self._peers: dict[Lane, PeerId] = {}
        self._by_descriptor: dict[int, Lane] = {}

    def get(self, peer_id: PeerId) -> Lane | None:
        """This peer's lane, if one is open."""
        return self._lanes.get(peer_id)

    def peer_of(self, lane: Lane) -> PeerId | None:
        """Whose lane it is; None if it was dropped."""
        return self._peers.get(lane)

    def all(self) -> list[Lane]:
        """Every open lane."""
        return list(self._lanes.values())

    def offer(self, peer_id: PeerId) -> LaneOffer | None:
        """What to send to a peer that dialled us; None if this side can't listen."""
        self.drop(peer_id)
        return self._listener.offer(peer_id) if self._listener.port else None

    def dial(self, peer_id: PeerId, host: str, offer: LaneOffer, now: float) -> None:
        """Begin to connect to what the peer offered."""
        self.drop(peer_id)
        socket = sockets.socket(sockets.AF_INET6 if ":" in host else sockets.AF_INET)
        socket.setblocking(False)
        if socket.connect_ex((host, offer.port)) not in (0, errno.EINPROGRESS):
            socket.close()
            return
        self._dials[peer_id] = _Dial(peer_id, socket, offer, now + OPEN_S)

    def drop(self, peer_id: PeerId) -> None:
        """Close this peer's lane and forget what was offered."""
        self._listener.withdraw(peer_id)
        dial = self._dials.pop(peer_id, None)
        if dial is not None:
            dial.socket.close()
        lane = self._lanes.pop(peer_id, None)
        if lane is not None:
            del self._peers[lane], self._by_descriptor[lane.descriptor]
            lane.close()

    def close(self) -> None:
        """Close everything."""
        for peer_id in [*self._dials, *self._lanes]:
            self.drop(peer_id)
        self._listener.close()

    def polled(self) -> list[tuple[int, int]]:
        """What to poll for: descriptors and events."""
        waiting = [(socket.fileno(), _POLLIN) for socket in self._listener.sockets]
        waiting += [(dial.socket.fileno(), _POLLOUT) for dial in self._dials.values()]
        return waiting + [polled_lane(lane) for lane in self._lanes.values()]

    def at(self, descriptor: int) -> Lane | None:
        """The lane behind what poll found, None if it is something to `serve`."""
        return self._by_descriptor.get(descriptor)

    def serve(self, now: float) -> None:
        """Carry on with connections that aren't lanes yet."""
        for dial in list(self._dials.values()):
            if zmq_poll([(dial.socket.fileno(), _POLLOUT)], 0):
                self._finish(dial)
            elif now > dial.until:
                self.drop(dial.peer_id)
        self._listener.serve(now, self._opened)

    def _finish(self, dial: _Dial) -> None:
        del self._dials[dial.peer_id]
        reason = dial.socket.getsockopt(sockets.SOL_SOCKET, sockets.SO_ERROR)
        if reason:
            logger.info("no lane peer=%s reason=%s", dial.peer_id, errno.errorcode.get(reason, reason))
            dial.socket.close()
            return
        lane = Lane(dial.socket, dial.offer.key, is_dialler=True, max_payload_bytes=self._max_bytes)
        with contextlib.suppress(LaneEnded):
            lane.show_ticket(dial.offer.ticket)
            self._opened(dial.peer_id, lane)
            return
        lane.close()

    def _opened(self, peer_id: PeerId, lane: Lane) -> None:
        logger.debug("lane open peer=%s", peer_id)
        self._watch(lane.socket)
        self._lanes[peer_id] = lane
        self._peers[lane] = peer_id
        self._by_descriptor[lane.descriptor] = lane


def polled_lane(lane: Lane) -> tuple[int, int]:
    """How to poll for one lane."""
    return lane.descriptor, _POLLIN | _POLLOUT if lane.is_leaving() else _POLLIN
