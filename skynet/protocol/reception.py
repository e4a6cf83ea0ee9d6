"""Everything that frames come by: which sockets are polled, who reads them, where what came goes.

A frame that is waited for goes straight to its waiter, another one to the inbox; links, lanes and pings are served on
the way. All of it belongs to the channel's thread.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from typing import Any, Final

import zmq
from zmq.backend import zmq_poll

from skynet.errors import ProtocolError
from skynet.protocol.data_frame import (
    DataFrame,
    FrameType,
    control_header,
    epoch_of,
    split,
    split_frames,
)
from skynet.protocol.ids import PeerId
from skynet.protocol.inbox import Inbox
from skynet.protocol.lane import Lane, LaneEnded, LaneOffer
from skynet.protocol.lanes import Lanes, polled_lane
from skynet.protocol.links import DATA_DOMAIN, DirectPath, Link, Links, Path
from skynet.protocol.pings import Pings
from skynet.protocol.plan import Epoch
from skynet.protocol.relay import RELAY_DOMAIN, RelayClient, RelayedGarbage
from skynet.protocol.sockets import Port, Received, SocketFactory
from skynet.protocol.wakeups import Note, Wakeups

logger = logging.getLogger(__name__)
_POLLIN: Final = int(zmq.POLLIN)
_NOBLOCK: Final = int(zmq.NOBLOCK)
MAX_RETIRED: Final = 1024  # epochs whose late frames are still recognised


Wanted = tuple[PeerId, bytes]  # who sends it, under which header


def _direct_path(port: Port, received: Received) -> DirectPath:
    return DirectPath(port, received.routing_id, received.connection) if received.routing_id else DirectPath(port)


class Reception:
    """Reads what comes by ROUTER, dials, lanes and relay. `links` says who is reached how."""

    def __init__(
        self,
        factory: SocketFactory,
        bind_addresses: Sequence[str],
        port: int,
        wakeups: Wakeups,
        inbox: Inbox,
        pings: Pings,
        *,
        use_lanes: bool,
    ) -> None:
        self._factory = factory
        self._wakeups = wakeups
        self._inbox = inbox
        self._pings = pings
        self._use_lanes = use_lanes
        self._router = factory.bind_router(
            DATA_DOMAIN,
            bind_addresses,
            port,
            on_disconnected=lambda peer, connection: wakeups.post(Note("gone", peer, connection)),
        )
        self.port = self._router.number
        self.links = Links(factory, wakeups.post, self._rebuild_poller)
        lane_addresses = bind_addresses if use_lanes else ()
        self.lanes = Lanes(lane_addresses, factory.config.max_frame_bytes, factory.guard.add_plain)
        self.links.on_established = self._offer_lane
        self.links.on_lost = lambda link: self.lanes.drop(link.peer_id)
        self._relay: RelayClient | None = None
        self._retired: dict[Epoch, None] = {}  # in the order of their end; the last MAX_RETIRED
        self._polled: list[tuple[zmq.Socket[bytes], int]] = []
        self._ports: dict[zmq.Socket[bytes], Port] = {}
        self._guests: tuple[zmq.Socket[bytes], ...] = ()  # of the caller, during `wait`
        self._rebuild_poller()

    def use_relay(self, endpoint: str, server_key: bytes, server_id: PeerId) -> None:
        """From now on, peers that no address reaches within 2 s are reached through this relay."""
        port = self._factory.connect_dealer(
            endpoint, server_key, server_id, domain=RELAY_DOMAIN, on_connected=lambda: self._wakeups.post(Note("relay"))
        )
        self.stop_relay()
        self._relay = RelayClient(self._factory, port)
        self.links.relayed_path = self._relay.reach
        self._rebuild_poller()

    def stop_relay(self) -> None:
        """Give the relay up, with the links that go through it."""
        if self._relay is not None:
            for link in self.links.all():
                if link.path is not None and link.path.port is self._relay.port:
                    self.links.lose(link, "the relay was given up")
            self._relay.port.close()
            self._relay = None
            self.links.relayed_path = lambda peer_id, now: None
            self._rebuild_poller()

    def drop(self, peer_id: PeerId) -> None:
        """Forget what this peer brought and how the relay reached it."""
        if self._relay is not None:
            self._relay.drop(peer_id)
        self._inbox.drop_peer(peer_id)

    def retire(self, epoch: Epoch) -> None:
        """Drop what arrived and what will arrive of this epoch."""
        self._retired[epoch] = None
        if len(self._retired) > MAX_RETIRED:
            del self._retired[next(iter(self._retired))]
        self._inbox.drop_epoch(epoch)

    def welcome(self, guests: Sequence[zmq.Socket[bytes]]) -> None:
        """Poll these sockets of the caller's too, from now on."""
        self._guests = tuple(guests)
        self._rebuild_poller()

    def close(self) -> None:
        """Close every socket that frames come by. Twice is fine."""
        if not self._router.socket.closed:
            self.links.close_all()
            self.lanes.close()
            self.stop_relay()
            self._router.close()

    # -- waiting and reading -------------------------------------------------------------------------------------------

    def sockets_of(self, peer_id: PeerId) -> tuple[list[tuple[Any, int]], bool]:
        """What to poll for this peer's frames, and whether it is lost."""
        link = self.links.get(peer_id)
        if link is None or not link.is_established:
            return self._polled_all(), True
        assert link.path is not None
        polled = [(self._wakeups.receiver, _POLLIN), (link.path.port.socket, _POLLIN)]
        lane = self.lanes.get(peer_id)
        return polled if lane is None else [polled_lane(lane), *polled], False

    def _polled_all(self) -> list[tuple[Any, int]]:
        return [*self._polled, *self.lanes.polled()]

    def pump(self, until: float) -> tuple[list[zmq.Socket[bytes]], bool]:
        """Serve links until something happened; which guests were ready, and whether `wake` was called."""
        guests, was_woken, _ = self.poll(until, None, self._polled_all())
        now = time.monotonic()
        for link in self.links.all():
            self._advance(link, now)
        return guests, was_woken

    def poll(
        self,
        until: float,
        wanted: Wanted | None,
        polled: list[tuple[Any, int]],
    ) -> tuple[list[zmq.Socket[bytes]], bool, memoryview | None]:
        """Wait once, then read at most one message per ready socket: asking again is cheaper than reading on.

        Returns the guests that are ready, whether `wake` was called, and the payload that is wanted if it has come.
        """
        timeout_ms = max(0, math.ceil((until - time.monotonic()) * 1000)) if until else 0
        if self._relay is not None and self._relay.flush():
            timeout_ms = min(timeout_ms, 2)
        guests: list[zmq.Socket[bytes]] = []
        was_woken, has_notes, found = False, False, None
        ready: list[tuple[Any, int]] = zmq_poll(polled, timeout_ms)
        for socket, _ in ready:
            if isinstance(socket, int):
                lane = self.lanes.at(socket)
                if lane is None:
                    self.lanes.serve(time.monotonic())
                else:
                    found = self._read_lane(lane, wanted, found)
            elif socket is self._wakeups.receiver:
                has_notes = True
            elif socket in self._guests:
                guests.append(socket)
            elif found is None and not socket.closed:
                found = self._read(self._ports[socket], wanted)
        if has_notes and found is None:
            was_woken = self._read_notes()
            found = None if wanted is None else self._inbox.pop(*wanted)
        return guests, was_woken, found

    def _advance(self, link: Link, now: float) -> None:
        try:
            self.links.advance(link, now)
        except zmq.ZMQError as exc:
            logger.debug("link not ready peer=%s reason=%s", link.peer_id, exc)

    def _read(self, port: Port, wanted: Wanted | None) -> memoryview | None:
        """Take one message from a socket that has one; returned if it is wanted, else handled or kept."""
        received = port.receive(_NOBLOCK)
        if received is None:
            return None
        peer_id, path = received.peer_id, None
        try:
            if self._relay is not None and port is self._relay.port:
                unsealed = self._relay.receive(received)
                if unsealed is None or unsealed[2] is None:
                    return None
                peer_id, path = unsealed[0], unsealed[1]
                frame = split(unsealed[2])
            else:
                frame = split_frames(received.frames)
            if frame.type != FrameType.DATA:
                self._control(peer_id, path or _direct_path(port, received), frame)
                return None
            if (peer_id, frame.header) == wanted:
                return frame.payload
            self._keep(peer_id, frame)
        except RelayedGarbage as exc:
            link = self.links.get(exc.peer_id)
            if link is not None and link.path is exc.path:  # a direct link doesn't suffer from what the relay makes up
                self.links.lose(link, str(exc))
        except ProtocolError as exc:
            self._refuse(peer_id, exc)
        return None

    def _read_lane(self, lane: Lane, wanted: Wanted | None, found: memoryview | None = None) -> memoryview | None:
        """Take what came by a lane; the wanted frame is returned, or `found` if it is there already."""
        peer_id = self.lanes.peer_of(lane)
        if peer_id is None:
            return found
        try:
            lane.flush()
            frames = lane.receive()
            if not self._factory.registry.is_allowed(peer_id, DATA_DOMAIN):
                return found
            for frame in frames:
                if found is None and (peer_id, frame.header) == wanted:
                    found = frame.payload
                elif frame.type == FrameType.DATA:
                    self._keep(peer_id, frame)
                elif frame.type in (FrameType.PING, FrameType.PONG):
                    self._pings.heard(frame, lane.send)
        except LaneEnded as exc:
            self.lane_ended(peer_id, exc)
        except ProtocolError as exc:
            self._refuse(peer_id, exc)
        return found

    def lane_ended(self, peer_id: PeerId, reason: LaneEnded) -> None:
        """What was under way in it is gone, so the link is over as well."""
        link = self.links.get(peer_id)
        if link is not None:
            self.links.lose(link, f"the connection ended ({reason})")

    def _refuse(self, peer_id: PeerId, reason: ProtocolError) -> None:
        logger.warning("link closed peer=%s reason=%s", peer_id, reason)
        self.links.close(peer_id, str(reason))
        self._inbox.drop_peer(peer_id)

    def _offer_lane(self, link: Link) -> None:
        """To a peer whose connection came to us: it can come a second time."""
        path = link.path
        if not self._use_lanes or not isinstance(path, DirectPath) or not path.routing_id:
            return
        offer = self.lanes.offer(link.peer_id)
        if offer is not None:
            path.send(control_header(FrameType.LANE), offer.encode())

    def _take_offer(self, link: Link, path: Path, frame: DataFrame) -> None:
        if not self._use_lanes or path != link.path or not path.port.endpoint:
            return
        host = path.port.endpoint.removeprefix("tcp://").rpartition(":")[0].strip("[]")
        self.lanes.dial(link.peer_id, host, LaneOffer.decode(frame.payload), time.monotonic())

    def _read_all(self) -> None:
        """Take everything that has arrived: what a lost peer sent before it went still counts."""
        for lane in self.lanes.all():
            while self.lanes.peer_of(lane) is not None and zmq_poll([(lane.descriptor, _POLLIN)], 0):
                self._read_lane(lane, None)
        for socket, port in list(self._ports.items()):
            while not socket.closed:
                try:
                    self._read(port, None)
                except zmq.Again:
                    break

    def _keep(self, peer_id: PeerId, frame: DataFrame) -> None:
        if not self.links.is_connected(peer_id):
            return
        if epoch_of(frame.header) in self._retired:
            return
        self._inbox.put(peer_id, frame.header, frame.payload)

    def _control(self, peer_id: PeerId, path: Path, frame: DataFrame) -> None:
        link = self.links.link(peer_id)
        if link is None:
            return
        try:
            if frame.type in (FrameType.PING, FrameType.PONG):
                self._pings.heard(frame, path.send)
            elif frame.type == FrameType.LANE:
                self._take_offer(link, path, frame)
            else:
                self.links.control(link, frame.type, path)
                self._advance(link, time.monotonic())
        except zmq.ZMQError as exc:
            logger.debug("answer dropped peer=%s reason=%s", link.peer_id, exc)

    def _read_notes(self) -> bool:
        """What other threads told us; whether one of them just wanted to wake us."""
        was_woken = False
        for what, subject, connection in self._wakeups.take():
            if what == "wake":
                was_woken = True
            elif what == "gone":
                self._read_all()
                self.links.inbound_down(PeerId(str(subject)), connection)
            elif what == "up":
                self.links.dial_up(int(subject))
            elif what == "relay":
                if self._relay is not None:
                    self._relay.register()
            elif what == "refused":
                self.links.dial_refused(int(subject), time.monotonic())
            else:
                self._read_all()
                self.links.dial_down(int(subject))
        return was_woken

    def _rebuild_poller(self) -> None:
        relay = () if self._relay is None else (self._relay.port,)
        self._ports = {port.socket: port for port in (self._router, *self.links.ports(), *relay)}
        polled = (*self._ports, *self._guests, self._wakeups.receiver)
        self._polled = [(socket, _POLLIN) for socket in polled]
