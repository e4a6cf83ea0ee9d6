"""One link per peer: both sides dial all addresses, one connection is kept, and both know which.

The side with the smaller CURVE key chooses: its own connection as soon as one stands, the other side's if none of
its own does within 0.25 s, the relay after 2 s. It says KEEP on the chosen path; the other answers KEPT and closes the
rest.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, Protocol

import zmq

from skynet.errors import MalformedMessage, WorkerLost
from skynet.protocol.codec import Buffer
from skynet.protocol.data_frame import FrameType, control_header, send_on
from skynet.protocol.ids import PeerId
from skynet.protocol.sockets import Port, SocketFactory
from skynet.protocol.wakeups import Note

logger = logging.getLogger(__name__)
PATIENCE_S: Final = 0.25  # how long the choosing side waits for its own connection when the other's stands already
REACH_S: Final = 2.0  # how long addresses are tried before the relay is
REFUSED_S: Final = 0.1  # until a refused dial is repeated
DATA_DOMAIN: Final = "data"

PathName = Literal["direct", "relayed"]


class Path(Protocol):
    """How frames reach a peer."""

    @property
    def name(self) -> PathName: ...

    @property
    def port(self) -> Port:
        """The socket that its frames come by."""

    def send(self, header: bytes, payload: Buffer) -> None:
        """Queue one frame at once. Raises zmq.Again when the queue is full, ZMQError when the peer is gone."""


@dataclass(frozen=True, slots=True)
class DirectPath:
    """A connection of our own: a DEALER that we dialled, or a peer's on our ROUTER."""

    port: Port
    routing_id: bytes = b""  # of a peer's connection on our ROUTER
    connection: int = -1
    name: PathName = "direct"

    def send(self, header: bytes, payload: Buffer) -> None:
        send_on(self.port.socket, self.routing_id, header, payload)


@dataclass(slots=True, eq=False)
class Link:
    """What we know of the way to one peer."""

    peer_id: PeerId
    is_chooser: bool
    addresses: tuple[tuple[str, int], ...] = ()
    candidates: dict[int, Port] = field(default_factory=dict)  # dials, by number
    standing: int | None = None  # the first dial whose handshake is done
    inbound: DirectPath | None = None  # the peer's dial, once it said HELLO
    path: Path | None = None  # chosen
    is_established: bool = False  # agreed by both
    is_connecting: bool = False
    refused: dict[int, float] = field(default_factory=dict)  # dials to repeat, and when
    said_hello: bool = False
    since: float = 0.0  # when dialling began, monotonic
    lost: str | None = None  # why it is over


class Links:
    """Owned by the channel's thread. `post` is how the guard's thread tells that thread what it saw."""

    def __init__(
        self, factory: SocketFactory, post: Callable[[Note], None], on_ports_changed: Callable[[], None]
    ) -> None:
        self._factory = factory
        self._post = post
        self._on_ports_changed = on_ports_changed
        self._numbers = itertools.count()
        self._links: dict[PeerId, Link] = {}
        self._dials: dict[int, Link] = {}
        self._retries: dict[int, Callable[[], None]] = {}
        self.on_established: Callable[[Link], None] = lambda link: None
        self.on_lost: Callable[[Link], None] = lambda link: None
        self.relayed_path: Callable[[PeerId, float], Path | None] = lambda peer_id, now: None

    def get(self, peer_id: PeerId) -> Link | None:
        """What we know of this peer, established or not."""
        return self._links.get(peer_id)

    def is_connected(self, peer_id: PeerId) -> bool:
        """Whether frames can be sent to this peer now."""
        link = self._links.get(peer_id)
        return link is not None and link.is_established

    def all(self) -> list[Link]:
        """Every link, in no order."""
        return list(self._links.values())

    def ports(self) -> Iterator[Port]:
        """Every socket that we dialled."""
        for link in self._links.values():
            yield from link.candidates.values()

    def link(self, peer_id: PeerId) -> Link | None:
        """This peer's link, made if the peer is admitted."""
        link = self._links.get(peer_id)
        if link is None:
            key = self._factory.registry.key_of(peer_id)
            if key is None:
                return None
            link = self._links[peer_id] = Link(peer_id, is_chooser=self._factory.public_key < key)
        return link

    def path(self, peer_id: PeerId) -> Path:
        """The way to this peer. Raises WorkerLost if there is none."""
        link = self._links.get(peer_id)
        if link is None or not link.is_established or link.path is None:
            reason = "no link" if link is None or link.lost is None else link.lost
            raise WorkerLost(f"peer {peer_id}: {reason}; it needs a new link before anything can be sent")
        return link.path

    def why_not(self, peer_id: PeerId) -> str:
        """In words for people: what a link that isn't established lacks."""
        link = self._links.get(peer_id)
        if link is None:
            return f"peer {peer_id}: no link, and nobody dials it; call dial first"
        tried = ", ".join(f"{host}:{port}" for host, port in link.addresses) or "no address"
        if link.lost is not None:
            return f"peer {peer_id}: {link.lost}"
        if link.standing is not None or link.inbound is not None:
            return f"peer {peer_id}: reached at one of {tried}, but it didn't agree on a link in time; is it busy?"
        return f"peer {peer_id}: none of {tried} could be reached, nor did it reach us; check addresses and firewalls"

    # -- opening and closing -------------------------------------------------------------------------------------------

    def dial(self, peer_id: PeerId, key: bytes, addresses: Sequence[tuple[str, int]], now: float) -> None:
        """Begin to connect; an established link stays as it is. `advance` and the notes carry it on."""
        link = self._links.get(peer_id)
        if link is not None and link.is_established and link.lost is None:
            return
        inbound = None if link is None else link.inbound
        if link is not None:
            self._close_candidates(link)
        link = Link(peer_id, self._factory.public_key < key, tuple(addresses), inbound=inbound, since=now)
        self._links[peer_id] = link
        link.is_connecting = True
        for host, port in link.addresses:
            self._dial_one(link, key, f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}")
        self._on_ports_changed()

    def _dial_one(self, link: Link, key: bytes, endpoint: str) -> None:
        number = next(self._numbers)
        link.candidates[number] = self._factory.connect_dealer(
            endpoint,
            key,
            link.peer_id,
            domain=DATA_DOMAIN,
            on_connected=lambda: self._post(Note("up", number)),
            on_refused=lambda: self._post(Note("refused", number)),
            on_disconnected=lambda _, connection: self._post(Note("down", number, connection)),
        )
        self._dials[number] = link
        self._retries[number] = lambda: self._dial_one(link, key, endpoint)

    def close(self, peer_id: PeerId, reason: str) -> None:
        """End the link; the peer sees it at once."""
        link = self._links.get(peer_id)
        if link is None:
            return
        if link.path is not None and link.lost is None:
            with contextlib.suppress(zmq.ZMQError):
                link.path.send(control_header(FrameType.BYE), b"")
        self.lose(link, reason)
        self._close_candidates(link)

    def close_all(self) -> None:
        """Close what we dialled."""
        for link in self._links.values():
            self.close(link.peer_id, "the channel closed")

    def lose(self, link: Link, reason: str) -> None:
        """Note that the link is over. Its socket stays open until someone dials again: it may hold frames."""
        if link.lost is None and (link.is_established or link.is_connecting):
            logger.info("link lost peer=%s reason=%s", link.peer_id, reason)
            link.lost = reason
        link.is_established = link.is_connecting = False
        self.on_lost(link)

    def _close_candidates(self, link: Link, keep: Port | None = None) -> None:
        for number, port in list(link.candidates.items()):
            if port is not keep:
                self._close_one(link, number)
        self._on_ports_changed()

    def _close_one(self, link: Link, number: int) -> None:
        link.candidates.pop(number).close()
        del self._dials[number], self._retries[number]

    # -- what the guard saw --------------------------------------------------------------------------------------------

    def dial_up(self, number: int) -> None:
        """The handshake of one of our dials is done."""
        link = self._dials.get(number)
        if link is not None and link.standing is None:
            link.standing = number

    def dial_refused(self, number: int, now: float) -> None:
        """The peer doesn't know our key, perhaps not yet: try again in a moment."""
        link = self._dials.get(number)
        if link is not None and link.is_connecting:
            link.refused[number] = now + REFUSED_S

    def dial_down(self, number: int) -> None:
        """One of our dials lost its connection; libzmq tries again as long as the socket is open."""
        link = self._dials.get(number)
        if link is None:
            return
        if isinstance(link.path, DirectPath) and link.path.port is link.candidates[number]:
            if link.is_established:
                self.lose(link, "the connection ended")
            else:
                link.path = None
        if link.standing == number:
            link.standing, link.said_hello = None, False

    def inbound_down(self, peer_id: PeerId, connection: int) -> None:
        """A connection of this peer to our ROUTER ended."""
        link = self._links.get(peer_id)
        if link is None:
            return
        if link.inbound is not None and link.inbound.connection == connection:
            link.inbound = None
        if isinstance(link.path, DirectPath) and link.path.routing_id and link.path.connection == connection:
            if link.is_established:
                self.lose(link, "the connection ended")
            else:
                link.path = None

    # -- agreeing ------------------------------------------------------------------------------------------------------

    def advance(self, link: Link, now: float) -> None:
        """Do what is due for a link that isn't established yet."""
        if not link.is_connecting:
            return
        for number in [n for n, due in link.refused.items() if now >= due and n in link.candidates]:
            del link.refused[number]
            retry = self._retries[number]
            self._close_one(link, number)
            retry()
            self._on_ports_changed()
        if not link.is_chooser:
            if link.standing is not None and not link.said_hello:
                DirectPath(link.candidates[link.standing]).send(control_header(FrameType.HELLO), b"")
                link.said_hello = True
        elif link.path is None:
            link.path = self._choose(link, now)
            if link.path is not None:
                link.path.send(control_header(FrameType.KEEP), b"")

    def _choose(self, link: Link, now: float) -> Path | None:
        if link.standing is not None:
            return DirectPath(link.candidates[link.standing])
        if link.inbound is not None and (now >= link.since + PATIENCE_S or not link.addresses):
            return link.inbound
        if now >= link.since + REACH_S:
            return self.relayed_path(link.peer_id, now)
        return None

    def control(self, link: Link, frame_type: int, path: Path) -> None:
        """Handle HELLO, KEEP, KEPT or BYE. Raises MalformedMessage for one that this peer may not send."""
        if frame_type == FrameType.HELLO:
            if isinstance(path, DirectPath) and path.routing_id:
                link.inbound = path
        elif frame_type == FrameType.BYE:
            self.lose(link, "the peer closed it")
        elif frame_type == FrameType.KEEP:
            if link.is_chooser:
                raise MalformedMessage(f"peer {link.peer_id}: said KEEP, but choosing is up to this side")
            path.send(control_header(FrameType.KEPT), b"")
            self._establish(link, path)
        elif frame_type == FrameType.KEPT and link.is_chooser and link.path == path:
            self._establish(link, path)

    def _establish(self, link: Link, path: Path) -> None:
        link.path, link.is_established, link.is_connecting, link.lost = path, True, False, None
        self._close_candidates(link, keep=path.port if isinstance(path, DirectPath) else None)
        logger.info("link established peer=%s path=%s", link.peer_id, path.name)
        self.on_established(link)
