"""What a server asks of its peers for handling their messages: processor time, of which each has an allowance."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Final

from skynet.protocol.allowance import Allowance
from skynet.protocol.ids import PeerId

logger = logging.getLogger(__name__)
FORGET_S: Final = 10.0  # how often peers that have been quiet are forgotten


class Toll:
    """`on_flood` is told of a peer that takes more of the present thread's time than its part: keep it out a while."""

    def __init__(self, on_flood: Callable[[PeerId], None], allowance: Allowance | None = None) -> None:
        self._on_flood = on_flood
        self._allowance = allowance or Allowance()
        self._next_forget = 0.0

    def charge(self, peer_id: PeerId, handle: Callable[[], None]) -> None:
        """Handle a message at its sender's expense, or drop it if that one has had more than its part."""
        now = time.monotonic()
        if now >= self._next_forget:
            self._next_forget = now + FORGET_S
            self._allowance.forget(now)
        if self._allowance.is_overdrawn(peer_id, now):
            return  # what was queued when it was cut off
        began_s = time.thread_time()  # not the clock: what others do on this machine isn't the peer's doing
        handle()
        if self._allowance.charge(peer_id, time.thread_time() - began_s, now):
            logger.warning("flooded by peer=%s, cut off for a while", peer_id)
            self._on_flood(peer_id)
