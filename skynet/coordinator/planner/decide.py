"""The planner's entry: candidates from search and from the plan in force, one choice, and the plan written out."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from skynet.coordinator.planner.config import Layout, Objective, PlannerConfig
from skynet.coordinator.planner.model import Plan, RankPlan, ReplicaPlan, StagePlan
from skynet.coordinator.planner.packing import Replicas, rate
from skynet.coordinator.planner.pinned import pinned_replicas, stage_sizes
from skynet.coordinator.planner.predict import Chain, levelled, predict, rank_bytes
from skynet.coordinator.planner.replan import Held, as_chain, held_by, moved_bytes, repairs, shared_bytes, transition
from skynet.coordinator.planner.replicas import divisions
from skynet.coordinator.planner.search import Search
from skynet.coordinator.planner.swarm import Swarm
from skynet.coordinator.planner.text import explain, format_bytes
from skynet.errors import CapacityError, ConfigError
from skynet.models.spec import ModelSpec
from skynet.protocol.ids import WorkerId
from skynet.protocol.plan import LayerSpan
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
        raise _no_room(swarm, usable, sizes)
    chosen, best = _choose(swarm, [*found, *([kept] if kept else [])], current)
    return _written_out(swarm, chosen, best, current)


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


def _choose(swarm: Swarm, found: list[Replicas], current: Plan | None) -> tuple[Candidate, Candidate]:
    """(The choice, the best by value alone). Within the threshold: fewest workers, then fewest bytes moved."""
    config = swarm.config
    held = held_by(current, swarm)
    candidates = [_candidate(swarm, replicas, held, current) for replicas in found]
    best = min(candidates, key=lambda c: (c.priced, c.num_workers, c.order))
    near = [c for c in candidates if c.priced <= best.priced * (1 + config.improvement_threshold)]
    for candidate in near:
        if candidate.is_current:  # nothing that is better by so little is worth a change
            return candidate, best
    return min(near, key=lambda c: (c.num_workers, c.moved_bytes, c.priced, c.order)), best


def _candidate(swarm: Swarm, replicas: Replicas, held: dict[WorkerId, Held], current: Plan | None) -> Candidate:
    is_throughput = swarm.config.objective is Objective.THROUGHPUT
    value = 1 / rate(replicas) if is_throughput else sum(chain.value for chain in replicas)
    moved, priced = 0, value
    if held:
        moved, most = moved_bytes(swarm, held, replicas)
        priced = value * (1 + most / swarm.config.fetch_bytes_per_s / swarm.config.payback_s)
    is_current = current is not None and _is_same(swarm, replicas, current)
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


def _written_out(swarm: Swarm, chosen: Candidate, best: Candidate, current: Plan | None) -> Plan:
    config = swarm.config
    if chosen.is_current and current is not None:
        chains = {frozenset(itertools.chain(*chain.arrangement)): chain for chain in chosen.replicas}
        index = {worker_id: i for i, worker_id in enumerate(swarm.ids)}
        ordered = [chains[frozenset(index[w] for w in replica.worker_ids)] for replica in current.replicas]
        blocks = [replica.num_blocks for replica in current.replicas]
        replicas = tuple(_replica(swarm, c, n) for c, n in zip(ordered, blocks, strict=True))
    else:
        held = held_by(current, swarm)
        replicas = tuple(_replica(swarm, chain, _blocks(swarm, chain, held)) for chain in chosen.replicas)
    used = {worker_id for replica in replicas for worker_id in replica.worker_ids}
    layout = config.layout
    is_met = layout is None or all(_is_layout(replica, layout) for replica in replicas)
    change = transition(swarm, current, replicas)
    return Plan(
        spec=swarm.spec,
        objective=config.objective,
        replicas=replicas,
        spares=tuple(worker_id for worker_id in swarm.ids if worker_id not in used),
        block_size=config.block_size,
        layout=layout,
        layout_is_met=is_met,
        reasons=explain(swarm, chosen.replicas, replicas, change, best.value, chosen.value, current, is_met),
        transition=change,
        estimated_links=_estimated(swarm, chosen.replicas),
    )


def _is_layout(replica: ReplicaPlan, layout: Layout) -> bool:
    return len(replica.stages) == layout.pipeline and all(
        len(stage.ranks) == layout.tensor_parallel for stage in replica.stages
    )


def _replica(swarm: Swarm, chain: Chain, num_blocks: int) -> ReplicaPlan:
    stages = []
    for stage in chain.stages:
        ranks = tuple(
            RankPlan(
                worker_id=swarm.ids[member],
                share=share,
                weight_bytes=weights,
                kv_bytes=num_blocks * block_bytes,
                memory_bytes=swarm.memory[member],
            )
            for (member, weights, block_bytes), share in zip(
                rank_bytes(swarm, stage), stage.variant.shares, strict=True
            )
        )
        stages.append(StagePlan(layers=LayerSpan(stage.start, stage.end), ranks=ranks))
    prediction = chain.prediction if num_blocks == chain.num_blocks else predict(swarm, chain.stages, num_blocks)
    return ReplicaPlan(stages=tuple(stages), num_blocks=num_blocks, prediction=prediction)


def _blocks(swarm: Swarm, chain: Chain, held: dict[WorkerId, Held]) -> int:
    """KV blocks; fewer, if that lets every worker load beside what it holds and a quarter or more remains."""
    blocks = chain.num_blocks
    for stage in chain.stages:
        layers = LayerSpan(stage.start, stage.end)
        for (member, weights, block_bytes), share in zip(rank_bytes(swarm, stage), stage.variant.shares, strict=True):
            old = held.get(swarm.ids[member])
            if old is not None and block_bytes:
                both = old.weight_bytes + old.kv_bytes + weights - shared_bytes(swarm.costs, old, layers, share)
                blocks = min(blocks, (swarm.memory[member] - both) // block_bytes)
    return blocks if blocks >= max(swarm.min_blocks, chain.num_blocks // 4) else chain.num_blocks


def _estimated(swarm: Swarm, replicas: Replicas) -> tuple[tuple[WorkerId, WorkerId], ...]:
    """Links that the plan relies on and nobody measured."""
    pairs: set[tuple[int, int]] = set()
    for chain in replicas:
        groups = chain.arrangement
        for members in groups:
            pairs.update(itertools.combinations(sorted(members), 2))
        for a, b in itertools.pairwise(groups):
            pairs.update((min(a[i % len(a)], m), max(a[i % len(a)], m)) for i, m in enumerate(b))
    unknown = sorted(pair for pair in pairs if swarm.links.between(*pair).is_estimated)
    return tuple((swarm.ids[a], swarm.ids[b]) for a, b in unknown)


def _no_room(swarm: Swarm, usable: list[int], sizes: tuple[int, ...] | None) -> CapacityError:
    """By how much memory falls short, in words and bytes."""
    lent_by = sorted((swarm.memory[i] for i in usable), reverse=True)[: sum(sizes) if sizes else None]
    need, lent = swarm.replica_bytes, sum(lent_by)
    spec = swarm.spec
    model = f"the {spec.model_type} model of {spec.num_layers} layers ({spec.dtype})"
    context = f"with KV cache for {swarm.min_tokens} tokens"
    who = f"{len(lent_by)} worker{'s' * (len(lent_by) != 1)}"
    pinned = f" in layout {swarm.config.layout}" if sizes else ""
    if not lent_by:
        return CapacityError(f"{model} needs {format_bytes(need)} {context}, and no worker lends any memory", need)
    verb = "lends" if len(lent_by) == 1 else "lend"
    if need > lent:
        missing = need - lent
        text = f"{model} needs {format_bytes(need)} {context}, the {who}{pinned} {verb} {format_bytes(lent)}"
        return CapacityError(
            f"{text}: {format_bytes(missing)} missing; start more workers or lend more memory", missing
        )
    layer = need // spec.num_layers
    missing = max(need - sum(memory // layer * layer for memory in lent_by), layer)
    text = f"{model} needs {format_bytes(need)} {context}; the {who}{pinned} {verb} {format_bytes(lent)}"
    if num_cut := sum(not swarm.links.are_joined(a, b) for a, b in itertools.combinations(usable, 2)):
        text += f", but {num_cut} pair{'s' * (num_cut != 1)} of workers can't reach each other"
        return CapacityError(f"{text} and no plan goes round that; open their data ports or start more workers")
    text += f", but a layer takes {format_bytes(layer)} and no split into whole shares fits"
    return CapacityError(
        f"{text}: about {format_bytes(missing)} missing; start more workers or lend more memory", missing
    )
