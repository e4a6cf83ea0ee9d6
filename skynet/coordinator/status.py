"""The status of a swarm as plain data: what `skynet status --json` prints."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import msgspec

from skynet.coordinator.fleet import Fleet
from skynet.coordinator.membership import Member, Membership
from skynet.coordinator.replica import Phase, Replica
from skynet.coordinator.waiting import state_of
from skynet.protocol.ids import WorkerId
from skynet.protocol.plan import StageAssignment

if TYPE_CHECKING:
    from skynet.coordinator.engine import Engine
    from skynet.coordinator.server import CoordinatorServer


def describe(server: CoordinatorServer, revision: int) -> dict[str, Any]:
    """Everything at once; sizes in bytes, times in the unit of their name."""
    engine, model = server.engine, server.model
    waits_for, shortage = engine.why_waiting, engine.shortage
    serving = [r for r in engine.replicas if r.phase is Phase.SERVING]
    lent = engine.lent_bytes()
    return {
        "revision": revision,
        "name": server.config.name,
        "fingerprint": server.swarm_key.fingerprint,
        "admission": str(server.gatekeeper.mode),
        "epoch": str(max((r.epoch for r in serving), default="")),
        "model": {
            "name": model.ref.name,
            "type": model.spec.model_type,
            "num_layers": model.spec.num_layers,
            "dtype": model.spec.dtype,
            "digest": model.ref.digest,
        },
        "shortage": waits_for,
        "missing_bytes": shortage.missing_bytes if shortage is not None and str(shortage) == waits_for else 0,
        "replicas": [_replica(r) for r in engine.replicas],
        "reasons": list(engine.plan.reasons) if engine.plan else [],
        "workers": [
            _worker(m, lent[worker_id], engine.fleet, server.membership)
            for worker_id, m in sorted(server.membership.members.items())
        ],
        "leases": [
            {"id": lease.lease_id, "kind": str(lease.kind), "holder": lease.holder, "worker": lease.worker}
            for lease in engine.leases.export()
        ],
        "num_requests": engine.num_requests,
        "num_queued": engine.num_queued,
    }


def profiles(engine: Engine) -> dict[str, Any]:
    """Workers and links as the engine plans with them, and what it plans for: for planning elsewhere."""
    planner = engine.config.planner
    workers, lent = engine.observations.corrected(engine.membership.usable()), engine.lent_bytes()
    return {
        "workers": {w: msgspec.to_builtins(replace(p, memory_bytes=lent[w])) for w, p in workers.items()},
        "links": [msgspec.to_builtins(link) for link in engine.survey.links()],
        "model": engine.model.ref.name,
        "dtype": engine.model.spec.dtype,
        "spec": msgspec.to_builtins(engine.model.spec),
        "objective": str(planner.objective),
        "layout": None if planner.layout is None else str(planner.layout),
        "min_context_tokens": planner.min_context_tokens,
    }


def _replica(replica: Replica) -> dict[str, Any]:
    stats = replica.scheduler.stats()
    return {
        "epoch": str(replica.epoch),
        "phase": replica.phase.name.lower(),
        "layout": replica.plan.layout,
        "stages": [
            {"layers": [stage.layers.start, stage.layers.end], "workers": list(stage.worker_ids)}
            for stage in replica.plan.stages
        ],
        "num_sequences": replica.scheduler.num_sequences,
        "num_free_blocks": stats.num_free_blocks,
        "num_preemptions": stats.num_preemptions,
        "tokens_done": replica.tokens_done,
        "tokens_per_s": replica.tokens_per_s,
        "predicted_decode_tokens_per_s": replica.plan.prediction.decode_tokens_per_s / replica.pace.ratio,
        "predicted_prefill_tokens_per_s": replica.plan.prediction.prefill_tokens_per_s / replica.pace.ratio,
        "measured_to_predicted": replica.pace.ratio,
        "relayed": sorted(map(list, replica.relayed)),
    }


def _worker(member: Member, lent_bytes: int, fleet: Fleet, membership: Membership) -> dict[str, Any]:
    replica = next((r for r in fleet.replicas if member.worker_id in r.assignments), None)
    assignment = replica.assignments[member.worker_id] if replica else None
    profile = member.join.profile
    loading = member.loading
    held = replica.sizes.get(member.worker_id, member) if replica else member  # not what is being made ready beside it
    return {
        "id": member.worker_id,
        "pid": member.join.pid,
        "device": profile.device,
        "device_name": profile.device_name,
        "threads": profile.threads,
        "memory_bytes": lent_bytes,
        "memory_used_bytes": member.memory_used_bytes,
        "weight_bytes": held.weight_bytes,
        "kv_bytes": held.kv_bytes,
        "layers": f"{assignment.layers.start}-{assignment.layers.end - 1}" if assignment else None,
        "share": _share(assignment) if assignment else None,
        "link_ms": _link_ms(member.worker_id, membership),
        "tokens_per_s": replica.tokens_per_s if replica else 0.0,
        "steps_done": member.steps_done,
        "bad_chunks": member.bad_chunks,
        "state": state_of(member, fleet),
        "loading": None
        if loading is None
        else {
            "bytes_done": loading.bytes_done,
            "bytes_total": loading.bytes_total,
            "bytes_by_source": loading.bytes_by_source,
        },
    }


def _share(assignment: StageAssignment) -> str:
    """Which rank, and its part of the heads."""
    heads = assignment.share.heads
    return f"rank {assignment.rank + 1}/{len(assignment.group)}, {len(heads)} heads"


def _link_ms(worker_id: WorkerId, membership: Membership) -> float | None:
    """The slowest measured round trip to a peer."""
    times = [link.round_trip_s for pair, link in membership.links.items() if worker_id in pair]
    return 1000 * max(times) if times else None
