"""Payloads that arrived before anyone asked for them."""

from __future__ import annotations

from collections.abc import Callable

from skynet.errors import MalformedMessage
from skynet.protocol.data_frame import epoch_of, step_of
from skynet.protocol.ids import PeerId
from skynet.protocol.plan import Epoch


class Inbox:
    """By peer and header, bounded per peer. One thread's."""

    def __init__(self, max_bytes_per_peer: int, max_frames_per_peer: int) -> None:
        self._max_bytes = max_bytes_per_peer
        self._max_frames = max_frames_per_peer
        self._payloads: dict[PeerId, dict[bytes, memoryview]] = {}
        self._num_bytes: dict[PeerId, int] = {}

    def put(self, peer_id: PeerId, header: bytes, payload: memoryview) -> None:
        """Keep it. The same header again is dropped. Raises MalformedMessage if the peer fills its share."""
        payloads = self._payloads.setdefault(peer_id, {})
        if header in payloads:
            return
        held = self._num_bytes.get(peer_id, 0) + payload.nbytes
        if held > self._max_bytes or len(payloads) >= self._max_frames:
            raise MalformedMessage(
                f"peer {peer_id}: {len(payloads) + 1} frames of {held} bytes in all wait unread, "
                f"at most {self._max_frames} of {self._max_bytes} bytes are allowed"
            )
        payloads[header] = payload
        self._num_bytes[peer_id] = held

    def pop(self, peer_id: PeerId, header: bytes) -> memoryview | None:
        """Take it out, None if it hasn't come."""
        payloads = self._payloads.get(peer_id)
        if not payloads:
            return None
        payload = payloads.pop(header, None)
        if payload is not None:
            self._num_bytes[peer_id] -= payload.nbytes
        return payload

    def drop_peer(self, peer_id: PeerId) -> None:
        """Forget what this peer sent."""
        self._payloads.pop(peer_id, None)
        self._num_bytes.pop(peer_id, None)

    def drop_steps(self, epoch: Epoch, before: int) -> None:
        """Forget this epoch's steps before that one: nobody will ask for them any more."""
        self._drop(lambda header: epoch_of(header) == epoch and step_of(header) < before)

    def drop_epoch(self, epoch: Epoch) -> None:
        """Forget everything of this epoch."""
        self._drop(lambda header: epoch_of(header) == epoch)

    def _drop(self, is_stale: Callable[[bytes], bool]) -> None:
        for peer_id, payloads in self._payloads.items():
            for header in [h for h in payloads if is_stale(h)]:
                self._num_bytes[peer_id] -= payloads.pop(header).nbytes

    @property
    def num_bytes(self) -> int:
        """Payload bytes held, of all peers."""
        return sum(self._num_bytes.values())
