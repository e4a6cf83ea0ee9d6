"""A tensor-parallel group inside one process: each rank is a thread, nothing travels but references."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from torch import Tensor

from skynet.errors import WorkerLost, WorkerTimeout

T = TypeVar("T")


class _Meeting:
    """Where the ranks of one group put down what they bring and pick up what the others brought."""

    def __init__(self, size: int, timeout_s: float) -> None:
        self.size = size
        self._timeout_s = timeout_s
        self._barrier = threading.Barrier(size)
        self._slots: list[Tensor | None] = [None] * size

    def exchange(self, rank: int, x: Tensor | None) -> list[Tensor | None]:
        self._slots[rank] = x
        self._wait(rank)
        brought = list(self._slots)
        self._wait(rank)  # nobody brings the next tensor before all have this one
        return brought

    def abort(self) -> None:
        self._barrier.abort()

    def _wait(self, rank: int) -> None:
        try:
            self._barrier.wait(self._timeout_s)
        except threading.BrokenBarrierError as exc:
            raise WorkerTimeout(
                f"rank {rank} of {self.size}: the others didn't come within {self._timeout_s} s"
            ) from exc


class LoopbackGroup:
    """One rank's end of a meeting of threads. Make all ends with `LoopbackGroup.create`."""

    def __init__(self, meeting: _Meeting, rank: int) -> None:
        self._meeting = meeting
        self.rank = rank
        self.size = meeting.size
        self.num_exchanges = 0  # calls so far; tests read it

    @staticmethod
    def create(size: int, timeout_s: float = 60.0) -> list[LoopbackGroup]:
        """The ends of one group, in rank order."""
        meeting = _Meeting(size, timeout_s)
        return [LoopbackGroup(meeting, rank) for rank in range(size)]

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum in rank order, computed by every rank for itself."""
        parts = self._exchange(x)
        total = _present(parts[0]).clone()
        for part in parts[1:]:
            total += _present(part)
        self._meeting.exchange(self.rank, None)  # nobody changes its `x` before all have read it
        return total

    def gather(self, x: Tensor, root: int = 0) -> list[Tensor] | None:
        """Copies of every rank's `x` at the root."""
        parts = self._exchange(x)
        gathered = [_present(part).clone() for part in parts] if self.rank == root else None
        self._meeting.exchange(self.rank, None)
        return gathered

    def broadcast(self, x: Tensor | None, root: int = 0, *, like: Tensor) -> Tensor:
        """A copy of the root's `x`."""
        sent = _present(self._exchange(x if self.rank == root else None)[root])
        if sent.shape != like.shape or sent.dtype != like.dtype:
            raise ValueError(
                f"rank {root} sent {sent.dtype}{list(sent.shape)}, {like.dtype}{list(like.shape)} expected"
            )
        copy = sent.clone()
        self._meeting.exchange(self.rank, None)
        return copy

    def abort(self) -> None:
        """Ends every rank's wait with an error."""
        self._meeting.abort()

    def _exchange(self, x: Tensor | None) -> list[Tensor | None]:
        self.num_exchanges += 1
        return self._meeting.exchange(self.rank, x)


def run_ranks(groups: Sequence[LoopbackGroup], work: Callable[[LoopbackGroup], T]) -> list[T]:
    """`work` for every rank in a thread of its own; results in rank order. The first error ends all of them."""

    def guarded(group: LoopbackGroup) -> T:
        try:
            return work(group)
        except BaseException:
            group.abort()
            raise

    with ThreadPoolExecutor(len(groups), thread_name_prefix="rank") as pool:
        futures = [pool.submit(guarded, group) for group in groups]
    errors = [error for future in futures if (error := future.exception()) is not None]
    if errors:  # a rank that waited in vain is less telling than the one it waited for
        raise next((error for error in errors if not isinstance(error, (WorkerTimeout, WorkerLost))), errors[0])
    return [future.result() for future in futures]


def _present(x: Tensor | None) -> Tensor:
    if x is None:
        raise ValueError("a rank brought no tensor to an exchange that needs one from everybody")
    return x
