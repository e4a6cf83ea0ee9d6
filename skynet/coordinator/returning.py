"""What workers still hold after their coordinator ended: the plan that was in force, pieced together and checked.

Pure. Nobody is believed alone: a replica counts only if every worker that it names is back, tells of the same replica,
and all of them together hold each layer, head, column and row exactly once.
"""

from __future__ import annotations

import itertools
import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from skynet.coordinator.planner import Plan, PlannerConfig, Prediction, RankPlan, ReplicaPlan, StagePlan
from skynet.errors import MalformedMessage
from skynet.models.costs import model_costs
from skynet.models.spec import ModelSpec
from skynet.protocol.ids import WorkerId
from skynet.protocol.messages import HeldShard
from skynet.protocol.plan import Epoch, Span, StageAssignment

logger = logging.getLogger(__name__)
_UNKNOWN = Prediction(prefill_tokens_per_s=1.0, decode_tokens_per_s=1.0, batch_tokens_per_s=1.0, sequences=1)


class Returned(NamedTuple):
    """A worker that came back, and what it says it holds."""

    shard: HeldShard
    memory_bytes: int  # that it lends


def absent(returned: Mapping[WorkerId, Returned], digest: str) -> frozenset[WorkerId]:
    """Those with whom the returned say they served this model, and who aren't back."""
    shards = [r.shard for r in returned.values() if r.shard.digest == digest]
    named = {worker_id for shard in shards for stage in shard.assignment.stages for worker_id in stage}
    return frozenset(named - returned.keys())


def plan_in_force(
    spec: ModelSpec, digest: str, config: PlannerConfig, returned: Mapping[WorkerId, Returned]
) -> Plan | None:
    """The plan that the returned served under, of its replicas those that are whole; None if there is none.

    Predictions in it mean nothing.
    """
    by_epoch: defaultdict[Epoch, dict[WorkerId, Returned]] = defaultdict(dict)
    for worker_id, held in returned.items():
        if held.shard.digest == digest:
            by_epoch[held.shard.epoch][worker_id] = held
    replicas = []
    for epoch, members in sorted(by_epoch.items()):
        try:
            replicas.append(_replica(spec, config, members))
        except MalformedMessage as exc:
            logger.info("shards not taken over epoch=%s reason=%s", epoch, exc)
    if not replicas:
        return None
    return Plan(
        spec=spec, objective=config.objective, replicas=tuple(replicas), spares=(), block_size=config.block_size
    )


def without_cache(plan: Plan, memory_bytes: Mapping[WorkerId, int]) -> Plan | None:
    """What is held when no replica of the plan serves any more: weights alone, the KV caches are freed.

    Replicas that by now lack the memory for theirs are left out; those that lack workers stay, to be mended.
    """

    def fits(replica: ReplicaPlan) -> bool:
        ranks = [rank for stage in replica.stages for rank in stage.ranks]
        return all(r.weight_bytes + r.kv_bytes <= memory_bytes.get(r.worker_id, r.memory_bytes) for r in ranks)

    replicas = tuple(_emptied(replica) for replica in plan.replicas if fits(replica))
    return replace(plan, replicas=replicas) if replicas else None


def _emptied(replica: ReplicaPlan) -> ReplicaPlan:
    stages = (
        replace(stage, ranks=tuple(replace(rank, kv_bytes=0) for rank in stage.ranks)) for stage in replica.stages
    )
    return replace(replica, stages=tuple(stages))


def _replica(spec: ModelSpec, config: PlannerConfig, members: Mapping[WorkerId, Returned]) -> ReplicaPlan:
    first = next(iter(members.values())).shard.assignment
    named = list(itertools.chain.from_iterable(first.stages))
    if len(set(named)) != len(named) or set(named) != members.keys():
        raise MalformedMessage(f"{len(members)} workers are back, {len(named)} served")
    stages: list[StagePlan] = []
    for stage_index, worker_ids in enumerate(first.stages):
        assignments = [members[w].shard.assignment for w in worker_ids]
        for rank, (worker_id, found) in enumerate(zip(worker_ids, assignments, strict=True)):
            _check_same_replica(spec, config, worker_id, found, first, (stage_index, rank))
        stages.append(_stage(spec, worker_ids, assignments, members))
    edges = [0, *(stage.layers.end for stage in stages)]
    if [stage.layers.start for stage in stages] != edges[:-1] or edges[-1] != spec.num_layers:
        raise MalformedMessage(f"stages that end at layers {edges[1:]} don't make up {spec.num_layers} layers")
    return ReplicaPlan(stages=tuple(stages), num_blocks=first.num_blocks, prediction=_UNKNOWN)


def _check_same_replica(
    spec: ModelSpec,
    config: PlannerConfig,
    worker_id: WorkerId,
    found: StageAssignment,
    first: StageAssignment,
    place: tuple[int, int],
) -> None:
    """All ranks must tell of one replica, of this model, under the settings of now."""
    if (found.stage_index, found.rank) != place or found.stages != first.stages:
        raise MalformedMessage(f"{worker_id} tells of another replica than its peers")
    shape = (found.num_layers, found.dtype, found.block_size, found.num_blocks)
    if shape != (spec.num_layers, spec.dtype, config.block_size, first.num_blocks):
        raise MalformedMessage(f"{worker_id} holds a shard of other settings: {shape}")


def _stage(
    spec: ModelSpec,
    worker_ids: Sequence[WorkerId],
    assignments: Sequence[StageAssignment],
    members: Mapping[WorkerId, Returned],
) -> StagePlan:
    layers = assignments[0].layers
    if any(found.layers != layers for found in assignments) or layers.end > spec.num_layers:
        raise MalformedMessage(f"ranks of one stage hold other layers than {layers.start} to {layers.end}")
    shares = [found.share for found in assignments]
    whole = (
        _are_whole((share.heads for share in shares), spec.num_heads)
        and _are_whole((share.mlp for share in shares), spec.intermediate_size)
        and _are_whole((share.expert_mlp for share in shares), spec.expert_intermediate_size)
        and _are_whole((share.vocab for share in shares), spec.vocab_size)
    )
    if not whole:
        raise MalformedMessage(f"the shares of layers {layers.start} to {layers.end} don't make up a whole")
    costs = model_costs(spec)
    ranks = []
    for worker_id, share in zip(worker_ids, shares, strict=True):
        weight_bytes, memory_bytes = costs.weight_bytes(layers, share), members[worker_id].memory_bytes
        num_positions = assignments[0].num_blocks * assignments[0].block_size
        kv_bytes = num_positions * costs.kv_bytes_per_token(len(layers), share)
        if weight_bytes + kv_bytes > memory_bytes:
            raise MalformedMessage(f"{worker_id} lends less than its shard takes")
        rank = RankPlan(
            worker_id=worker_id, share=share, weight_bytes=weight_bytes, kv_bytes=kv_bytes, memory_bytes=memory_bytes
        )
        ranks.append(rank)
    return StagePlan(layers=layers, ranks=tuple(ranks))


def _are_whole(spans: Iterable[Span], total: int) -> bool:
    """Consecutive, from 0 to the end."""
    end = 0
    for span in spans:
        if span.start != end:
            return False
        end = span.end
    return end == total
