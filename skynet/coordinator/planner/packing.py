"""Which replicas together: the best choice of disjoint sets of workers, among the layouts tried so far.

Each layout tried is a column: its workers and its rate. Choosing columns that share no worker is solved exactly among
few workers; the search then tries more layouts for the sets that come closest to being chosen, and chooses again.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Final, NamedTuple

from skynet.coordinator.planner.partitions import MAX_PARTITIONED, Partitions
from skynet.coordinator.planner.predict import Arrangement, Chain
from skynet.coordinator.planner.search import Search

Replicas = tuple[Chain, ...]

MAX_PACKED: Final = MAX_PARTITIONED  # workers among which sets are chosen exactly
_FITTING_PER_SET = 3
_FAILING = 400  # of all sets together, and at least:
_FAILING_PER_SET = 12
_ROUNDS = 4
_IMPROVED_PER_ROUND = 6
_EFFORT = 2500  # of one improvement, in the unit of `search_effort`


class _Column(NamedTuple):
    mask: int
    rate: float
    chain: Chain


def rate(replicas: Replicas) -> float:
    """Tokens per second of all, busy."""
    return sum(chain.prediction.batch_tokens_per_s for chain in replicas)


def packings(search: Search, workers: Sequence[int]) -> list[Replicas]:
    """The best replicas of up to MAX_PACKED workers: one choice for each number of workers used."""
    bits = {worker: 1 << i for i, worker in enumerate(workers)}
    _try_promising(search, Partitions(search.swarm, workers), bits)
    improved: set[Arrangement] = set()
    for _ in range(_ROUNDS):
        columns = _columns(search, bits)
        best = _solve(columns, len(workers))[0]
        close = sorted(columns, key=lambda c: (best[-1] - c.rate - best[(len(best) - 1) ^ c.mask], c.mask))
        chosen = [c.chain for c in close if c.chain.num_workers > 1 and c.chain.arrangement not in improved]
        if not chosen:
            break
        for chain in chosen[:_IMPROVED_PER_ROUND]:
            improved.add(chain.arrangement)
            members = list(itertools.chain(*chain.arrangement))
            improved.add(search.improve(chain, members, effort=_EFFORT).arrangement)
    return _by_count(_columns(search, bits), len(workers))


def _try_promising(search: Search, partitions: Partitions, bits: dict[int, int]) -> None:
    """Of each set of workers the layouts with the best estimates: some with room for a whole batch, or many without."""
    memory, need = search.swarm.memory, search.swarm.replica_bytes
    fitting: Counter[int] = Counter()
    failed: Counter[int] = Counter()
    roomy = [
        (sum(bits[m] for members in partition.members for m in members), partition)
        for partition in partitions.ranked
        if sum(memory[m] for members in partition.members for m in members) >= need
    ]
    most_failing = max(_FAILING_PER_SET, _FAILING // max(1, len({mask for mask, _ in roomy})))
    for mask, partition in roomy:
        if fitting[mask] >= _FITTING_PER_SET or failed[mask] >= most_failing:
            continue
        chain = search.try_first(partitions.orders(partition))
        if chain is not None and chain.prediction.sequences == search.swarm.config.batch:
            fitting[mask] += 1
        else:
            failed[mask] += 1


def _columns(search: Search, bits: dict[int, int]) -> list[_Column]:
    """The best layout tried of each set of these workers; without sets of which a part does as well."""
    best: dict[int, _Column] = {}
    for chain in search.chains():
        members = list(itertools.chain(*chain.arrangement))
        if all(member in bits for member in members):
            mask = sum(bits[member] for member in members)
            column = _Column(mask, chain.prediction.batch_tokens_per_s, chain)
            if mask not in best or (-column.rate, chain.arrangement) < (-best[mask].rate, best[mask].chain.arrangement):
                best[mask] = column
    ordered = sorted(best.values(), key=lambda c: (-c.rate, c.mask.bit_count(), c.mask))
    kept: list[_Column] = []
    for column in ordered:
        if not any(other.mask & column.mask == other.mask for other in kept):
            kept.append(column)
    return kept


def _solve(columns: Sequence[_Column], num_workers: int) -> tuple[list[float], list[_Column | None]]:
    """For each set of workers the highest rate of disjoint columns inside it, and the one with its lowest worker."""
    by_lowest: dict[int, list[_Column]] = {}
    for column in columns:
        by_lowest.setdefault(column.mask & -column.mask, []).append(column)
    best, choice = [0.0] * (1 << num_workers), [None] * (1 << num_workers)
    found: list[_Column | None] = [*choice]
    for mask in range(1, 1 << num_workers):
        lowest = mask & -mask
        best[mask] = best[mask ^ lowest]
        for column in by_lowest.get(lowest, ()):
            if column.mask & mask == column.mask and (total := column.rate + best[mask ^ column.mask]) > best[mask]:
                best[mask], found[mask] = total, column
    return best, found


def _by_count(columns: Sequence[_Column], num_workers: int) -> list[Replicas]:
    """The best choice that uses at most 1, 2, ... workers."""
    best, choice = _solve(columns, num_workers)
    tops: dict[int, int] = {}
    for mask in range(1, len(best)):
        count = mask.bit_count()
        if count not in tops or best[mask] > best[tops[count]]:
            tops[count] = mask
    found: dict[tuple[Arrangement, ...], Replicas] = {}
    for mask in tops.values():
        chains = []
        while mask:
            column = choice[mask]
            if column is None:
                mask &= mask - 1
            else:
                chains.append(column.chain)
                mask ^= column.mask
        if chains:
            found[tuple(chain.arrangement for chain in chains)] = tuple(chains)
    return list(found.values())
