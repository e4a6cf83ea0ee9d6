"""Who asked for a newer status than there is, and gets it when there is news."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from skynet.protocol.ids import PeerId
from skynet.protocol.messages import GetStatus

WAIT_S = 5.0  # without news the old status is the answer
MAX_WAITERS = 256  # more are answered at once


@dataclass(slots=True)
class _Waiter:
    client: PeerId
    question: GetStatus
    until: float


class StatusNews:
    """Counts revisions of the status: whatever it shows changed. `tell` answers a question with the present one."""

    def __init__(self, tell: Callable[[PeerId, GetStatus], None]) -> None:
        self.revision = 0
        self._tell = tell
        self._changed = asyncio.Event()
        self._waiters: list[_Waiter] = []

    def changed(self) -> None:
        """Something that the status shows is different now."""
        self.revision += 1
        self._changed.set()

    def ask(self, client: PeerId, question: GetStatus, now: float) -> None:
        """Answer at once if this one doesn't know it yet, else when there is news."""
        if question.newer_than < self.revision or len(self._waiters) >= MAX_WAITERS:
            self._tell(client, question)
        else:
            self._waiters.append(_Waiter(client, question, now + WAIT_S))

    def forget(self, client: PeerId) -> None:
        """It is gone."""
        self._waiters = [w for w in self._waiters if w.client != client]

    async def run(self) -> None:
        """Answer those who wait for news, at most twenty times a second; until cancelled."""
        while True:
            try:
                async with asyncio.timeout(0.5):
                    await self._changed.wait()
            except TimeoutError:
                pass
            self._changed.clear()
            waiting, self._waiters = self._waiters, []
            for waiter in waiting:
                if waiter.question.newer_than < self.revision or waiter.until < time.monotonic():
                    self._tell(waiter.client, waiter.question)
                else:
                    self._waiters.append(waiter)
            await asyncio.sleep(0.05)
