"""The chosen replicas written out as a plan: bytes, KV blocks, transition and reasons."""

from __future__ import annotations

import itertools

from skynet.coordinator.planner.config import Layout
from skynet.coordinator.planner.model import Plan, RankPlan, ReplicaPlan, StagePlan
from skynet.coordinator.planner.packing import Replicas
from skynet.coordinator.planner.predict import Chain, predict, rank_bytes
from skynet.coordinator.planner.replan import Held, held_by, shared_bytes, transition
from skynet.coordinator.planner.swarm import Swarm
from skynet.coordinator.planner.text import explain
from skynet.protocol.ids import WorkerId
from skynet.protocol.plan import LayerSpan


def write_out(swarm: Swarm, chosen: Replicas, loss: float, current: Plan | None, is_current: bool) -> Plan:
    """The chosen replicas as a plan.

    `loss` is by how much (relatively) the best replicas by value alone would be better; `is_current` whether the chosen
    ones are those of the plan in force, which then keep their order and KV blocks.
    """
    config = swarm.config
    if is_current and current is not None:
        chains = {frozenset(itertools.chain(*chain.arrangement)): chain for chain in chosen}
        index = {worker_id: i for i, worker_id in enumerate(swarm.ids)}
        ordered = [chains[frozenset(index[w] for w in replica.worker_ids)] for replica in current.replicas]
        blocks = [replica.num_blocks for replica in current.replicas]
        replicas = tuple(_replica(swarm, c, n) for c, n in zip(ordered, blocks, strict=True))
    else:
        held = held_by(current, swarm)
        replicas = tuple(_replica(swarm, chain, _blocks(swarm, chain, held)) for chain in chosen)
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
        reasons=explain(swarm, chosen, replicas, change, loss, current, is_met),
        transition=change,
        estimated_links=_estimated(swarm, chosen),
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
