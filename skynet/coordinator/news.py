"""Questions about the swarm, answered together: at once where nobody asked lately, else at the next look.

So whoever asks again and again as fast as answers come is slowed down and not cut off, and however many ask, an answer
is made twenty times a second at most.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from skynet.protocol.ids import PeerId, RequestId

logger = logging.getLogger(__name__)

WAIT_S = 5.0  # without news the old status is the answer
PAUSE_S = 0.05  # between two looks
MAX_WAITERS = 256  # more are answered at once, out of the asker's allowance,
MAX_WAITERS_PER_CLIENT = 16  # and so are more of one client's


@dataclass(slots=True)
class _Waiter:
    client: PeerId
    request_id: RequestId
    answer: Callable[[], str]
    newer_than: int
    until: float


class StatusNews:
    """Counts revisions of the status: whatever it shows changed. `tell` sends an answer."""

    def __init__(self, tell: Callable[[PeerId, RequestId, str], object]) -> None:
        self.revision = 0
        self._tell = tell
        self._woken = asyncio.Event()
        self._waiters: list[_Waiter] = []

    def changed(self) -> None:
        """Something that the status shows is different now."""
        self.revision += 1
        self._woken.set()

    def ask(
        self, client: PeerId, request_id: RequestId, answer: Callable[[], str], now: float, newer_than: int = -1
    ) -> None:
        """Tell what `answer` makes: soon if the client doesn't know this revision yet, else when there is news."""
        num_own = sum(waiter.client == client for waiter in self._waiters)
        if num_own >= MAX_WAITERS_PER_CLIENT or len(self._waiters) >= MAX_WAITERS:
            self._tell(client, request_id, answer())
        else:
            self._waiters.append(_Waiter(client, request_id, answer, newer_than, now + WAIT_S))
            self._woken.set()

    def forget(self, client: PeerId) -> None:
        """It is gone."""
        self._waiters = [w for w in self._waiters if w.client != client]

    async def run(self) -> None:
        """Answer those who wait; until cancelled."""
        while True:
            try:
                async with asyncio.timeout(0.5):
                    await self._woken.wait()
            except TimeoutError:
                pass
            self._woken.clear()
            try:
                self._answer(time.monotonic())
            except Exception:  # a bug of ours that the status shows: everything else goes on
                logger.exception("status not told")
            await asyncio.sleep(PAUSE_S)

    def _answer(self, now: float) -> None:
        """All who are due and asked the same get the same."""
        due: list[_Waiter] = []
        waiting, self._waiters = self._waiters, []
        for waiter in waiting:
            is_due = waiter.newer_than < self.revision or waiter.until < now
            (due if is_due else self._waiters).append(waiter)
        texts = {answer: answer() for answer in {waiter.answer for waiter in due}}
        for waiter in due:
            self._tell(waiter.client, waiter.request_id, texts[waiter.answer])
