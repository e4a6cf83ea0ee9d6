"""The data channel: direct links between workers, owned by one compute thread that blocks on them.

Only that thread calls its methods, except `abort` and `wake`. Every wait polls the data sockets and an inproc wake
socket and has a deadline. A direct link has a fast lane (lane.py) beside its ZeroMQ connection for what the peer waits
for; where two peers can't reach each other, sealed frames go through the coordinator (relay.py).
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Final

import zmq

from skynet.errors import WorkerLost, WorkerTimeout
from skynet.protocol.codec import Buffer
from skynet.protocol.data_frame import INLINE_BYTES, Tag, data_header
from skynet.protocol.ids import PeerId
from skynet.protocol.inbox import Inbox
from skynet.protocol.lane import Lane, LaneEnded
from skynet.protocol.links import DirectPath, PathName
from skynet.protocol.pings import MAX_ECHO_BYTES, Pings, Probed
from skynet.protocol.plan import Epoch
from skynet.protocol.reception import Reception, Wanted
from skynet.protocol.sockets import SocketFactory
from skynet.protocol.spin import Spinner
from skynet.protocol.wakeups import Note, Wakeups

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


class DataChannel:
    """Sends and receives payloads of (epoch, tag) to and from peers. Deadlines are on the monotonic clock."""

    def __init__(
        self, factory: SocketFactory, bind_addresses: Sequence[str], port: int = 0, config: ChannelConfig | None = None
    ) -> None:
        self._config = config or ChannelConfig()
        self._wakeups = Wakeups(factory)
        self._inbox = Inbox(self._config.max_inbox_bytes, self._config.max_inbox_frames)
        self._pings = Pings()
        self._reception = Reception(
            factory,
            bind_addresses,
            port,
            self._wakeups,
            self._inbox,
            self._pings,
            use_lanes=self._config.use_lanes,
        )
        self.port = self._reception.port
        self._links, self._lanes = self._reception.links, self._reception.lanes
        self._spinner = Spinner(self._config.spin_s)

    # -- from any thread -----------------------------------------------------------------------------------------------

    def abort(self, epoch: Epoch | None = None) -> None:
        """End waits with StepAborted: from now on all of this epoch; without one, the present or next."""
        self._wakeups.abort(epoch)

    def wake(self) -> None:
        """Make a present or the next `wait` return early."""
        self._wakeups.post(Note("wake"))

    # -- links ---------------------------------------------------------------------------------------------------------

    def connect(self, peer_id: PeerId, key: bytes, addresses: Sequence[tuple[str, int]], deadline: float) -> None:
        """Link with this peer, which does the same. Raises WorkerTimeout, StepAborted."""
        self.dial(peer_id, key, addresses)
        self.await_links([peer_id], deadline)

    def use_relay(self, endpoint: str, server_key: bytes, server_id: PeerId) -> None:
        """From now on, peers that no address reaches within 2 s are reached through this relay."""
        self._reception.use_relay(endpoint, server_key, server_id)

    def stop_relay(self) -> None:
        """Give the relay up, with the links that go through it."""
        self._reception.stop_relay()

    def dial(self, peer_id: PeerId, key: bytes, addresses: Sequence[tuple[str, int]]) -> None:
        """Begin to link and return at once; any later wait carries it on. An established link stays."""
        self._links.dial(peer_id, key, addresses, time.monotonic())

    def await_links(self, peer_ids: Collection[PeerId], deadline: float) -> None:
        """Wait until these dialled peers are linked. Raises WorkerTimeout naming the first that isn't, StepAborted."""
        while missing := [p for p in peer_ids if not self.is_connected(p)]:
            self._wakeups.check(None)
            now = time.monotonic()
            if now >= deadline:
                raise WorkerTimeout(self._links.why_not(missing[0]))
            self._reception.pump(min(deadline, now + _SLICE_S))
        until = min(deadline, time.monotonic() + LANE_PATIENCE_S)
        while any(self._is_lane_due(p) for p in peer_ids) and time.monotonic() < until:
            self._reception.pump(min(until, time.monotonic() + _SLICE_S))

    def _is_lane_due(self, peer_id: PeerId) -> bool:
        link = self._links.get(peer_id)
        is_direct = link is not None and link.is_established and isinstance(link.path, DirectPath)
        return is_direct and self._config.use_lanes and self._lanes.get(peer_id) is None

    def is_connected(self, peer_id: PeerId) -> bool:
        """Whether frames can be sent to this peer now."""
        return self._links.is_connected(peer_id)

    def path(self, peer_id: PeerId) -> PathName:
        """Which way frames take. Raises WorkerLost if there is none."""
        return self._links.path(peer_id).name

    def disconnect(self, peer_id: PeerId) -> None:
        """End this link and forget what it brought. Unknown peers are fine."""
        self._links.close(peer_id, "closed by this side")
        self._reception.drop(peer_id)

    def close(self) -> None:
        """Close every socket of the channel. Twice is fine."""
        self._reception.close()
        self._wakeups.close()

    # -- epochs --------------------------------------------------------------------------------------------------------

    def retire(self, epoch: Epoch) -> None:
        """Drop what arrived and what will arrive of this epoch; others, older ones too, may go on."""
        self._wakeups.forget(epoch)
        self._reception.retire(epoch)

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
        path = self._links.path(peer_id)
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
            self._reception.lane_ended(peer_id, exc)
            raise WorkerLost(f"peer {peer_id}: gone while sending to it ({exc})") from exc

    def _empty_lane(self, peer_id: PeerId, lane: Lane, epoch: Epoch | None, deadline: float | None) -> None:
        """Wait until the kernel has all of it, reading meanwhile: the peer may be sending as well."""
        deadline = time.monotonic() + self._config.send_timeout_s if deadline is None else deadline
        while lane.is_leaving():
            self._wakeups.check(epoch)
            self._links.path(peer_id)
            if time.monotonic() >= deadline:
                raise WorkerTimeout(f"peer {peer_id}: takes no frames; its lane is full")
            self._reception.pump(deadline)

    def _send_slowly(
        self, peer_id: PeerId, epoch: Epoch, header: bytes, payload: Buffer, deadline: float | None
    ) -> None:
        deadline = time.monotonic() + self._config.send_timeout_s if deadline is None else deadline
        while True:
            self._reception.pump(
                min(deadline, time.monotonic() + 0.001)
            )  # reading meanwhile: the peer may be waiting for us
            self._wakeups.check(epoch)
            try:
                self._links.path(peer_id).send(header, payload)
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
        payload = self._receive((peer_id, header), epoch, deadline)
        if payload is None:
            raise WorkerTimeout(f"peer {peer_id}: nothing came for epoch {epoch} {tag} before the deadline")
        return payload

    def wait(self, sockets: Sequence[zmq.Socket[bytes]], deadline: float) -> list[zmq.Socket[bytes]]:
        """Which of these other sockets of this thread can be read; none at the deadline or after `wake`.

        Meanwhile links are served: frames go to the inbox, pings are answered. Raises StepAborted after `abort()`.
        """
        self._reception.welcome(sockets)
        try:
            while True:
                until = deadline
                if any(link.is_connecting for link in self._links.all()):
                    until = min(deadline, time.monotonic() + _SLICE_S)
                ready, was_woken = self._reception.pump(until)
                self._wakeups.check(None)
                if ready or was_woken or time.monotonic() >= deadline:
                    return ready
        finally:
            self._reception.welcome(())

    def probe(self, peer_id: PeerId, deadline: float, *, num_round_trips: int = 20, num_bytes: int = 4 << 20) -> Probed:
        """Measure the link while the peer waits too: round trip of 4 KiB (median), bandwidth. Raises WorkerTimeout."""
        round_trips = [self._ping(peer_id, bytes(MAX_ECHO_BYTES), 1, deadline) for _ in range(num_round_trips)]
        round_trip_s = statistics.median(round_trips)
        piece = 1 << 20
        took_s = self._ping(peer_id, bytes(piece), max(1, num_bytes // piece), deadline)
        return Probed(round_trip_s, num_bytes / max(took_s - round_trip_s, took_s / 10))

    def _ping(self, peer_id: PeerId, payload: bytes, count: int, deadline: float) -> float:
        """Seconds from the first ping until all of them are answered."""
        self._pings.forget()
        began = time.monotonic()
        for _ in range(count):
            self._send_control(peer_id, self._pings.next(), payload, deadline)
        while self._pings.is_waiting:
            self._wakeups.check(None)
            self._links.path(peer_id)
            if time.monotonic() >= deadline:
                raise WorkerTimeout(f"peer {peer_id}: didn't answer a ping in time; is its compute thread busy?")
            self._reception.pump(deadline)
        return time.monotonic() - began

    def _send_control(self, peer_id: PeerId, header: bytes, payload: Buffer, deadline: float) -> None:
        """By the way that exchanges take."""
        lane = self._lanes.get(peer_id)
        if lane is not None:
            self._send_by_lane(peer_id, lane, None, header, payload, deadline)
        else:
            self._links.path(peer_id).send(header, payload)

    # -- inside --------------------------------------------------------------------------------------------------------

    def _receive(self, wanted: Wanted, epoch: Epoch, deadline: float) -> memoryview | None:
        """None: it didn't come in time."""
        peer_id = wanted[0]
        polled, is_lost = self._reception.sockets_of(peer_id)
        spin_until = self._spinner.begin(time.monotonic()) if len(polled) > 2 else 0.0  # ZeroMQ's thread needs a core
        is_blocking = False
        while True:
            self._wakeups.check(epoch)
            if not is_blocking and time.monotonic() >= spin_until and not is_lost:
                is_blocking = True
                if spin_until:
                    self._spinner.miss()
            payload = self._reception.poll(deadline if is_blocking and not is_lost else 0.0, wanted, polled)[2]
            if payload is not None:
                if spin_until and not is_blocking:
                    self._spinner.hit()
                return payload
            if is_lost:  # what was there already has been taken
                self._links.path(peer_id)
            if not is_blocking:
                _yield_core()  # whoever else needs this core comes first
            if is_blocking and time.monotonic() >= deadline:
                return None
            polled, is_lost = self._reception.sockets_of(peer_id)
