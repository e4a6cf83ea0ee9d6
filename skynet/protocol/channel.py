"""The data channel: direct links between workers, owned by one compute thread that blocks on them.

Only that thread calls its methods, except `abort` and `wake`. Every wait polls the data sockets and an inproc wake
socket and has a deadline. A direct link has a fast lane (lane.py) beside its ZeroMQ connection for what the peer waits
for; where two peers can't reach each other, sealed frames go through the coordinator (relay.py).
"""

from __future__ import annotations

import logging
import math
import os
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import zmq
from zmq.backend import zmq_poll

from skynet.errors import ProtocolError, StepAborted, WorkerLost, WorkerTimeout
from skynet.protocol.codec import Buffer
from skynet.protocol.data_frame import (
    INLINE_BYTES,
    DataFrame,
    FrameType,
    Tag,
    control_header,
    data_header,
    epoch_of,
    split,
    split_frames,
)
from skynet.protocol.ids import PeerId
from skynet.protocol.inbox import Inbox
from skynet.protocol.lane import Lane, LaneEnded, LaneOffer
from skynet.protocol.lanes import Lanes, polled_lane
from skynet.protocol.links import DATA_DOMAIN, DirectPath, Link, Links, Path, PathName
from skynet.protocol.plan import Epoch
from skynet.protocol.relay import RELAY_DOMAIN, RelayClient, RelayedGarbage
from skynet.protocol.sockets import Port, Received, SocketFactory
from skynet.protocol.spin import Spinner

logger = logging.getLogger(__name__)
_POLLIN: Final = int(zmq.POLLIN)
_NOBLOCK: Final = int(zmq.NOBLOCK)
MAX_ECHO_BYTES: Final = 4096
MAX_RETIRED: Final = 1024  # epochs whose late frames are still recognised
LANE_PATIENCE_S: Final = 0.3  # how long a new link's lane is waited for; without one everything works, slower
_SLICE_S: Final = 0.02  # how often a link that is being opened is looked at


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelConfig:
    """Limits of one data channel."""

    spin_s: float = 60e-6  # a wait on a lane looks again at once for this long before it sleeps, while that pays
    use_lanes: bool = True  # direct links get a plain TCP connection beside them, under keys that came over CURVE
    max_inbox_bytes: int = 256 << 20  # per peer, arrived before anyone asked
    max_inbox_frames: int = 4096  # per peer
    send_timeout_s: float = 30.0  # a peer that takes nothing for this long is given up


_yield_core: Callable[[], None] = getattr(os, "sched_yield", lambda: time.sleep(0))


class Arrival(NamedTuple):
    """What `recv_any` found. The payload stays valid as long as it is referenced."""

    peer_id: PeerId
    tag: Tag
    payload: memoryview


class Probed(NamedTuple):
    """A link as measured."""

    round_trip_s: float  # of 4 KiB each way
    bandwidth_bytes_per_s: float  # one way


def _direct_path(port: Port, received: Received) -> DirectPath:
    return DirectPath(port, received.routing_id, received.connection) if received.routing_id else DirectPath(port)


class DataChannel:
    """Sends and receives payloads of (epoch, tag) to and from peers. Deadlines are on the monotonic clock."""

    def __init__(
        self, factory: SocketFactory, bind_addresses: Sequence[str], port: int = 0, config: ChannelConfig | None = None
    ) -> None:
        self._config = config or ChannelConfig()
        self._factory = factory
        self._notes: deque[tuple[str, int | PeerId, int]] = deque()
        self._lock = threading.Lock()  # of the wake sender
        self._wake_sender, self._wake_receiver = factory.pair()
        self._router = factory.bind_router(
            DATA_DOMAIN, bind_addresses, port, on_disconnected=lambda peer, conn: self._post("gone", peer, conn)
        )
        self.port = self._router.number
        self._links = Links(factory, self._post, self._rebuild_poller)
        self._inbox = Inbox(self._config.max_inbox_bytes, self._config.max_inbox_frames)
        self._spinner = Spinner(self._config.spin_s)
        self._retired: dict[Epoch, None] = {}  # in the order of their end; the last MAX_RETIRED
        self._aborted: set[Epoch] = set()
        self._is_interrupted = False
        self._pongs: dict[int, memoryview | None] = {}  # awaited; None: not answered yet
        self._num_pings = 0
        self._relay: RelayClient | None = None
        lane_addresses = bind_addresses if self._config.use_lanes else ()
        self._lanes = Lanes(lane_addresses, factory.config.max_frame_bytes, factory.guard.add_plain)
        self._links.on_established = self._offer_lane
        self._links.on_lost = lambda link: self._lanes.drop(link.peer_id)
        self._polled: list[tuple[zmq.Socket[bytes], int]] = []
        self._ports: dict[zmq.Socket[bytes], Port] = {}
        self._guests: tuple[zmq.Socket[bytes], ...] = ()  # of the caller, during `wait`
        self._rebuild_poller()

    # -- from any thread -----------------------------------------------------------------------------------------------

    def abort(self, epoch: Epoch | None = None) -> None:
        """End waits with StepAborted: from now on all of this epoch; without one, the present or next."""
        if epoch is None:
            self._is_interrupted = True
        else:
            self._aborted.add(epoch)
        self.wake()

    def wake(self) -> None:
        """Make a present or the next `wait` return early."""
        self._post("wake", 0, 0)

    def _post(self, what: str, subject: int | PeerId, connection: int) -> None:
        self._notes.append((what, subject, connection))
        with self._lock:
            if not self._wake_sender.closed:
                try:
                    self._wake_sender.send(b"", zmq.NOBLOCK)
                except zmq.Again:
                    return  # enough wake-ups wait there; the note is read with them

    # -- links ---------------------------------------------------------------------------------------------------------

    def connect(self, peer_id: PeerId, key: bytes, addresses: Sequence[tuple[str, int]], deadline: float) -> None:
        """Link with this peer, which does the same. Raises WorkerTimeout, StepAborted."""
        self.dial(peer_id, key, addresses)
        self.await_links([peer_id], deadline)

    def use_relay(self, endpoint: str, server_key: bytes, server_id: PeerId) -> None:
        """From now on, peers that no address reaches within 2 s are reached through this relay."""
        port = self._factory.connect_dealer(
            endpoint, server_key, server_id, domain=RELAY_DOMAIN, on_connected=lambda: self._post("relay", 0, 0)
        )
        self.stop_relay()
        self._relay = RelayClient(self._factory, port)
        self._links.relayed_path = self._relay.reach
        self._rebuild_poller()

    def stop_relay(self) -> None:
        """Give the relay up, with the links that go through it."""
        if self._relay is not None:
            for link in self._links.all():
                if link.path is not None and link.path.port is self._relay.port:
                    self._links.lose(link, "the relay was given up")
            self._relay.port.close()
            self._relay = None
            self._links.relayed_path = lambda peer_id, now: None
            self._rebuild_poller()

    def dial(self, peer_id: PeerId, key: bytes, addresses: Sequence[tuple[str, int]]) -> None:
        """Begin to link and return at once; any later wait carries it on. An established link stays."""
        self._links.dial(peer_id, key, addresses, time.monotonic())

    def await_links(self, peer_ids: Collection[PeerId], deadline: float) -> None:
        """Wait until these dialled peers are linked. Raises WorkerTimeout naming the first that isn't, StepAborted."""
        while missing := [p for p in peer_ids if not self.is_connected(p)]:
            self._check(None)
            now = time.monotonic()
            if now >= deadline:
                raise WorkerTimeout(self._why_not(missing[0]))
            self._pump(min(deadline, now + _SLICE_S))
        until = min(deadline, time.monotonic() + LANE_PATIENCE_S)
        while any(self._is_lane_due(p) for p in peer_ids) and time.monotonic() < until:
            self._pump(min(until, time.monotonic() + _SLICE_S))

    def _is_lane_due(self, peer_id: PeerId) -> bool:
        link = self._links.get(peer_id)
        is_direct = link is not None and link.is_established and isinstance(link.path, DirectPath)
        return is_direct and self._config.use_lanes and self._lanes.get(peer_id) is None

    def is_connected(self, peer_id: PeerId) -> bool:
        """Whether frames can be sent to this peer now."""
        link = self._links.get(peer_id)
        return link is not None and link.is_established

    def path(self, peer_id: PeerId) -> PathName:
        """Which way frames take. Raises WorkerLost if there is none."""
        return self._path(peer_id).name

    def disconnect(self, peer_id: PeerId) -> None:
        """End this link and forget what it brought. Unknown peers are fine."""
        self._links.close(peer_id, "closed by this side")
        if self._relay is not None:
            self._relay.drop(peer_id)
        self._inbox.drop_peer(peer_id)

    def close(self) -> None:
        """Close every socket of the channel. Twice is fine."""
        if not self._router.socket.closed:
            self._links.close_all()
            self._lanes.close()
            self.stop_relay()
            self._router.close()
            self._wake_receiver.close(linger=0)
            with self._lock:
                self._wake_sender.close(linger=0)

    # -- epochs --------------------------------------------------------------------------------------------------------

    def retire(self, epoch: Epoch) -> None:
        """Drop what arrived and what will arrive of this epoch; others, older ones too, may go on."""
        self._retired[epoch] = None
        if len(self._retired) > MAX_RETIRED:
            del self._retired[next(iter(self._retired))]
        self._aborted.discard(epoch)
        self._inbox.drop_epoch(epoch)

    def begin_step(self, epoch: Epoch, step: int) -> None:
        """Drop what earlier, abandoned steps of this epoch left behind."""
        if self._inbox.num_bytes:
            self._inbox.drop_steps(epoch, step)

    # -- payloads ------------------------------------------------------------------------------------------------------

    def send(
        self,
        peer_id: PeerId,
        epoch: Epoch,
        tag: Tag,
        payload: Buffer,
        deadline: float | None = None,
        *,
        in_background: bool = False,
    ) -> None:
        """Send bytes (C-contiguous). When this returns they are copied, or with a lane in the kernel's hands.

        `in_background` leaves a large payload to ZeroMQ's thread, for when nobody waits for it and this thread has
        other work. Waits only while the peer takes no more. Raises WorkerLost, WorkerTimeout, StepAborted.
        """
        header = data_header(epoch, tag)
        path = self._path(peer_id)
        lane = self._lanes.get(peer_id)
        if lane is not None and not (in_background and len(payload) > INLINE_BYTES):
            self._send_by_lane(peer_id, lane, epoch, header, payload, deadline)
            return
        try:
            path.send(header, payload)
            return
        except zmq.Again:
            pass
        except zmq.ZMQError as exc:
            raise WorkerLost(f"peer {peer_id}: gone while sending to it ({exc.strerror})") from exc
        self._send_slowly(peer_id, epoch, header, payload, deadline)

    def _send_by_lane(
        self, peer_id: PeerId, lane: Lane, epoch: Epoch | None, header: bytes, payload: Buffer, deadline: float | None
    ) -> None:
        try:
            if not lane.is_leaving():  # else an abandoned frame is in front of this one
                lane.send(header, payload)
                if not lane.is_leaving():
                    return
                self._empty_lane(peer_id, lane, epoch, deadline)
            else:
                self._empty_lane(peer_id, lane, epoch, deadline)
                self._send_by_lane(peer_id, lane, epoch, header, payload, deadline)
        except LaneEnded as exc:
            self._lane_ended(peer_id, exc)
            raise WorkerLost(f"peer {peer_id}: gone while sending to it ({exc})") from exc

    def _empty_lane(self, peer_id: PeerId, lane: Lane, epoch: Epoch | None, deadline: float | None) -> None:
        """Wait until the kernel has all of it, reading meanwhile: the peer may be sending as well."""
        deadline = time.monotonic() + self._config.send_timeout_s if deadline is None else deadline
        while lane.is_leaving():
            self._check(epoch)
            self._path(peer_id)
            if time.monotonic() >= deadline:
                raise WorkerTimeout(f"peer {peer_id}: takes no frames; its lane is full")
            self._pump(deadline)

    def _send_slowly(
        self, peer_id: PeerId, epoch: Epoch, header: bytes, payload: Buffer, deadline: float | None
    ) -> None:
        deadline = time.monotonic() + self._config.send_timeout_s if deadline is None else deadline
        while True:
            self._pump(min(deadline, time.monotonic() + 0.001))  # reading meanwhile: the peer may be waiting for us
            self._check(epoch)
            try:
                self._path(peer_id).send(header, payload)
                return
            except zmq.Again:
                if time.monotonic() >= deadline:
                    raise WorkerTimeout(f"peer {peer_id}: takes no frames; its queue is full") from None
            except zmq.ZMQError as exc:
                raise WorkerLost(f"peer {peer_id}: gone while sending to it ({exc.strerror})") from exc

    def recv(self, peer_id: PeerId, epoch: Epoch, tag: Tag, deadline: float) -> memoryview:
        """The payload that this peer sent under (epoch, tag). Raises WorkerTimeout, StepAborted, WorkerLost."""
        header = data_header(epoch, tag)
        payload = self._inbox.pop(peer_id, header)
        if payload is not None:
            return payload
        return self._receive({(peer_id, header): tag}, epoch, deadline).payload

    def recv_any(self, wanted: Collection[tuple[PeerId, Tag]], epoch: Epoch, deadline: float) -> Arrival:
        """Whichever of these comes first. Raises WorkerTimeout, StepAborted, WorkerLost (of any of them)."""
        headers = {(peer_id, data_header(epoch, tag)): tag for peer_id, tag in wanted}
        return self._pop_any(headers) or self._receive(headers, epoch, deadline)

    def wait(self, sockets: Sequence[zmq.Socket[bytes]], deadline: float) -> list[zmq.Socket[bytes]]:
        """Which of these other sockets of this thread can be read; none at the deadline or after `wake`.

        Meanwhile links are served: frames go to the inbox, pings are answered. Raises StepAborted after `abort()`.
        """
        self._guests = tuple(sockets)
        self._rebuild_poller()
        try:
            while True:
                until = deadline
                if any(link.is_connecting for link in self._links.all()):
                    until = min(deadline, time.monotonic() + _SLICE_S)
                ready, was_woken = self._pump(until)
                self._check(None)
                if ready or was_woken or time.monotonic() >= deadline:
                    return ready
        finally:
            self._guests = ()
            self._rebuild_poller()

    def probe(self, peer_id: PeerId, deadline: float, *, num_round_trips: int = 20, num_bytes: int = 4 << 20) -> Probed:
        """Measure the link while the peer waits too: round trip of 4 KiB (median), bandwidth. Raises WorkerTimeout."""
        round_trips = [self._ping(peer_id, bytes(MAX_ECHO_BYTES), 1, deadline) for _ in range(num_round_trips)]
        round_trip_s = statistics.median(round_trips)
        piece = 1 << 20
        took_s = self._ping(peer_id, bytes(piece), max(1, num_bytes // piece), deadline)
        return Probed(round_trip_s, num_bytes / max(took_s - round_trip_s, took_s / 10))

    def _ping(self, peer_id: PeerId, payload: bytes, count: int, deadline: float) -> float:
        """Seconds from the first ping until all of them are answered."""
        self._pongs.clear()
        began = time.monotonic()
        for _ in range(count):
            self._num_pings = (self._num_pings + 1) % (1 << 32)
            self._pongs[self._num_pings] = None
            self._send_control(peer_id, control_header(FrameType.PING, self._num_pings), payload, deadline)
        while any(answer is None for answer in self._pongs.values()):
            self._check(None)
            self._path(peer_id)
            if time.monotonic() >= deadline:
                raise WorkerTimeout(f"peer {peer_id}: didn't answer a ping in time; is its compute thread busy?")
            self._pump(deadline)
        return time.monotonic() - began

    def _send_control(self, peer_id: PeerId, header: bytes, payload: Buffer, deadline: float) -> None:
        """By the way that exchanges take."""
        lane = self._lanes.get(peer_id)
        if lane is not None:
            self._send_by_lane(peer_id, lane, None, header, payload, deadline)
        else:
            self._path(peer_id).send(header, payload)

    # -- inside --------------------------------------------------------------------------------------------------------

    def _receive(self, wanted: dict[tuple[PeerId, bytes], Tag], epoch: Epoch, deadline: float) -> Arrival:
        polled, is_lost = self._sockets_of(wanted)
        spin_until = self._spinner.begin(time.monotonic()) if len(polled) > 2 else 0.0  # ZeroMQ's thread needs a core
        is_blocking = False
        while True:
            self._check(epoch)
            if not is_blocking and time.monotonic() >= spin_until and not is_lost:
                is_blocking = True
                if spin_until:
                    self._spinner.miss()
            arrival = self._poll(deadline if is_blocking and not is_lost else 0.0, wanted, polled)[2]
            if arrival is not None:
                if spin_until and not is_blocking:
                    self._spinner.hit()
                return arrival
            if is_lost:  # what was there already has been taken
                self._raise_lost(wanted)
            if not is_blocking:
                _yield_core()  # whoever else needs this core comes first
            if is_blocking and time.monotonic() >= deadline:
                names = ", ".join(sorted({str(p) for p, _ in wanted}))
                tag = next(iter(wanted.values()))
                raise WorkerTimeout(f"peer {names}: nothing came for epoch {epoch} {tag} before the deadline")
            polled, is_lost = self._sockets_of(wanted)

    def _sockets_of(self, wanted: Iterable[tuple[PeerId, bytes]]) -> tuple[list[tuple[Any, int]], bool]:
        """What to poll for these peers' frames, and whether one of the peers is lost."""
        sockets, is_lost = [self._wake_receiver], False
        lanes = []
        for peer_id, _ in wanted:
            link = self._links.get(peer_id)
            if link is None or not link.is_established:
                is_lost = True
            else:
                assert link.path is not None
                socket = link.path.port.socket
                if socket not in sockets:
                    sockets.append(socket)
                lane = self._lanes.get(peer_id)
                if lane is not None:
                    lanes.append(polled_lane(lane))
        if is_lost:
            return self._polled_all(), True
        return [*lanes, *[(socket, _POLLIN) for socket in sockets]], False

    def _polled_all(self) -> list[tuple[Any, int]]:
        return [*self._polled, *self._lanes.polled()]

    def _raise_lost(self, wanted: Iterable[tuple[PeerId, bytes]]) -> None:
        for peer_id, _ in wanted:
            self._path(peer_id)

    def _pump(self, until: float) -> tuple[list[zmq.Socket[bytes]], bool]:
        """Serve links until something happened; which guests were ready, and whether `wake` was called."""
        guests, was_woken, _ = self._poll(until, {}, self._polled_all())
        now = time.monotonic()
        for link in self._links.all():
            self._advance(link, now)
        return guests, was_woken

    def _poll(
        self,
        until: float,
        wanted: dict[tuple[PeerId, bytes], Tag],
        polled: list[tuple[Any, int]],
    ) -> tuple[list[zmq.Socket[bytes]], bool, Arrival | None]:
        """Wait once, then read at most one message per ready socket: asking again is cheaper than reading on."""
        timeout_ms = max(0, math.ceil((until - time.monotonic()) * 1000)) if until else 0
        if self._relay is not None and self._relay.flush():
            timeout_ms = min(timeout_ms, 2)
        guests: list[zmq.Socket[bytes]] = []
        was_woken, has_notes, found = False, False, None
        ready: list[tuple[Any, int]] = zmq_poll(polled, timeout_ms)
        for socket, _ in ready:
            if isinstance(socket, int):
                lane = self._lanes.at(socket)
                if lane is None:
                    self._lanes.serve(time.monotonic())
                else:
                    found = self._read_lane(lane, wanted, found)
            elif socket is self._wake_receiver:
                has_notes = True
            elif socket in self._guests:
                guests.append(socket)
            elif found is None and not socket.closed:
                found = self._read(self._ports[socket], wanted)
        if has_notes and found is None:
            was_woken = self._read_notes()
            found = self._pop_any(wanted)
        return guests, was_woken, found

    def _pop_any(self, wanted: dict[tuple[PeerId, bytes], Tag]) -> Arrival | None:
        for (peer_id, header), tag in wanted.items():
            payload = self._inbox.pop(peer_id, header)
            if payload is not None:
                return Arrival(peer_id, tag, payload)
        return None

    def _advance(self, link: Link, now: float) -> None:
        try:
            self._links.advance(link, now)
        except zmq.ZMQError as exc:
            logger.debug("link not ready peer=%s reason=%s", link.peer_id, exc)

    def _read(self, port: Port, wanted: dict[tuple[PeerId, bytes], Tag]) -> Arrival | None:
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
            tag = wanted.get((peer_id, frame.header))
            if tag is not None:
                return Arrival(peer_id, tag, frame.payload)
            self._keep(peer_id, frame)
        except RelayedGarbage as exc:
            link = self._links.get(exc.peer_id)
            if link is not None and link.path is exc.path:  # a direct link doesn't suffer from what the relay makes up
                self._links.lose(link, str(exc))
        except ProtocolError as exc:
            self._refuse(peer_id, exc)
        return None

    def _read_lane(
        self, lane: Lane, wanted: dict[tuple[PeerId, bytes], Tag], found: Arrival | None = None
    ) -> Arrival | None:
        """Take what came by a lane; the first wanted frame is returned, unless `found` is there already."""
        peer_id = self._lanes.peer_of(lane)
        if peer_id is None:
            return found
        try:
            lane.flush()
            frames = lane.receive()
            if not self._factory.registry.is_allowed(peer_id, DATA_DOMAIN):
                return found
            for frame in frames:
                tag = wanted.get((peer_id, frame.header)) if found is None else None
                if tag is not None:
                    found = Arrival(peer_id, tag, frame.payload)
                elif frame.type == FrameType.DATA:
                    self._keep(peer_id, frame)
                elif frame.type in (FrameType.PING, FrameType.PONG):
                    self._ping_or_pong(peer_id, frame, lane.send)
        except LaneEnded as exc:
            self._lane_ended(peer_id, exc)
        except ProtocolError as exc:
            self._refuse(peer_id, exc)
        return found

    def _lane_ended(self, peer_id: PeerId, reason: LaneEnded) -> None:
        # What was under way in it is gone, so the link is over as well.
        link = self._links.get(peer_id)
        if link is not None:
            self._links.lose(link, f"the connection ended ({reason})")

    def _refuse(self, peer_id: PeerId, reason: ProtocolError) -> None:
        logger.warning("link closed peer=%s reason=%s", peer_id, reason)
        self._links.close(peer_id, str(reason))
        self._inbox.drop_peer(peer_id)

    def _offer_lane(self, link: Link) -> None:
        """To a peer whose connection came to us: it can come a second time."""
        path = link.path
        if not self._config.use_lanes or not isinstance(path, DirectPath) or not path.routing_id:
            return
        offer = self._lanes.offer(link.peer_id)
        if offer is not None:
            path.send(control_header(FrameType.LANE), offer.encode())

    def _take_offer(self, link: Link, path: Path, frame: DataFrame) -> None:
        if not self._config.use_lanes or path != link.path or not path.port.endpoint:
            return
        host = path.port.endpoint.removeprefix("tcp://").rpartition(":")[0].strip("[]")
        self._lanes.dial(link.peer_id, host, LaneOffer.decode(frame.payload), time.monotonic())

    def _read_all(self) -> None:
        """Take everything that has arrived: what a lost peer sent before it went still counts."""
        for lane in self._lanes.all():
            while self._lanes.peer_of(lane) is not None and zmq_poll([(lane.descriptor, _POLLIN)], 0):
                self._read_lane(lane, {})
        for socket, port in list(self._ports.items()):
            while not socket.closed:
                try:
                    self._read(port, {})
                except zmq.Again:
                    break

    def _keep(self, peer_id: PeerId, frame: DataFrame) -> None:
        if not self.is_connected(peer_id):
            return
        if epoch_of(frame.header) in self._retired:
            return
        self._inbox.put(peer_id, frame.header, frame.payload)

    def _control(self, peer_id: PeerId, path: Path, frame: DataFrame) -> None:
        link = self._links.link(peer_id)
        if link is None:
            return
        try:
            if frame.type in (FrameType.PING, FrameType.PONG):
                self._ping_or_pong(peer_id, frame, path.send)
            elif frame.type == FrameType.LANE:
                self._take_offer(link, path, frame)
            else:
                self._links.control(link, frame.type, path)
                self._advance(link, time.monotonic())
        except zmq.ZMQError as exc:
            logger.debug("answer dropped peer=%s reason=%s", link.peer_id, exc)

    def _ping_or_pong(self, peer_id: PeerId, frame: DataFrame, reply: Callable[[bytes, Buffer], None]) -> None:
        number = int.from_bytes(frame.header[20:24], "little")
        if frame.type == FrameType.PING:
            echo = frame.payload if frame.payload.nbytes <= MAX_ECHO_BYTES else b""
            reply(control_header(FrameType.PONG, number), echo)
        elif number in self._pongs:
            self._pongs[number] = frame.payload

    def _read_notes(self) -> bool:
        """What other threads told us; whether one of them just wanted to wake us."""
        while True:
            try:
                self._wake_receiver.recv(zmq.NOBLOCK)
            except zmq.Again:
                break
        was_woken = False
        while self._notes:
            what, subject, connection = self._notes.popleft()
            if what == "wake":
                was_woken = True
            elif what == "gone":
                self._read_all()
                self._links.inbound_down(PeerId(str(subject)), connection)
            elif what == "up":
                self._links.dial_up(int(subject))
            elif what == "relay":
                if self._relay is not None:
                    self._relay.register()
            elif what == "refused":
                self._links.dial_refused(int(subject), time.monotonic())
            else:
                self._read_all()
                self._links.dial_down(int(subject))
        return was_woken

    def _check(self, epoch: Epoch | None) -> None:
        if self._is_interrupted:
            self._is_interrupted = False
            raise StepAborted("the wait was ended by this worker")
        if self._aborted and epoch in self._aborted:
            raise StepAborted(f"epoch {epoch} is over")

    def _path(self, peer_id: PeerId) -> Path:
        link = self._links.get(peer_id)
        if link is None or not link.is_established or link.path is None:
            reason = "no link" if link is None or link.lost is None else link.lost
            raise WorkerLost(f"peer {peer_id}: {reason}; it needs a new link before anything can be sent")
        return link.path

    def _why_not(self, peer_id: PeerId) -> str:
        link = self._links.get(peer_id)
        if link is None:
            return f"peer {peer_id}: no link, and nobody dials it; call dial first"
        tried = ", ".join(f"{host}:{port}" for host, port in link.addresses) or "no address"
        if link.lost is not None:
            return f"peer {peer_id}: {link.lost}"
        if link.standing is not None or link.inbound is not None:
            return f"peer {peer_id}: reached at one of {tried}, but it didn't agree on a link in time; is it busy?"
        return f"peer {peer_id}: none of {tried} could be reached, nor did it reach us; check addresses and firewalls"

    def _rebuild_poller(self) -> None:
        relay = () if self._relay is None else (self._relay.port,)
        self._ports = {port.socket: port for port in (self._router, *self._links.ports(), *relay)}
        polled = (*self._ports, *self._guests, self._wake_receiver)
        self._polled = [(socket, _POLLIN) for socket in polled]
