"""Several replicas: dividing the workers so that all answers together come fastest."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from skynet.coordinator.planner.packing import MAX_PACKED, Replicas, packings, rate
from skynet.coordinator.planner.predict import Chain
from skynet.coordinator.planner.search import Search, best_of, order_groups
from skynet.coordinator.planner.sites import cut_site, rows, sites

_SEARCHED_CLUSTER = 12  # clusters up to this size get a full search where there are few of them
_TRADES = 30
_PEELED_UP_TO = 20  # workers; it searches anew for each replica
_REPACKINGS = 4
_MAX_PACKINGS = 8  # of one plan: some 50 ms each
_WINDOW = 6  # workers whose replicas are put together anew at once
_MUCH_CACHE = 1.1  # where cache for a whole batch makes a replica so much larger, it counts in large swarms, too
_WASTED = 4  # with memory for so many times the replicas, far workers share layers, too
_FAR_UP_TO = 100  # workers; it takes up to a hundred layouts for each replica
_GROWTH = 32  # a run of workers that holds no replica is looked at again when it is longer by a part in so many
_EASED = 0.98  # what a replica takes is assumed to be what failed for the one before it, and less each time
_FEW_REPLICAS = 6  # up to here each replica in turn is dissolved into the others


def divisions(search: Search, workers: Sequence[int], whole: Chain | None) -> list[Replicas]:
    """Candidate sets of replicas; `whole` is the best single one."""
    config = search.swarm.config
    if len(workers) <= config.exact_up_to:
        return list(_all_divisions(search, tuple(workers)))
    found: list[Replicas] = [] if whole is None else [(whole,)]
    if len(workers) <= MAX_PACKED:
        return [*found, *packings(search, workers)]
    swarm = search.swarm
    room = sum(swarm.memory[w] for w in workers) // swarm.replica_bytes
    for row in rows(swarm, workers):
        clustered = list(_clustered(search, row))
        if len(workers) <= _FAR_UP_TO and max(map(len, clustered), default=0) < room / _WASTED:
            clustered.append(_in_clusters(search, row, 1, swarm.replica_bytes, far=True))
        found += [replicas for replicas in clustered if replicas]
    if not found:
        return []
    if len(workers) <= _PEELED_UP_TO:
        found.append(_peeled(search, workers))
    best = max(found, key=rate)
    if not swarm.is_large:
        found.append(_trade(search, best, workers))
        if 1 < len(best) <= _FEW_REPLICAS:
            found += [_trade(search, best[:i] + best[i + 1 :], workers) for i in range(len(best))]
        found.append(_repacked(search, max(found, key=rate), workers))
    found = [replicas for replicas in found if replicas]
    return [*found, *(_trimmed(search, replicas) for replicas in found if not swarm.is_large)]


def _all_divisions(search: Search, workers: tuple[int, ...]) -> Iterator[Replicas]:
    best: dict[frozenset[int], Chain | None] = {}
    for count in range(1, len(workers) + 1):
        for subset in itertools.combinations(workers, count):
            best[frozenset(subset)] = search.exhaust(subset)

    def extend(left: tuple[int, ...]) -> Iterator[Replicas]:
        if not left:
            yield ()
            return
        first, rest = left[0], left[1:]
        yield from extend(rest)  # `first` stays a spare
        for count in range(len(rest) + 1):
            for others in itertools.combinations(rest, count):
                chain = best[frozenset((first, *others))]
                if chain is not None:
                    for more in extend(tuple(w for w in rest if w not in others)):
                        yield (chain, *more)

    yield from (replicas for replicas in extend(workers) if replicas)


def _clustered(search: Search, row: Sequence[int]) -> Iterator[Replicas]:
    """Replicas of neighbours in a row: as many as possible, then ever fewer of more workers."""
    swarm, size = search.swarm, 1
    if swarm.is_large and swarm.roomy_bytes > _MUCH_CACHE * swarm.replica_bytes:
        yield _in_clusters(search, row, 1, swarm.roomy_bytes)
    for _ in range(1 if swarm.is_large else 6):
        replicas = _in_clusters(search, row, size, swarm.replica_bytes)
        if replicas:
            yield replicas
        if len(replicas) <= 1:
            return
        size = max(size + 1, min(2 * size, len(row) // (len(replicas) - 1)))


def _in_clusters(search: Search, row: Sequence[int], least: int, need_bytes: int, far: bool = False) -> Replicas:
    """Cut a row of workers into runs of at least `least` that lend `need_bytes`; a short tail stays over.

    With `far` workers that are far from each other may share layers.
    """
    found: list[Chain] = []
    cluster: list[int] = []
    held, enough, wanted = 0, least, float(need_bytes)
    for worker in row:
        cluster.append(worker)
        held += search.swarm.memory[worker]
        if held >= wanted and len(cluster) >= enough:
            if search.swarm.is_spent:
                break
            enough = len(cluster) + max(1, len(cluster) // _GROWTH)
            chain = _quick(search, cluster)
            if chain is None and far and len(cluster) <= _SEARCHED_CLUSTER:
                chain = search.try_first(search.roomy_layouts(cluster))
            if chain is not None:
                found.append(chain)
                cluster, held, enough = [], 0, least
                wanted = max(need_bytes, _EASED * wanted)
            elif search.swarm.is_large:
                wanted = held  # which won't do for the next ones, either, if they are alike
    return tuple(found)


def _peeled(search: Search, workers: Sequence[int]) -> Replicas:
    """Always the replica with the highest rate per worker next, among all layouts tried on those who are left."""
    found: list[Chain] = []
    left = list(workers)
    while left and search.best(left) is not None:
        usable = set(left)
        chains = [c for c in search.chains() if usable.issuperset(itertools.chain(*c.arrangement))]
        chosen = min(chains, key=lambda c: (c.value * c.num_workers, c.num_workers, c.arrangement))
        found.append(chosen)
        left = [w for w in left if w not in set(itertools.chain(*chosen.arrangement))]
    return tuple(found)


def _quick(search: Search, cluster: list[int]) -> Chain | None:
    """A good replica of all or some of a cluster, at a cost that a thousand workers can afford."""
    swarm = search.swarm
    if not swarm.is_large and len(cluster) <= _SEARCHED_CLUSTER:
        return search.best(cluster)
    local = sites(swarm, cluster)
    cuts = [[m for site in local for m in cut_site(swarm, site, size)] for size in (1, 2, 4) if size <= len(cluster)]
    by_pace = sorted(cuts[1:], key=lambda cut: -sum(1 / swarm.group(m).pace_s for m in cut))
    tried = []
    for members in (cuts[0], *by_pace[:1]):
        groups = [swarm.group(m) for m in members]
        if len(groups) > swarm.most_groups:
            groups = sorted(groups, key=lambda g: (-g.room, g.pace_s, g.members))[: swarm.most_groups]
        tried.append(search.try_layout(order_groups(swarm, groups)))
    return best_of(tried)


def _trade(search: Search, replicas: Replicas, workers: Sequence[int]) -> Replicas:
    """Give workers that no replica uses to the replica that gains most, and exchange while that helps."""
    current = list(replicas)
    spent = 0
    for worker in search.swarm.canonical(list(_unused(current, workers))):
        gains = []
        for i, chain in enumerate(current):
            if spent < _TRADES:
                spent += 1
                members = [m for group in chain.arrangement for m in group]
                wider = search.improve(chain, [*members, worker])
                gains.append((chain.value - wider.value, -i, wider))
        if gains and (gain := max(gains, key=lambda g: g[:2]))[0] > 0:
            current[-gain[1]] = gain[2]
    return tuple(current)


def _repacked(search: Search, replicas: Replicas, workers: Sequence[int]) -> Replicas:
    """Dissolve replicas next to each other, with spares near them, and put them together anew while that helps."""
    swarm, current = search.swarm, list(replicas)
    order = {worker: i for i, worker in enumerate(rows(swarm, workers)[-1])}
    left = _MAX_PACKINGS
    for _ in range(_REPACKINGS):
        current.sort(key=lambda c: min(order[m] for members in c.arrangement for m in members))
        for i in range(len(current)):
            some = _window(current, i)
            inside = [m for chain in some for members in chain.arrangement for m in members]
            spares = sorted(_unused(current, workers), key=lambda w: abs(order[w] - order[inside[0]]))
            inside += spares[: max(0, _WINDOW - len(inside))]
            if not 2 <= len(inside) <= _WINDOW or left <= 0:
                continue
            left -= 1
            better = max(packings(search, inside), key=rate, default=())
            if rate(better) > rate(tuple(some)) * (1 + 1e-9):
                current = [chain for chain in current if chain not in some] + list(better)
                break
        else:
            break
    return tuple(current)


def _window(replicas: Sequence[Chain], first: int) -> list[Chain]:
    """From `first` on, as many replicas in a row as can be put together anew."""
    some, count = [replicas[first]], replicas[first].num_workers
    for chain in replicas[first + 1 :]:
        if count + chain.num_workers > _WINDOW:
            break
        some.append(chain)
        count += chain.num_workers
    return some


def _unused(replicas: Sequence[Chain], workers: Sequence[int]) -> list[int]:
    used = {m for chain in replicas for members in chain.arrangement for m in members}
    return [worker for worker in workers if worker not in used]


def _trimmed(search: Search, replicas: Replicas) -> Replicas:
    """Each replica with the fewest of its workers that keep its rate within the threshold."""
    threshold = 1 + search.swarm.config.improvement_threshold
    chains = [(c, frozenset(itertools.chain(*c.arrangement))) for c in search.chains()]
    found = []
    for chain in replicas:
        members = {m for group in chain.arrangement for m in group}
        near = [c for c, workers in chains if c.value <= chain.value * threshold and workers <= members]
        found.append(min(near, key=lambda c: (c.num_workers, c.value, c.arrangement), default=chain))
    return tuple(found)
