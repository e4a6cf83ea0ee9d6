"""Layouts next to a layout, which local search tries, and all there are."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from skynet.coordinator.planner.predict import Arrangement
from skynet.coordinator.planner.swarm import Swarm

_SPLIT_UP_TO = 5  # ranks of a group that is divided in every way


def ordered_partitions(workers: tuple[int, ...], max_size: int) -> Iterator[Arrangement]:
    """Every way to put all workers into groups in a row; ranks keep the given order."""
    if not workers:
        yield ()
    for size in range(1, min(len(workers), max_size) + 1):
        for first in itertools.combinations(workers, size):
            rest = tuple(w for w in workers if w not in first)
            for tail in ordered_partitions(rest, max_size):
                yield (first, *tail)


def without_one(arrangement: Arrangement) -> Iterator[Arrangement]:
    """Drop each worker in turn."""
    for i, members in enumerate(arrangement):
        for worker in members:
            left = tuple(m for m in members if m != worker)
            smaller = (*arrangement[:i], *((left,) if left else ()), *arrangement[i + 1 :])
            if smaller:
                yield smaller


def neighbours(swarm: Swarm, arrangement: Arrangement, unused: Sequence[int]) -> Iterator[Arrangement]:
    """Layouts one move away: merge, split or exchange stages; move, exchange, drop or add a worker."""
    limit = swarm.config.max_group_size
    stages = list(arrangement)
    for i, (a, b) in enumerate(itertools.pairwise(stages)):
        if len(a) + len(b) <= limit:
            yield (*stages[:i], swarm.canonical(a + b), *stages[i + 2 :])
    for i, members in enumerate(stages):
        if len(members) <= _SPLIT_UP_TO:
            for a, b in _halves(members):
                yield (*stages[:i], a, b, *stages[i + 1 :])
                yield (*stages[:i], b, a, *stages[i + 1 :])
    yield from _reordered(arrangement)
    for worker in unused:
        yield from _inserted(swarm, arrangement, worker, limit)
    yield from without_one(arrangement)
    yield from replaced(swarm, arrangement, unused)
    for i, members in enumerate(stages):
        for worker in members:
            left = tuple(m for m in members if m != worker)
            rest = (*stages[:i], *((left,) if left else ()), *stages[i + 1 :])
            yield from _inserted(swarm, rest, worker, limit)


def _halves(members: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Every division of a group in two."""
    first, rest = members[:1], members[1:]
    for count in range(len(rest)):
        for with_first in itertools.combinations(rest, count):
            yield first + with_first, tuple(m for m in rest if m not in with_first)


def replaced(swarm: Swarm, arrangement: Arrangement, unused: Sequence[int]) -> Iterator[Arrangement]:
    """Layouts of the same shape: two workers of different groups exchanged, or one for an unused one."""
    stages = list(arrangement)
    places = [(i, worker) for i, members in enumerate(stages) for worker in members]
    for (i, a), (j, b) in itertools.combinations(places, 2):
        if i != j and (len(stages[i]) > 1 or len(stages[j]) > 1):
            changed = list(stages)
            changed[i] = swarm.canonical([b if m == a else m for m in stages[i]])
            changed[j] = swarm.canonical([a if m == b else m for m in stages[j]])
            yield tuple(changed)
    for i, a in places:
        for b in unused:
            members = swarm.canonical([b if m == a else m for m in stages[i]])
            yield (*stages[:i], members, *stages[i + 1 :])
    yield from _reordered(arrangement)


def _reordered(arrangement: Arrangement) -> Iterator[Arrangement]:
    """Two stages exchanged."""
    for i, j in itertools.combinations(range(len(arrangement)), 2):
        stages = list(arrangement)
        stages[i], stages[j] = stages[j], stages[i]
        yield tuple(stages)


def _inserted(swarm: Swarm, arrangement: Arrangement, worker: int, limit: int) -> Iterator[Arrangement]:
    for i, members in enumerate(arrangement):
        if len(members) < limit:
            yield (*arrangement[:i], swarm.canonical((*members, worker)), *arrangement[i + 1 :])
    for i in range(len(arrangement) + 1):
        yield (*arrangement[:i], (worker,), *arrangement[i:])
