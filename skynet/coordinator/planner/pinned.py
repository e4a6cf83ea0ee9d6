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
    while left and (not found or len(left) >= layout.num_workers):
        chain = _best(swarm, left, sizes)
        if chain is None:
            break
        found.append(chain)
        if swarm.config.objective is not Objective.THROUGHPUT:
            break
        used = set(itertools.chain(*chain.arrangement))
        left = [worker for worker in left if worker not in used]
    return [tuple(found)] if found else []


def _best(swarm: Swarm, workers: Sequence[int], sizes: tuple[int, ...]) -> Chain | None:
    search = Search(swarm, may_skip=False)
    if len(workers) <= swarm.config.exact_up_to:
        subsets = itertools.combinations(workers, sum(sizes))
        wanted = sorted(sizes)
        best = best_of(search.exhaust(s, lambda a: sorted(map(len, a)) == wanted) for s in subsets)
        return None if best is None else levelled(swarm, best, swarm.config.improvement_threshold)
    best = best_of(search.try_layout(arrangement) for arrangement in _starts(swarm, workers, sizes))
    if best is None:
        return None
    return levelled(swarm, search.improve(best, workers, replaced), swarm.config.improvement_threshold)


def _starts(swarm: Swarm, workers: Sequence[int], sizes: tuple[int, ...]) -> Iterator[Arrangement]:
    """Near groups of like speed; the roomiest workers in a row; and these dealt out so that rooms are alike."""
    largest, count = max(sizes), sum(sizes)
    cut = [m for site in sites(swarm, workers) for m in cut_site(swarm, site, largest)]
    cut.sort(key=lambda m: (-len(m), swarm.group(m).pace_s, m))
    yield _dealt(swarm, [worker for members in cut for worker in members][:count], sizes)
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
