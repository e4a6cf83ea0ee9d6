"""Whose keys open a worker's sockets: those of the peers that its present plan names, and nobody else's.

A key that stayed allowed after its node was revoked would still open the doors to hidden states and chunks.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable
from typing import Final

from skynet.protocol.entrance import COORDINATOR
from skynet.protocol.ids import PeerId
from skynet.protocol.messages import PeerInfo, Prepare
from skynet.protocol.sockets import SocketFactory

logger = logging.getLogger(__name__)
PROBE_S: Final = 30.0  # peers that a link is measured with may come in for this long
FETCH_S: Final = 3600.0  # and those that load what we may hold; who is in by then stays until the end of its fetching


class Welcomed:
    """See the module. Lives on the agent's loop; the coordinator's own entry isn't its business."""

    def __init__(self, factory: SocketFactory) -> None:
        self._factory = factory
        self._until: dict[PeerId, float] = {}  # who is let in; infinite for peers of a plan

    def only(self, orders: Iterable[Prepare], now: float) -> None:
        """Let in whom these orders name, as peers or as sources; all others but those in for a while are shut out."""
        named: dict[PeerId, PeerInfo] = {}
        for order in orders:  # a later order knows newer keys
            named |= {peer.peer_id: peer for peer in (*order.sources, *order.peers)}
        kept = {peer_id for peer_id, until in self._until.items() if now < until < float("inf")}
        self.shut_out([peer_id for peer_id in self._until if peer_id not in named and peer_id not in kept])
        for peer in named.values():
            self._allow(peer, float("inf"))

    def to_measure(self, peers: Iterable[PeerInfo], now: float) -> None:
        """Let these in for a while, to measure a link."""
        for peer in peers:
            self._allow(peer, max(now + PROBE_S, self._until.get(peer.peer_id, 0.0)))

    def to_fetch(self, peers: Iterable[PeerInfo], now: float) -> None:
        """Let these in for a while, to fetch chunks and nothing else."""
        for peer in peers:
            domains = {"bulk"} | ({"data"} if self._factory.registry.is_allowed(peer.peer_id, "data") else set())
            self._allow(peer, max(now + FETCH_S, self._until.get(peer.peer_id, 0.0)), domains)

    def shut_out(self, peer_ids: Iterable[PeerId]) -> None:
        """Cut their connections, and let them in no more."""
        for peer_id in peer_ids:
            if self._until.pop(peer_id, None) is not None:
                logger.debug("peer shut out peer=%s", peer_id)
                self._factory.deny(peer_id)

    def nobody(self) -> None:
        """Whoever an earlier coordinator named."""
        self.shut_out(list(self._until))

    def _allow(self, peer: PeerInfo, until: float, domains: Collection[str] = ("data", "bulk")) -> None:
        if peer.peer_id == COORDINATOR:
            self._factory.allow(peer.curve_key, peer.peer_id, {"bulk"})
            return
        self._factory.allow(peer.curve_key, peer.peer_id, domains)
        self._until[peer.peer_id] = until
