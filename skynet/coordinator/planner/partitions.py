"""Every way to put few workers into groups, the most promising first.

What a partition would cost is estimated in microseconds: layers go to the fastest groups as far as these have room, and
hand-overs follow the nearest next group. Only the best by this estimate are worked out in full.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from skynet.coordinator.planner.config import Objective
from skynet.coordinator.planner.groups import Group
from skynet.coordinator.planner.predict import Arrangement
from skynet.coordinator.planner.swarm import Swarm

MAX_PARTITIONED: Final = 7  # workers: 4,139 partitions of their subsets, some 60 ms
_MAX_PERMUTED = 4  # groups of which every order is looked at
_ORDERS = 3
_STAGE, _RANK = 1e3, 10.0  # for the memory objective, in which seconds decide between equals only
_SHORTAGE = 1e6  # what a layer without room adds to an estimate
_ROUGHLY = 0.5  # layers: rooms aren't known better than this

_Hops = dict[tuple[Group, Group], float]


class Partition(NamedTuple):
    """Groups without an order yet."""

    estimate: float  # of what the objective minimises
    groups: tuple[Group, ...]

    @property
    def members(self) -> Arrangement:
        return tuple(group.members for group in self.groups)


class Partitions:
    """All partitions of all subsets of some workers, best estimates first."""

    def __init__(self, swarm: Swarm, workers: Sequence[int]) -> None:
        self._hops: _Hops = {}
        found = []
        for members in _partitions(swarm.canonical(workers), swarm.config.max_group_size):
            groups = tuple(swarm.group(m) for m in members)
            if all(group.is_joined for group in groups):
                estimate = self._estimate(swarm, groups)
                if estimate is not None:
                    found.append(Partition(estimate, groups))
        self.ranked = sorted(found, key=lambda p: (p.estimate, p.members))

    def orders(self, partition: Partition) -> Iterator[Arrangement]:
        """The shortest ways through its groups; the ends differ, since embedding and head need room there."""
        groups = partition.groups
        if len(groups) <= _MAX_PERMUTED:
            ways = list(itertools.permutations(groups))
        else:
            ways = [self._nearest_next(groups, first)[0] for first in groups]
        ranked = sorted(ways, key=lambda way: (self._length(way) + way[-1].head_s, [g.members for g in way]))
        ends: set[tuple[Group, Group]] = set()
        for way in ranked:
            if (way[0], way[-1]) not in ends and len(ends) < _ORDERS:
                ends.add((way[0], way[-1]))
                yield tuple(group.members for group in way)

    def _estimate(self, swarm: Swarm, groups: tuple[Group, ...]) -> float | None:
        """None: some group would have nothing to do."""
        left, total = float(swarm.spec.num_layers), min(group.head_s for group in groups)
        for group in sorted(groups, key=lambda g: g.pace_s):
            if left <= 0:
                return None
            count = min(group.share_of_room, left)
            total, left = total + count * group.pace_s, left - count
        if left > 0:
            total += left * max(group.pace_s for group in groups)
        if swarm.config.objective is Objective.MEMORY:  # what every stage and every rank holds again counts, then time
            num_ranks = sum(len(group.members) for group in groups)
            total += _STAGE * len(groups) + _RANK * num_ranks
        first = max(groups, key=lambda g: (-g.pace_s, g.members))
        hops = self._nearest_next(groups, first)[1] if len(groups) > 1 else 0.0
        return total + hops + (_SHORTAGE * left if left > _ROUGHLY else 0.0)

    def _hop(self, previous: Group, following: Group) -> float:
        key = (previous, following)
        found = self._hops.get(key)
        if found is None:
            found = self._hops[key] = following.hop_cost(previous)
        return found

    def _length(self, way: Sequence[Group]) -> float:
        return sum(self._hop(a, b) for a, b in itertools.pairwise(way))

    def _nearest_next(self, groups: Sequence[Group], first: Group) -> tuple[tuple[Group, ...], float]:
        way, left, length = [first], [g for g in groups if g is not first], 0.0
        while left:
            near = min(left, key=lambda g: self._hop(way[-1], g))
            length += self._hop(way[-1], near)
            left.remove(near)
            way.append(near)
        return tuple(way), length


def _partitions(workers: tuple[int, ...], max_size: int) -> Iterator[Arrangement]:
    """Every set of disjoint groups, in the order of their first members."""
    if not workers:
        return
    first, rest = workers[0], workers[1:]
    yield ((first,),)
    for tail in _partitions(rest, max_size):
        yield tail  # without the first
        yield ((first,), *tail)
        for i, group in enumerate(tail):
            if len(group) < max_size:
                yield ((first, *group), *tail[:i], *tail[i + 1 :])
