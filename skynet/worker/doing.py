"""What the compute thread is at: which step, since when without progress, and whom it waits for.

Written by the compute thread, read by the agent's: one reference that is replaced as a whole.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor

from skynet.protocol.ids import PeerId
from skynet.protocol.messages import Busy
from skynet.protocol.plan import Epoch
from skynet.worker.collectives import Collective


class _Moment(NamedTuple):
    epoch: Epoch
    step: int
    since: float
    waits_for: tuple[PeerId, ...]


class Doing:
    """See the module. Between steps there is nothing."""

    def __init__(self) -> None:
        self._now: _Moment | None = None

    def begin(self, epoch: Epoch, step: int) -> None:
        self._now = _Moment(epoch, step, time.monotonic(), ())

    def end(self) -> None:
        self._now = None

    @contextmanager
    def waiting(self, peers: Sequence[PeerId]) -> Iterator[None]:
        """Progress of this step depends on others meanwhile."""
        if self._now is not None:
            self._now = self._now._replace(since=time.monotonic(), waits_for=tuple(peers))
        try:
            yield
        finally:
            if self._now is not None:
                self._now = self._now._replace(since=time.monotonic(), waits_for=())

    def told(self) -> Busy | None:
        """For the coordinator; from any thread."""
        now = self._now
        if now is None:
            return None
        since_s = max(0.0, time.monotonic() - now.since)
        return Busy(epoch=now.epoch, step=now.step, since_s=since_s, waits_for=now.waits_for)


class WatchedGroup:
    """A group whose exchanges are told of."""

    def __init__(self, group: Collective, others: Sequence[PeerId], doing: Doing) -> None:
        self._group = group
        self._others = tuple(others)
        self._doing = doing
        self.rank = group.rank
        self.size = group.size

    def all_reduce(self, x: Tensor) -> Tensor:
        with self._doing.waiting(self._others):
            return self._group.all_reduce(x)

    def gather(self, x: Tensor, root: int = 0) -> list[Tensor] | None:
        with self._doing.waiting(self._others):
            return self._group.gather(x, root)

    def broadcast(self, x: Tensor | None, root: int = 0, *, like: Tensor) -> Tensor:
        with self._doing.waiting(self._others):
            return self._group.broadcast(x, root, like=like)
