"""The planner's entry: candidates from search and from the plan in force, and one choice."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from skynet.coordinator.planner.config import Objective, PlannerConfig
from skynet.coordinator.planner.model import Plan, ReplicaPlan
from skynet.coordinator.planner.packing import Replicas, rate
from skynet.coordinator.planner.pinned import pinned_replicas, stage_sizes
from skynet.coordinator.planner.predict import Chain, levelled
from skynet.coordinator.planner.replan import Held, as_chain, held_by, moved_bytes, repairs
from skynet.coordinator.planner.replicas import divisions
from skynet.coordinator.planner.search import Search
from skynet.coordinator.planner.swarm import Swarm
from skynet.coordinator.planner.text import no_room
from skynet.coordinator.planner.written import write_out
from skynet.errors import ConfigError
from skynet.models.spec import ModelSpec
from skynet.protocol.ids import WorkerId
from skynet.protocol.profile import LinkProfile, WorkerProfile

_MAX_CANDIDATES = 64


class Candidate(NamedTuple):
    """A set of replicas, and what choosing it means."""

    replicas: Replicas
    value: float  # by the objective
    priced: float  # value, with the time that moving takes spread over the payback time
    num_workers: int
    moved_bytes: int
    is_current: bool = False

    @property
    def order(self) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """Decides between equals, the same way every time."""
        return tuple(chain.arrangement for chain in self.replicas)


def plan(
    spec: ModelSpec,
    workers: Mapping[WorkerId, WorkerProfile],
    links: Sequence[LinkProfile],
    config: PlannerConfig,
    current: Plan | None = None,
) -> Plan:
    """Who should hold what. Pure and deterministic: the same input in any order gives the same plan.

    `workers` are those that may be used now; `current` is the plan in force, whose workers may be gone. Raises
    CapacityError if they can't hold the model with one sequence of the shortest context, and ConfigError for a pinned
    layout that no number of workers could run.
    """
    swarm = Swarm(spec, workers, links, config)
    usable = [i for i in range(len(swarm.ids)) if swarm.memory[i] > 0]
    sizes = _pinned_sizes(swarm, usable)
    found = _search(swarm, usable, current)
    kept = _as_it_is(swarm, current, sizes)
    found += _repaired(swarm, current, usable, sizes)
    if not found and kept is None:
        raise no_room(swarm, usable, sizes)
    chosen, best = _choose(swarm, found, kept, current)
    return write_out(swarm, chosen.replicas, chosen.value / best.value - 1, current, chosen.is_current)


def _pinned_sizes(swarm: Swarm, usable: list[int]) -> tuple[int, ...] | None:
    layout = swarm.config.layout
    if layout is None:
        return None
    if layout.pipeline > swarm.spec.num_layers:
        text = f"layout {layout}: {layout.pipeline} stages asked for, the model has {swarm.spec.num_layers} layers"
        raise ConfigError(f"{text}; pin at most {swarm.spec.num_layers} stages")
    return stage_sizes(layout, len(usable))


def _search(swarm: Swarm, usable: list[int], current: Plan | None) -> list[Replicas]:
    """Candidates that don't depend on the plan in force, and its neighbourhood."""
    if not usable:
        return []
    if swarm.config.layout is not None:
        return pinned_replicas(swarm, usable, swarm.config.layout)
    search = Search(swarm)
    is_throughput = swarm.config.objective is Objective.THROUGHPUT
    if is_throughput and swarm.is_large and (found := divisions(search, usable, None)):
        return found  # one replica alone can't be the best use of so many
    best = search.best(usable)
    if current is not None and len(usable) > swarm.config.exact_up_to:
        _around(search, current, usable)
    if is_throughput:
        return divisions(search, usable, best)
    chains = sorted(search.chains(), key=lambda c: (c.value, c.num_workers, c.arrangement))
    return [(levelled(swarm, chain),) for chain in chains[:_MAX_CANDIDATES]]


def _around(search: Search, current: Plan, usable: list[int]) -> None:
    """Layouts next to the present ones: without the lost workers, and with new ones taken in."""
    index = {search.swarm.ids[i]: i for i in usable}
    for replica in current.replicas:
        groups = [tuple(index[w] for w in stage.worker_ids if w in index) for stage in replica.stages]
        chain = search.try_layout(tuple(group for group in groups if group)) if any(groups) else None
        if chain is not None:
            search.improve(chain, usable)
        if search.swarm.is_spent:
            break


def _as_it_is(swarm: Swarm, current: Plan | None, sizes: tuple[int, ...] | None) -> Replicas | None:
    """The plan in force, if it still holds and is of the pinned layout."""
    if current is None or current.spec != swarm.spec:
        return None
    chains = [as_chain(swarm, replica, current.block_size) for replica in current.replicas]
    whole = tuple(chain for chain in chains if chain is not None)
    if len(whole) != len(chains) or not _in_layout(whole, sizes):
        return None
    return whole


def _in_layout(replicas: Replicas, sizes: tuple[int, ...] | None) -> bool:
    return sizes is None or all(sorted(map(len, chain.arrangement)) == sorted(sizes) for chain in replicas)


def _repaired(swarm: Swarm, current: Plan | None, usable: list[int], sizes: tuple[int, ...] | None) -> list[Replicas]:
    """The plan in force with its damaged replicas mended, or left out where others remain."""
    if current is None or current.spec != swarm.spec or current.block_size != swarm.config.block_size:
        return []
    used = {worker_id for replica in current.replicas for worker_id in replica.worker_ids}
    spares = list(swarm.canonical([i for i in usable if swarm.ids[i] not in used])[:4])
    intact: list[Chain] = []
    damaged: list[ReplicaPlan] = []
    for replica in current.replicas:
        chain = as_chain(swarm, replica, current.block_size)
        if chain is None:
            damaged.append(replica)
        else:
            intact.append(chain)
    if not damaged:
        return []
    found = [tuple(intact)] if intact else []
    mended = list(intact)
    for replica in damaged:
        taken = set(itertools.chain.from_iterable(m for chain in mended for m in chain.arrangement))
        options = list(repairs(swarm, replica, [s for s in spares if s not in taken]))
        if len(current.replicas) == 1:
            found += [(chain,) for chain in options]
        elif options:
            mended.append(min(options, key=lambda c: (c.value, c.num_workers, c.arrangement)))
            found.append(tuple(mended))
    return [replicas for replicas in found if _in_layout(replicas, sizes)]


def _choose(
    swarm: Swarm, found: list[Replicas], kept: Replicas | None, current: Plan | None
) -> tuple[Candidate, Candidate]:
    """(The choice, the best by value alone). Within the threshold: fewest workers, then fewest bytes moved.

    Where the plan in force doesn't hold any more (nothing is kept), the same shards with another cache are a new plan.
    """
    config = swarm.config
    held = held_by(current, swarm)
    in_force = None if kept is None else current
    candidates = [_candidate(swarm, replicas, held, in_force) for replicas in (*found, *([kept] if kept else []))]
    best = min(candidates, key=lambda c: (c.priced, c.num_workers, c.order))
    near = [c for c in candidates if c.priced <= best.priced * (1 + config.improvement_threshold)]
    for candidate in near:
        if candidate.is_current:  # nothing that is better by so little is worth a change
            return candidate, best
    return min(near, key=lambda c: (c.num_workers, c.moved_bytes, c.priced, c.order)), best


def _candidate(swarm: Swarm, replicas: Replicas, held: dict[WorkerId, Held], in_force: Plan | None) -> Candidate:
    is_throughput = swarm.config.objective is Objective.THROUGHPUT
    value = 1 / rate(replicas) if is_throughput else sum(chain.value for chain in replicas)
    moved, priced = 0, value
    if held:
        moved, most = moved_bytes(swarm, held, replicas)
        priced = value * (1 + most / swarm.config.fetch_bytes_per_s / swarm.config.payback_s)
    is_current = in_force is not None and _is_same(swarm, replicas, in_force)
    return Candidate(replicas, value, priced, sum(c.num_workers for c in replicas), moved, is_current)


def _is_same(swarm: Swarm, replicas: Replicas, current: Plan) -> bool:
    """Whether these are the current plan's shards, all of them."""
    if current.spec != swarm.spec or len(replicas) != len(current.replicas):
        return False
    new = {
        (swarm.ids[m], s.start, s.end, share)
        for chain in replicas
        for s in chain.stages
        for m, share in zip(s.variant.group.members, s.variant.shares, strict=True)
    }
    old = {
        (rank.worker_id, stage.layers.start, stage.layers.end, rank.share)
        for replica in current.replicas
        for stage in replica.stages
        for rank in stage.ranks
    }
    return new == old
