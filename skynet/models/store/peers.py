"""Chunks from other nodes, by hash: several nodes at once, resumed elsewhere after a break, liars noted."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Final

from skynet.errors import StepAborted, TransferFailed
from skynet.models.manifest import ChunkRef
from skynet.models.store.links import PeerLink, chunk_name
from skynet.models.store.sources import SourceKind, matches
from skynet.protocol.ids import PeerId

logger = logging.getLogger(__name__)

_ROUND_S: Final = 0.5  # between two rounds through the nodes


@dataclass(slots=True)
class _Attempt:
    """One chunk on its way: what came so far, and who sent it."""

    data: bytearray = field(default_factory=bytearray)
    senders: list[PeerId] = field(default_factory=list)
    excluded: set[PeerId] = field(default_factory=set)  # for this round
    hopeless: set[PeerId] = field(default_factory=set)  # for this chunk
    is_alone: bool = False  # after a mismatch of several senders' bytes, one must send all

    def restart(self) -> None:
        self.data.clear()
        self.senders.clear()


class PeerChunks:
    """A ChunkSource made of the swarm's other nodes. `links` says at each request who may be asked.

    A node whose chunk doesn't match its hash is told to `on_bad_sender` and not asked again.
    """

    kind: SourceKind = "swarm"

    def __init__(
        self,
        links: Callable[[], Sequence[PeerLink]],
        on_bad_sender: Callable[[PeerId, ChunkRef], None] | None = None,
        *,
        patience_s: float = 10.0,
    ) -> None:
        self._links = links
        self._on_bad_sender = on_bad_sender
        self._patience_s = patience_s  # how long a chunk that nobody has, or nobody sends, is asked for
        self._lock = threading.Lock()
        self._in_flight: Counter[PeerId] = Counter()
        self._bad: set[PeerId] = set()

    def fetch(self, chunk: ChunkRef, cancel: threading.Event) -> bytes | None:
        """See ChunkSource."""
        attempt, deadline = _Attempt(), time.monotonic() + self._patience_s
        while not cancel.is_set():
            link = self._choose(attempt.excluded | attempt.hopeless)
            if link is None:
                if time.monotonic() > deadline:
                    logger.warning("chunk not found at any node file=%s chunk=%d", chunk.file, chunk.index)
                    return None
                attempt.excluded.clear()
                cancel.wait(_ROUND_S)
                continue
            had = len(attempt.data)
            try:
                self._ask(link, chunk, attempt, cancel)
            finally:
                with self._lock:
                    self._in_flight[link.peer_id] -= 1
            if len(attempt.data) > had:
                deadline = time.monotonic() + self._patience_s
            if len(attempt.data) == chunk.num_bytes and self._judge(chunk, attempt):
                return bytes(attempt.data)
        raise StepAborted(f"{chunk.file}: loading was cancelled")

    def _choose(self, excluded: Collection[PeerId]) -> PeerLink | None:
        """The node with the fewest chunks under way: fast ones finish sooner, so they get more."""
        with self._lock:
            links = [k for k in self._links() if k.peer_id not in excluded and k.peer_id not in self._bad]
            if not links:
                return None
            chosen = min(links, key=lambda k: (self._in_flight[k.peer_id], random.random()))
            self._in_flight[chosen.peer_id] += 1
            return chosen

    def _ask(self, link: PeerLink, chunk: ChunkRef, attempt: _Attempt, cancel: threading.Event) -> None:
        if attempt.is_alone:
            attempt.restart()
        had = len(attempt.data)
        try:
            link.fetch(chunk_name(chunk.digest), had, chunk.num_bytes - had, attempt.data, chunk.num_bytes, cancel)
            if len(attempt.data) < chunk.num_bytes:
                raise TransferFailed(f"{link.peer_id}: its chunk ends at byte {len(attempt.data)}", "unreadable")
        except TransferFailed as exc:
            logger.debug("chunk not fetched peer=%s chunk=%s code=%s reason=%s", link.peer_id, chunk, exc.code, exc)
            can_come = exc.code in ("busy", "broken", "timeout", "not_found")
            (attempt.excluded if can_come else attempt.hopeless).add(link.peer_id)
        if len(attempt.data) > had:
            attempt.senders.append(link.peer_id)

    def _judge(self, chunk: ChunkRef, attempt: _Attempt) -> bool:
        if matches(chunk, attempt.data):
            return True
        senders = set(attempt.senders)
        logger.warning(
            "chunk doesn't match its hash file=%s chunk=%d senders=%s", chunk.file, chunk.index, ",".join(senders)
        )
        if len(senders) == 1:
            self._bad |= senders
            if self._on_bad_sender is not None:
                self._on_bad_sender(senders.pop(), chunk)
        attempt.is_alone = True
        attempt.restart()
        return False
