"""Whose keys may open which sockets: the one table behind every CURVE handshake and every received frame."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass

from zmq.utils import z85

from skynet.protocol.ids import PeerId

logger = logging.getLogger(__name__)
CURVE_KEY_CHARS = 40  # Z85, as messages carry it


@dataclass(frozen=True, slots=True)
class AdmittedPeer:
    """One process that may connect: its CURVE public key (Z85) and the ZAP domains open to it."""

    peer_id: PeerId
    curve_key: bytes
    domains: frozenset[str]


def raw_curve_key(key: bytes) -> bytes:
    """The 32 bytes of a Z85 key. Raises ValueError if it isn't one."""
    if len(key) != CURVE_KEY_CHARS:
        raise ValueError(f"a CURVE key has {CURVE_KEY_CHARS} Z85 characters, got {len(key)}")
    try:
        raw: bytes = z85.decode(key)
    except Exception as exc:  # z85 raises whatever its table lookups raise
        raise ValueError("a CURVE key that isn't Z85") from exc
    return raw


class PeerRegistry:
    """Thread-safe. Empty at first: nobody gets in before `allow`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_raw_key: dict[bytes, AdmittedPeer] = {}
        self._by_key: dict[str, AdmittedPeer] = {}  # the same by the key's Z85 text
        self._by_id: dict[PeerId, AdmittedPeer] = {}
        self._suspended: dict[PeerId, float] = {}  # until when, on the monotonic clock
        self._on_removed: list[Callable[[PeerId, str | None], None]] = []

    def on_removed(self, callback: Callable[[PeerId, str | None], None]) -> None:
        """Call this, in the thread that removes, when a peer's key (Z85; None: any it had) stops being welcome."""
        self._on_removed.append(callback)

    def allow(self, curve_public_key: bytes, peer_id: PeerId, domains: Collection[str]) -> None:
        """Let this key in as `peer_id`. A former key of the same peer loses its entry and its connections."""
        raw = raw_curve_key(curve_public_key)
        peer = AdmittedPeer(peer_id, curve_public_key, frozenset(domains))
        with self._lock:
            holder = self._by_raw_key.get(raw)
            if holder is not None and holder.peer_id != peer_id:
                raise ValueError(
                    f"peer {peer_id}: its CURVE key already belongs to {holder.peer_id}; one key, one peer"
                )
            former = self._by_id.get(peer_id)
            if former is not None:
                self._drop_key(former)
            self._by_raw_key[raw] = self._by_id[peer_id] = self._by_key[curve_public_key.decode()] = peer
        if former is not None and former.curve_key != curve_public_key:
            self._removed(peer_id, former)

    def deny(self, peer_id: PeerId) -> None:
        """Withdraw the peer's key and cut its live connections. Unknown peers are fine."""
        self._removed(peer_id, self._forget(peer_id))

    def forget(self, peer_id: PeerId) -> None:
        """Withdraw the key of a peer that has no connection any more: nobody is cut. Unknown peers are fine."""
        self._forget(peer_id)

    def _forget(self, peer_id: PeerId) -> AdmittedPeer | None:
        with self._lock:
            self._suspended.pop(peer_id, None)
            former = self._by_id.pop(peer_id, None)
            if former is not None:
                self._drop_key(former)
            return former

    def _drop_key(self, peer: AdmittedPeer) -> None:
        del self._by_raw_key[raw_curve_key(peer.curve_key)], self._by_key[peer.curve_key.decode()]

    def suspend(self, peer_id: PeerId, until: float) -> None:
        """Refuse this peer's handshakes until that moment of the monotonic clock: it flooded us."""
        with self._lock:
            if peer_id in self._by_id:
                self._suspended[peer_id] = until

    def admit(self, raw_key: bytes, domain: str, now: float) -> AdmittedPeer | None:
        """Whose key this is if it may open sockets of `domain` now, else None."""
        with self._lock:
            peer = self._by_raw_key.get(raw_key)
            if peer is None or domain not in peer.domains:
                return None
            if self._suspended.get(peer.peer_id, now) > now:
                return None
            self._suspended.pop(peer.peer_id, None)
            return peer

    def holder(self, key: str) -> AdmittedPeer | None:
        """Whose key (Z85) this is; None if it is nobody's any more. On every frame's path: one lookup, no lock."""
        return self._by_key.get(key)

    def is_allowed(self, peer_id: PeerId, domain: str) -> bool:
        """Whether this peer counts in that domain."""
        peer = self._by_id.get(peer_id)
        return peer is not None and domain in peer.domains

    def key_of(self, peer_id: PeerId) -> bytes | None:
        """The peer's CURVE public key (Z85), None if it isn't admitted."""
        peer = self._by_id.get(peer_id)
        return None if peer is None else peer.curve_key

    def _removed(self, peer_id: PeerId, former: AdmittedPeer | None) -> None:
        logger.info("peer cut off peer=%s", peer_id)
        for callback in self._on_removed:
            callback(peer_id, None if former is None else former.curve_key.decode())
