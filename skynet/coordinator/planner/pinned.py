"""A pinned layout: replicas of exactly these sizes, or as near as the workers allow."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from skynet.coordinator.planner.config import Layout, Objective
from skynet.coordinator.planner.moves import replaced
from skynet.coordinator.planner.packing import Replicas
from skynet.coordinator.planner.predict import Arrangement, Chain, levelled
from skynet.coordinator.planner.search import Search, best_of, order_groups
from skynet.coordinator.planner.sites import cut_site, sites
from skynet.coordinator.planner.swarm import Swarm


def stage_sizes(layout: Layout, num_workers: int) -> tuple[int, ...]:
    """Ranks of each stage. Too few workers: as many stages with smaller groups, then fewer stages of one."""
    stages = min(layout.pipeline, num_workers)
    if stages == 0:
        return ()
    usable = min(num_workers, layout.num_workers)
    return tuple(usable // stages + (i < usable % stages) for i in range(stages))


def pinned_replicas(swarm: Swarm, workers: Sequence[int], layout: Layout) -> list[Replicas]:
    """Candidates in the layout; with the throughput objective as many replicas of it as there are workers for."""
    found: list[Chain] = []
    left = list(workers)
    sizes = stage_sizes(layout, len(left))
    near: list[tuple[int, ...]] = []
    while left and (not found or len(left) >= layout.num_workers):
        if not near or not swarm.is_large:  # among many, cut once: nearly all groups outlast their neighbours' use
            near = _near_groups(swarm, left, max(sizes))
        chain = _best(swarm, left, sizes, near)
        if chain is None:
            break
        found.append(chain)
        if swarm.config.objective is not Objective.THROUGHPUT:
            break
        used = set(itertools.chain(*chain.arrangement))
        left = [worker for worker in left if worker not in used]
        near = [rest for rest in (tuple(m for m in group if m not in used) for group in near) if rest]
    return [tuple(found)] if found else []


def _near_groups(swarm: Swarm, workers: Sequence[int], size: int) -> list[tuple[int, ...]]:
    """Near workers of like speed, complete and fast groups first."""
    cut = [m for site in sites(swarm, workers) for m in cut_site(swarm, site, size)]
    return sorted(cut, key=lambda m: (-len(m), swarm.group(m).pace_s, m))


def _best(
    swarm: Swarm, workers: Sequence[int], sizes: tuple[int, ...], near: Sequence[tuple[int, ...]]
) -> Chain | None:
    search = Search(swarm, may_skip=False)
    if len(workers) <= swarm.config.exact_up_to:
        subsets = itertools.combinations(workers, sum(sizes))
        wanted = sorted(sizes)
        best = best_of(search.exhaust(s, lambda a: sorted(map(len, a)) == wanted) for s in subsets)
        return None if best is None else levelled(swarm, best, swarm.config.improvement_threshold)
    best = best_of(search.try_all(_starts(swarm, workers, sizes, near)))
    if best is None or swarm.is_spent:
        return best
    return levelled(swarm, search.improve(best, workers, replaced), swarm.config.improvement_threshold)


def _starts(
    swarm: Swarm, workers: Sequence[int], sizes: tuple[int, ...], near: Sequence[tuple[int, ...]]
) -> Iterator[Arrangement]:
    """Near groups of like speed; the roomiest workers in a row; and these dealt out so that rooms are alike."""
    count = sum(sizes)
    whole_first = sorted(near, key=len, reverse=True)
    yield _dealt(swarm, [worker for members in whole_first for worker in members][:count], sizes)
    by_room = sorted(workers, key=lambda m: (-swarm.memory[m], -swarm.read_rate[m], m))[:count]
    yield _dealt(swarm, list(swarm.canonical(by_room)), sizes)
    yield _dealt(swarm, by_room, sizes)
    dealt = [worker for i in range(len(sizes)) for worker in by_room[i :: len(sizes)]]
    yield _dealt(swarm, dealt, sizes)


def _dealt(swarm: Swarm, workers: list[int], sizes: tuple[int, ...]) -> Arrangement:
    """Consecutive runs of the given sizes, in an order of short hops."""
    edges = list(itertools.accumulate(sizes, initial=0))
    groups = [swarm.group(swarm.canonical(workers[a:b])) for a, b in itertools.pairwise(edges)]
    return order_groups(swarm, groups)
