"""Who is near whom: sites of machines that may share stages, and ways to cut them into groups."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

from skynet.coordinator.planner.allot import INFINITY
from skynet.coordinator.planner.swarm import Swarm

_SIZES = (1, 2, 3, 4, 6, 8)
_WINDOW = 12  # a group's other ranks are chosen among this many of about the same speed


def rows(swarm: Swarm, workers: Sequence[int]) -> list[list[int]]:
    """All workers in a row, sites by size; and, where it differs, one in which sites with links follow each other."""
    by_size = sites(swarm, workers)
    region_of = {worker: i for i, region in enumerate(sites(swarm, workers, INFINITY)) for worker in region}
    by_region = sorted(by_size, key=lambda site: region_of[site[0]])
    found = [by_size] if by_region == by_size else [by_size, by_region]
    return [list(itertools.chain.from_iterable(row)) for row in found]


def sites(swarm: Swarm, workers: Sequence[int], limit_s: float | None = None) -> list[list[int]]:
    """Workers joined by near links (measured, or through a common landmark), largest site first, fastest rank first.

    Near is a round trip of `limit_s`; None: of the configured limit.
    """
    parent = {worker: worker for worker in workers}
    limit = swarm.config.near_round_trip_s if limit_s is None else limit_s

    def root(worker: int) -> int:
        while parent[worker] != worker:
            parent[worker] = parent[parent[worker]]
            worker = parent[worker]
        return worker

    def join(a: int, b: int) -> None:
        low, high = sorted((root(a), root(b)))
        parent[high] = low

    for worker in workers:
        for other in swarm.links.near[worker]:
            if other in parent and swarm.links.between(worker, other).round_trip_s <= limit:
                join(worker, other)
    for near in swarm.links.near_sets:
        members = [worker for worker in near if worker in parent]
        for worker in members[1:]:
            join(members[0], worker)
    found: dict[int, list[int]] = {}
    for worker in swarm.canonical(list(workers)):
        found.setdefault(root(worker), []).append(worker)
    return sorted(found.values(), key=lambda members: (-len(members), members))


def group_lists(swarm: Swarm, workers: Sequence[int]) -> Iterator[list[tuple[int, ...]]]:
    """Partitions of the workers into groups of about one size, inside sites; and each site in its own best size."""
    local = sites(swarm, workers)
    largest = min(swarm.config.max_group_size, len(local[0]))
    sizes = [size for size in _SIZES if size <= largest]
    if largest not in sizes and largest < _SIZES[-1]:
        sizes.append(largest)
    by_size = {size: [cut_site(swarm, site, size) for site in local] for size in sizes}
    for size in sizes:
        yield [members for groups in by_size[size] for members in groups]
    if len(local) > 1 and len(sizes) > 1:
        best = []
        for index in range(len(local)):
            cuts = [by_size[size][index] for size in sizes]
            best += min(cuts, key=lambda groups: (_pace(swarm, groups), groups))
        yield best


def _pace(swarm: Swarm, groups: Iterable[tuple[int, ...]]) -> float:
    """Cost per layer of a site's best group; what the others could add doesn't count."""
    return min(swarm.group(members).pace_s for members in groups)


def cut_site(swarm: Swarm, site: Sequence[int], size: int) -> list[tuple[int, ...]]:
    """Groups of near workers of like speed; whoever has too few near ones left stays alone."""
    if size == 1:
        return [(worker,) for worker in site]
    left, found = list(site), []
    while left:
        seed = left.pop(0)
        window = left[: max(_WINDOW, size)]
        trips = {worker: swarm.links.between(seed, worker).round_trip_s for worker in window}
        near = [w for w in window if trips[w] <= swarm.config.near_round_trip_s]
        chosen: list[int] = []
        for worker in sorted(near, key=lambda w: (trips[w], window.index(w))):
            if len(chosen) < size - 1 and all(swarm.links.are_joined(worker, other) for other in chosen):
                chosen.append(worker)
        if len(chosen) < size - 1 and len(left) >= size - 1:
            chosen = []
        left = [worker for worker in left if worker not in chosen]
        found.append(swarm.canonical((seed, *chosen)))
    return found
