"""Long prompts become tokens beside the event loop: one of each node at a time, so nobody's keep others waiting."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from skynet.errors import RequestFailed, SkyNetError
from skynet.protocol.ids import PeerId, RequestId
from skynet.protocol.messages import Submit

logger = logging.getLogger(__name__)
T = TypeVar("T")
MAX_INLINE: Final = 4096  # characters (and token ids that a client brings) that take a millisecond or two: read at once
NUM_THREADS: Final = 2  # their own: planning and admission must not wait for prompts
Key = tuple[str, RequestId]  # node, and its name for the request


@dataclass(slots=True)
class Reading:
    """A request whose prompt is being read, or waits for that."""

    submit: Submit
    client: PeerId
    orphaned_at: float | None = None  # since when its client is gone


def is_long(submit: Submit) -> bool:
    """Whether reading this would keep an event loop."""
    return len(submit.prompt or "") + sum(len(m.content) for m in submit.messages) + len(submit.received) > MAX_INLINE


class PromptReader(Generic[T]):
    """Calls `read` in a thread and then, on the event loop, `done` or `failed`. In order for each node."""

    def __init__(
        self,
        read: Callable[[Submit], T],
        done: Callable[[Reading, T], None],
        failed: Callable[[Reading, Exception], None],
    ) -> None:
        self.waiting: dict[Key, Reading] = {}
        self._read, self._done, self._failed = read, done, failed
        self._tasks: dict[str, asyncio.Task[None]] = {}  # by node
        self._threads: ThreadPoolExecutor | None = None

    def num_of(self, node: str) -> int:
        """How many of this node's prompts wait or are being read."""
        return sum(owner == node for owner, _ in self.waiting)

    def add(self, key: Key, reading: Reading) -> None:
        """Have it read; whoever adds bounds how many."""
        self.waiting[key] = reading
        if key[0] not in self._tasks:
            self._tasks[key[0]] = asyncio.create_task(self._read_all_of(key[0]), name=f"read-{key[0]}")

    def drop(self, key: Key) -> Reading | None:
        """Nobody wants it any more; None if it isn't here."""
        return self.waiting.pop(key, None)

    async def stop(self) -> None:
        """End reading. What a thread is at, it finishes."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)
            self._threads = None

    async def _read_all_of(self, node: str) -> None:
        try:
            while (key := next((k for k in self.waiting if k[0] == node), None)) is not None:
                await self._read_one(key, self.waiting[key])
        finally:
            del self._tasks[node]

    async def _read_one(self, key: Key, reading: Reading) -> None:
        self._threads = self._threads or ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="prompts")
        try:
            found = await asyncio.get_running_loop().run_in_executor(self._threads, self._read, reading.submit)
            if self.waiting.get(key) is reading:
                del self.waiting[key]
                self._done(reading, found)
        except (SkyNetError, ValueError) as exc:
            self._give_up(key, reading, exc)
        except Exception as exc:  # a bug of ours: it ends this request and no other
            logger.exception("prompt not read request=%s", reading.submit.request_id)
            self._give_up(key, reading, RequestFailed(f"the coordinator couldn't read this prompt: {exc!r}"))

    def _give_up(self, key: Key, reading: Reading, exc: Exception) -> None:
        if self.waiting.get(key, reading) is reading:
            self.waiting.pop(key, None)
            self._failed(reading, exc)
