"""Looking for the best single replica among some workers: exhaustively in small swarms, else by construction and
local search. Everything here is deterministic; effort is counted in layouts tried, never in time."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence

from skynet.coordinator.planner.config import Objective
from skynet.coordinator.planner.groups import Group
from skynet.coordinator.planner.moves import neighbours, ordered_partitions, without_one
from skynet.coordinator.planner.partitions import MAX_PARTITIONED, Partitions
from skynet.coordinator.planner.predict import Arrangement, Chain, evaluate
from skynet.coordinator.planner.sites import group_lists
from skynet.coordinator.planner.swarm import Swarm

_LINK_WORK = 4  # of one link between groups of several looked at; between two workers: 1
_NEW_RANK = 60  # effort of working out one rank of a new group, in the unit of `search_effort`
_MAX_LOCAL_WORKERS = 40
_FEW_WORKERS = 12
_STARTS = 3  # local searches among few workers
_POOL = 48
_PROMISING, _FAILING = 40, 400  # layouts of few workers worked out before local search


class Search:
    """Remembers every layout tried."""

    def __init__(self, swarm: Swarm, may_skip: bool = True) -> None:
        self.swarm = swarm
        self.may_skip = may_skip  # whether a layout's groups may be left without layers
        self.tried: dict[Arrangement, Chain | None] = {}
        self.effort_left = float(swarm.config.search_effort)  # for local search, all replicas together

    def try_layout(self, arrangement: Arrangement) -> Chain | None:
        if arrangement not in self.tried:
            self.tried[arrangement] = evaluate(self.swarm, arrangement, self.may_skip)
        return self.tried[arrangement]

    def try_first(self, arrangements: Iterable[Arrangement]) -> Chain | None:
        """The first that fits."""
        return next((chain for chain in map(self.try_layout, arrangements) if chain is not None), None)

    def try_all(self, arrangements: Iterable[Arrangement]) -> list[Chain]:
        """Those that fit; once the work is spent, none after the first."""
        found: list[Chain] = []
        for chain in map(self.try_layout, arrangements):
            found += [] if chain is None else [chain]
            if found and self.swarm.is_spent:
                break
        return found

    def chains(self) -> list[Chain]:
        """All that fit."""
        return [chain for chain in self.tried.values() if chain is not None]

    def exhaust(self, workers: Sequence[int], accept: Callable[[Arrangement], bool] = lambda _: True) -> Chain | None:
        """Every ordered partition of exactly these workers."""
        layout = self.swarm.config.layout
        limit = self.swarm.config.max_group_size if layout is None else layout.tensor_parallel
        found = [
            self.try_layout(arrangement)
            for arrangement in ordered_partitions(self.swarm.canonical(workers), limit)
            if accept(arrangement)
        ]
        return best_of(found)

    def best(self, workers: Sequence[int]) -> Chain | None:
        """The best replica by some of these workers."""
        if len(workers) <= self.swarm.config.exact_up_to:
            subsets = (s for k in range(1, len(workers) + 1) for s in itertools.combinations(workers, k))
            return best_of(self.exhaust(subset) for subset in subsets)
        built = self.try_all(self._constructed(workers))
        if len(workers) <= MAX_PARTITIONED:
            built += self._promising(workers)
        fitting = built or self._last_resort(workers)
        starts = sorted(fitting, key=lambda c: (c.value, c.num_workers, c.arrangement))
        several = _STARTS if len(workers) <= _FEW_WORKERS else 1
        distinct = list({chain.arrangement: chain for chain in starts}.values())[:several]
        return best_of([self.improve(chain, workers) for chain in distinct])

    def _promising(self, workers: Sequence[int]) -> list[Chain]:
        """The layouts with the best estimates of all: some that fit, or many that don't."""
        partitions = Partitions(self.swarm, workers)
        memory, need = self.swarm.memory, self.swarm.replica_bytes
        found: list[Chain] = []
        failed = 0
        for partition in partitions.ranked:
            if sum(memory[m] for members in partition.members for m in members) < need:
                continue
            chain = self.try_first(partitions.orders(partition))
            if chain is not None:
                found.append(chain)
            failed += chain is None
            if len(found) >= _PROMISING or failed >= _FAILING:
                break
        return found

    def _constructed(self, workers: Sequence[int]) -> Iterator[Arrangement]:
        for members in group_lists(self.swarm, workers):
            groups = [self.swarm.group(m) for m in members]
            for chosen in self._selections(groups):
                yield order_groups(self.swarm, chosen)

    def _selections(self, groups: list[Group]) -> Iterator[list[Group]]:
        """Subsets that should hold the model: the fastest, the roomiest, and those close to a good one."""
        usable = [group for group in groups if group.room > 0]
        fast = sorted(usable, key=lambda g: (g.pace_s, g.members))
        big = sorted(usable, key=lambda g: (-g.room, g.pace_s, g.members))
        for order in (fast, big):
            yield from self._prefixes(order)
        if self.swarm.config.objective is Objective.THROUGHPUT and len(usable) <= _MAX_LOCAL_WORKERS:
            yield usable
        anchors = {g.members: g for g in (*fast[:4], *big[:2])}
        for anchor in anchors.values():
            yield from self._prefixes(self._from_anchor(anchor, fast))

    def _prefixes(self, order: list[Group]) -> Iterator[list[Group]]:
        """The shortest prefix with room for all layers, and longer ones in case embedding and head don't fit."""
        held, num_layers = 0, self.swarm.spec.num_layers
        extras = (0, 1, 3) if not self.swarm.is_large else (0, 2)
        for count, group in enumerate(order, 1):
            held += group.room
            if held >= num_layers:
                for extra in extras:
                    if count + extra <= len(order):
                        yield order[: count + extra]
                return

    def _from_anchor(self, anchor: Group, fast: list[Group]) -> list[Group]:
        """Always the group that adds least time per layer next, the hop to it included."""
        swarm, num_layers = self.swarm, self.swarm.spec.num_layers
        near = {worker for m in anchor.members for worker in swarm.links.near[m]}
        close = [g for g in fast[_POOL:] if near.intersection(g.members)][:_POOL]
        pool = {g.members: g for g in (*fast[:_POOL], *close) if g is not anchor}
        chosen, held = [anchor], anchor.room
        while held < num_layers + 4 and pool:
            left, last = max(1, num_layers - held), chosen[-1]

            def added(g: Group, left: int = left, last: Group = last) -> tuple[float, tuple[int, ...]]:
                return g.pace_s + g.hop_cost(last) / min(left, g.room), g.members

            following = min(pool.values(), key=added)
            del pool[following.members]
            chosen.append(following)
            held += following.room
        return chosen

    def _last_resort(self, workers: Sequence[int]) -> list[Chain]:
        """Memory is short: every worker must help, in stages by room, then in ever larger groups, near or not."""
        swarm = self.swarm
        if not swarm.has_full_variants:
            swarm.use_full_variants()
            self.tried = {layout: chain for layout, chain in self.tried.items() if chain is not None}
        found: list[Chain] = []
        for arrangement in self.roomy_layouts(workers):
            chain = self.try_layout(arrangement)
            if chain is not None:
                found.append(chain)
                if len(workers) > _FEW_WORKERS:
                    break
        return found

    def roomy_layouts(self, workers: Sequence[int]) -> Iterator[Arrangement]:
        """All of these workers, roomiest first: runs and mixtures of every size, then one group of all."""
        swarm, count = self.swarm, len(workers)
        ordered = sorted(workers, key=lambda m: (-swarm.memory[m], m))
        for size in (s for s in ((1, 2, 3, 4, 6, 8) if count <= 200 else (1, 2, 4)) if s <= count):
            roomiest = ordered[: size * swarm.most_groups]
            if sum(swarm.memory[m] for m in roomiest) < swarm.replica_bytes:
                continue
            by_room = [swarm.canonical(roomiest[i : i + size]) for i in range(0, len(roomiest), size)]
            stages = -(-len(roomiest) // size)
            mixed = [swarm.canonical(roomiest[i::stages]) for i in range(stages)]
            for members in (by_room, mixed):
                yield order_groups(swarm, [swarm.group(m) for m in members])
                yield tuple(members)
        if count <= swarm.config.max_group_size:
            yield (swarm.canonical(ordered),)

    def improve(
        self,
        chain: Chain,
        workers: Sequence[int],
        moves: Callable[..., Iterable[Arrangement]] | None = None,
        effort: float | None = None,
    ) -> Chain:
        """Local search; then ever fewer workers, so that a smaller layout is always among those tried.

        It takes half of the effort that is left (the rest is for other replicas), or `effort`.
        """
        if chain.num_workers > _MAX_LOCAL_WORKERS:
            return chain
        reserve = self.effort_left / 2 if effort is None else max(0.0, self.effort_left - effort)
        improved = True
        while improved and self.effort_left > reserve:
            improved = False
            for arrangement in (moves or neighbours)(self.swarm, chain.arrangement, self._pool(chain, workers)):
                if arrangement in self.tried:
                    continue
                self.effort_left -= self._effort(arrangement)
                other = self.try_layout(arrangement)
                if other is not None and other.value < chain.value * (1 - 1e-9):
                    chain, improved = other, True
                    break
                if self.effort_left <= reserve or self.swarm.is_spent:
                    break
        if moves is None and effort is None:
            self._shrink(chain)
        return chain

    def _effort(self, arrangement: Arrangement) -> int:
        new = sum(len(members) for members in arrangement if not self.swarm.knows_group(members))
        return self.swarm.spec.num_layers * len(arrangement) + _NEW_RANK * new

    def _pool(self, chain: Chain, workers: Sequence[int]) -> list[int]:
        used = {m for members in chain.arrangement for m in members}
        return list(self.swarm.canonical([w for w in workers if w not in used])[:6])

    def _shrink(self, chain: Chain) -> None:
        smaller: Chain | None = chain
        while smaller is not None and smaller.num_workers > 1 and self.effort_left > 0:
            fewer = list(without_one(smaller.arrangement))
            self.effort_left -= sum(self._effort(a) for a in fewer if a not in self.tried)
            smaller = best_of([self.try_layout(a) for a in fewer])


def best_of(chains: Iterable[Chain | None]) -> Chain | None:
    """Least value, then fewest workers, then the first by layout."""
    found = [chain for chain in chains if chain is not None]
    return min(found, key=lambda c: (c.value, c.num_workers, c.arrangement)) if found else None


def order_groups(swarm: Swarm, groups: Sequence[Group]) -> Arrangement:
    """Pipeline order by short hops: always the nearest next, from the fastest on."""
    left = list(groups)
    ranks = [len(group.members) for group in left]
    swarm.work += len(left) * sum(1 if count == 1 else _LINK_WORK * count for count in ranks) // 2
    order = [left.pop(0)] if left else []
    while left:
        last = order[-1].members
        near = min(range(len(left)), key=lambda i: (swarm.hop_s(last, left[i].members, 1), i))
        order.append(left.pop(near))
    return tuple(group.members for group in order)
