"""From the plan in force to another: what is kept, what moves, and repairs that move little."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

from skynet.coordinator.planner.model import Plan, ReplicaPlan, StagePlan, Transition, WorkerTransition
from skynet.coordinator.planner.packing import Replicas
from skynet.coordinator.planner.predict import Chain, Placed, are_joined, finish, rank_bytes
from skynet.coordinator.planner.swarm import Swarm
from skynet.models.costs import ModelCosts, PartCosts
from skynet.protocol.ids import WorkerId
from skynet.protocol.plan import LayerSpan, RankShare, Span

_MAX_REPAIRS = 64


class Held(NamedTuple):
    """What a worker has in memory."""

    layers: LayerSpan
    share: RankShare
    weight_bytes: int
    kv_bytes: int


def held_by(plan: Plan | None, swarm: Swarm) -> dict[WorkerId, Held]:
    """What each worker holds under the plan; nothing that helps if that was another model."""
    if plan is None or plan.spec != swarm.spec:
        return {}
    return {
        rank.worker_id: Held(stage.layers, rank.share, rank.weight_bytes, rank.kv_bytes)
        for replica in plan.replicas
        for stage in replica.stages
        for rank in stage.ranks
    }


def overlap(a: Span, b: Span) -> Span:
    start = max(a.start, b.start)
    return Span(start, max(start, min(a.end, b.end)))


def kept_bytes(costs: ModelCosts, old: Held, layers: LayerSpan, share: RankShare) -> int:
    """Bytes of the new shard that the old one holds already, part by part."""
    group_size, num_layers = costs.spec.group_size, costs.spec.num_layers
    kv_heads = len(overlap(old.share.kv_heads(group_size), share.kv_heads(group_size)))
    common = RankShare(
        heads=overlap(old.share.heads, share.heads),
        mlp=overlap(old.share.mlp, share.mlp),
        expert_mlp=overlap(old.share.expert_mlp, share.expert_mlp),
        vocab=overlap(old.share.vocab, share.vocab),
    )
    start, end = max(old.layers.start, layers.start), min(old.layers.end, layers.end)
    dense, moe = costs.count(start, end) if start < end else (0, 0)
    total = dense * costs.dense.bytes_of(common, kv_heads) + moe * costs.moe.bytes_of(common, kv_heads)
    had, needs = _ends(costs, old.layers, num_layers), _ends(costs, layers, num_layers)
    return total + sum(part.bytes_of(common, 0) for name, part in needs.items() if name in had)


def _ends(costs: ModelCosts, layers: LayerSpan, num_layers: int) -> dict[str, PartCosts]:
    """What a stage holds besides layers, by name; a tied table is the same tensor at either end."""
    table, is_tied = costs.tied, costs.tied != PartCosts()
    found: dict[str, PartCosts] = {}
    if layers.start == 0:
        found["embedding"] = _less(costs.embedding, table)
    if layers.end == num_layers:
        found["head"] = _less(costs.head, table)
    if found and is_tied:
        found["table"] = table
    return found


def _less(whole: PartCosts, part: PartCosts) -> PartCosts:
    return PartCosts(fixed=whole.fixed - part.fixed, vocab=whole.vocab - part.vocab)


def moved_bytes(swarm: Swarm, held: dict[WorkerId, Held], replicas: Replicas) -> tuple[int, int]:
    """Bytes to fetch: of all workers together, and of the one that fetches most."""
    total = most = 0
    for chain in replicas:
        for stage in chain.stages:
            layers = LayerSpan(stage.start, stage.end)
            for (member, weights, _), share in zip(rank_bytes(swarm, stage), stage.variant.shares, strict=True):
                old = held.get(swarm.ids[member])
                fetched = weights - (kept_bytes(swarm.costs, old, layers, share) if old else 0)
                total, most = total + fetched, max(most, fetched)
    return total, most


def as_chain(swarm: Swarm, replica: ReplicaPlan, block_size: int) -> Chain | None:
    """A replica of the plan in force by today's profiles; None if a worker is gone, cut off or lends too little."""
    index = {worker_id: i for i, worker_id in enumerate(swarm.ids)}
    if not all(worker_id in index for worker_id in replica.worker_ids):
        return None
    if any(r.weight_bytes + r.kv_bytes > swarm.memory[index[r.worker_id]] for s in replica.stages for r in s.ranks):
        return None
    if replica.num_blocks < swarm.min_blocks or block_size != swarm.config.block_size:
        return None
    stages = tuple(_placed(swarm, index, stage) for stage in replica.stages)
    return finish(swarm, stages, replica.num_blocks) if are_joined(stages) else None


def _placed(swarm: Swarm, index: dict[WorkerId, int], stage: StagePlan) -> Placed:
    group = swarm.group(tuple(index[worker_id] for worker_id in stage.worker_ids))
    variant = group.variant(tuple(rank.share for rank in stage.ranks))
    return Placed(variant, stage.layers.start, stage.layers.end)


def repairs(swarm: Swarm, replica: ReplicaPlan, spares: list[int]) -> Iterator[Chain]:
    """A damaged replica with little moved: spares in the places of the lost, smaller groups, or neighbours' help."""
    index = {worker_id: i for i, worker_id in enumerate(swarm.ids)}
    choices = [_stage_choices(swarm, index, stage, spares) for stage in replica.stages]
    for combination in itertools.islice(itertools.product(*choices), _MAX_REPAIRS):
        for stages in _closed(swarm, replica, combination):
            members = [m for stage in stages for m in stage.variant.group.members]
            fits = len(set(members)) == len(members) and all(s.variant.fits(s.start, s.end) for s in stages)
            if fits and are_joined(stages):
                yield finish(swarm, stages)


def _stage_choices(
    swarm: Swarm, index: dict[WorkerId, int], stage: StagePlan, spares: list[int]
) -> list[Placed | None]:
    """This stage as it was, or with its lost ranks replaced or left out; None: the stage is gone."""
    start, end = stage.layers.start, stage.layers.end
    ranks = [index.get(worker_id) for worker_id in stage.worker_ids]
    lost = [r for r, member in enumerate(ranks) if member is None]
    if not lost:
        return [_placed(swarm, index, stage)]
    shares = tuple(rank.share for rank in stage.ranks)
    found: list[Placed | None] = []
    for stand_ins in itertools.islice(itertools.permutations(spares, len(lost)), 8):
        replacing = dict(zip(lost, stand_ins, strict=True))
        members = tuple(replacing[r] if member is None else member for r, member in enumerate(ranks))
        found.append(Placed(swarm.group(members).variant(shares), start, end))
    if survivors := tuple(member for member in ranks if member is not None):
        found += [Placed(variant, start, end) for variant in swarm.group(survivors).variants]
    return [*found, None]


def _closed(swarm: Swarm, replica: ReplicaPlan, combination: tuple[Placed | None, ...]) -> Iterator[tuple[Placed, ...]]:
    """Give the layers of gone stages to the neighbours, cut at each possible place."""
    gone = [i for i, placed in enumerate(combination) if placed is None]
    if not gone:
        yield tuple(placed for placed in combination if placed is not None)
    elif len(gone) == 1:
        i = gone[0]
        layers = replica.stages[i].layers
        before, after = combination[:i], combination[i + 1 :]
        for cut in range(layers.start, layers.end + 1):
            left = [placed for placed in before if placed is not None]
            right = [placed for placed in after if placed is not None]
            if (cut > layers.start and not left) or (cut < layers.end and not right) or not (left or right):
                continue
            if left:
                left[-1] = left[-1]._replace(end=cut)
            if right:
                right[0] = right[0]._replace(start=cut)
            yield (*left, *right)


def transition(swarm: Swarm, current: Plan | None, replicas: tuple[ReplicaPlan, ...]) -> Transition:
    """What each worker of the new plan has to do."""
    held = held_by(current, swarm)
    in_memory = _in_memory(current)
    workers = []
    for stage in (stage for replica in replicas for stage in replica.stages):
        for rank in stage.ranks:
            old = held.get(rank.worker_id)
            kept = kept_bytes(swarm.costs, old, stage.layers, rank.share) if old else 0
            peak = rank.weight_bytes + rank.kv_bytes
            is_same = old is not None and old[:3] == (stage.layers, rank.share, rank.weight_bytes)
            if not is_same or old is None or old.kv_bytes != rank.kv_bytes:
                peak += in_memory.get(rank.worker_id, 0)
                peak -= shared_bytes(swarm.costs, old, stage.layers, rank.share) if old else 0
            workers.append(
                WorkerTransition(
                    worker_id=rank.worker_id,
                    kept_bytes=kept,
                    fetched_bytes=rank.weight_bytes - kept,
                    peak_bytes=peak,
                    memory_bytes=rank.memory_bytes,
                )
            )
    waits = [w.fetched_bytes / swarm.config.fetch_bytes_per_s for w in workers if not w.can_overlap]
    return Transition(workers=tuple(workers), pause_s=max(waits, default=0.0))


def _in_memory(plan: Plan | None) -> dict[WorkerId, int]:
    """All bytes that workers hold under a plan, of whichever model."""
    if plan is None:
        return {}
    ranks = [rank for replica in plan.replicas for stage in replica.stages for rank in stage.ranks]
    return {rank.worker_id: rank.weight_bytes + rank.kv_bytes for rank in ranks}


def shared_bytes(costs: ModelCosts, old: Held, layers: LayerSpan, share: RankShare) -> int:
    """Bytes that needn't be held twice while both shards are loaded: everything kept, if the shares are equal."""
    return kept_bytes(costs, old, layers, share) if old.share == share else 0
