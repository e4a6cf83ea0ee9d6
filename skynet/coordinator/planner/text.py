"""A plan in words: its reasons (or why there is none), a table for people and a dictionary for scripts."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from skynet.coordinator.planner.model import Plan, ReplicaPlan, Transition
from skynet.coordinator.planner.predict import Chain, hops_s, step_s
from skynet.coordinator.planner.swarm import Swarm
from skynet.errors import CapacityError
from skynet.protocol.plan import Span


def format_bytes(count: float) -> str:
    """Like "1.2 GiB"."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{int(count)} B"


def _time(seconds: float) -> str:
    return f"{seconds * 1000:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def explain(
    swarm: Swarm,
    chains: Sequence[Chain],
    replicas: Sequence[ReplicaPlan],
    change: Transition,
    loss: float,
    current: Plan | None,
    layout_is_met: bool,
) -> tuple[str, ...]:
    """Why this plan, one sentence each; the best one by value alone would be better by `loss` (relative)."""
    reasons = [_memory_reason(swarm, replicas)]
    for chain in chains[:3]:
        reasons += _chain_reasons(swarm, chain)
    if len(chains) > 3:
        reasons.append(f"{len(chains) - 3} more replicas are made the same way.")
    if not layout_is_met and swarm.config.layout is not None:
        wanted = swarm.config.layout
        got = ", ".join(replica.layout for replica in replicas)
        reasons.append(
            f"Layout {wanted} needs {wanted.num_workers} workers, there are {len(swarm.ids)}: {got} is nearest."
        )
    if loss > 0.0001:
        what = "moves fewer bytes or uses fewer workers"
        reasons.append(f"The best plan found would be {100 * loss:.1f}% better; this one {what}.")
    reasons += _change_reasons(change, current)
    return tuple(reasons)


def _memory_reason(swarm: Swarm, replicas: Sequence[ReplicaPlan]) -> str:
    used = sum(len(replica.worker_ids) for replica in replicas)
    copies = "one replica" if len(replicas) == 1 else f"{len(replicas)} replicas"
    need = format_bytes(swarm.replica_bytes)
    text = f"One replica takes at least {need} ({swarm.min_tokens} tokens of KV cache included); "
    spare = len(swarm.ids) - used
    rest = f", {spare} {'is a spare' if spare == 1 else 'are spares'}" if spare else ""
    return f"{text}{copies} on {used} of {len(swarm.ids)} workers{rest}."


def _chain_reasons(swarm: Swarm, chain: Chain) -> list[str]:
    token = step_s(swarm, chain.stages, swarm.decode)
    hops = hops_s(swarm, chain.stages, 1)
    num_stages = len(chain.stages)
    way = f"hand-overs between {num_stages} stages" if num_stages > 1 else "its way back to the coordinator"
    found = [f"A token takes {_time(token)}, of which {_time(hops)} are {way}."]
    for number, stage in enumerate(chain.stages[:4]):
        group = stage.variant.group
        if len(group.members) > 1:
            trips = f"{2 * (stage.end - stage.start)} exchanges of {_time(group.exchange_s(1))} per token"
            who = f"stage {number} shares each layer among {len(group.members)} workers"
            found.append(f"In it, {who}: {trips}, links of {_time(group.round_trip_s)}.")
    return found


def _change_reasons(change: Transition, current: Plan | None) -> list[str]:
    if current is None:
        return []
    if not change.moved_bytes:
        return ["Every worker keeps what it holds."]
    moving = sum(1 for worker in change.workers if worker.fetched_bytes)
    found = [f"{format_bytes(change.moved_bytes)} move to {moving} worker(s)."]
    if first := change.must_drop_first:
        names = ", ".join(first[:4]) + (" and others" if len(first) > 4 else "")
        found.append(f"{names} can't hold old and new shard at once: a pause of about {_time(change.pause_s)}.")
    return found


def no_room(swarm: Swarm, usable: list[int], sizes: tuple[int, ...] | None) -> CapacityError:
    """Why there is no plan: by how much memory falls short, in words and bytes."""
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


def _percent(part: Span, total: int) -> str:
    return f"{100 * len(part) / total:.0f}%" if total else "-"


def render_plan(plan: Plan) -> str:
    """A table: one line per worker, one block per replica, reasons below."""
    lines: list[str] = []
    for number, replica in enumerate(plan.replicas):
        p = replica.prediction
        lines.append(
            f"replica {number}: layout {replica.layout} (ranks x stages);"
            f" prefill {p.prefill_tokens_per_s:.1f} tokens/s, decode {p.decode_tokens_per_s:.1f} tokens/s, "
            f"{p.batch_tokens_per_s:.1f} with {p.sequences} sequences, "
            f"KV for {replica.num_blocks * plan.block_size} tokens"
        )
        rows = [("stage", "layers", "rank", "worker", "heads", "mlp", "weights", "KV cache", "lent")]
        for index, stage in enumerate(replica.stages):
            for rank_index, rank in enumerate(stage.ranks):
                mlp = rank.share.mlp if plan.spec.intermediate_size else rank.share.expert_mlp
                columns = plan.spec.intermediate_size or plan.spec.expert_intermediate_size
                rows.append(
                    (
                        str(index),
                        f"{stage.layers.start}-{stage.layers.end - 1}",
                        str(rank_index),
                        str(rank.worker_id),
                        str(len(rank.share.heads)),
                        _percent(mlp, columns),
                        format_bytes(rank.weight_bytes),
                        format_bytes(rank.kv_bytes),
                        format_bytes(rank.memory_bytes),
                    )
                )
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines += ["  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    if plan.spares:
        shown = ", ".join(plan.spares[:8]) + (f" and {len(plan.spares) - 8} more" if len(plan.spares) > 8 else "")
        lines.append(f"spares: {shown}")
    if plan.estimated_links:
        lines.append(f"estimated links (to be probed): {len(plan.estimated_links)}")
    lines += [f"- {reason}" for reason in plan.reasons]
    return "\n".join(lines)


def plan_as_dict(plan: Plan) -> dict[str, Any]:
    """The plan as plain JSON values; bytes and tokens per second are numbers, spans are [start, end)."""
    return {
        "objective": plan.objective.value,
        "layout": str(plan.layout) if plan.layout else None,
        "layout_is_met": plan.layout_is_met,
        "block_size": plan.block_size,
        "replicas": [_replica_as_dict(replica) for replica in plan.replicas],
        "spares": list(plan.spares),
        "batch_tokens_per_s": plan.batch_tokens_per_s,
        "moved_bytes": plan.moved_bytes,
        "pause_s": plan.transition.pause_s,
        "estimated_links": [list(pair) for pair in plan.estimated_links],
        "reasons": list(plan.reasons),
    }


def _replica_as_dict(replica: ReplicaPlan) -> dict[str, Any]:
    prediction = replica.prediction
    return {
        "layout": replica.layout,
        "num_blocks": replica.num_blocks,
        "prefill_tokens_per_s": prediction.prefill_tokens_per_s,
        "decode_tokens_per_s": prediction.decode_tokens_per_s,
        "batch_tokens_per_s": prediction.batch_tokens_per_s,
        "sequences": prediction.sequences,
        "stages": [
            {
                "layers": [stage.layers.start, stage.layers.end],
                "ranks": [
                    {
                        "worker": rank.worker_id,
                        "heads": [rank.share.heads.start, rank.share.heads.end],
                        "mlp": [rank.share.mlp.start, rank.share.mlp.end],
                        "expert_mlp": [rank.share.expert_mlp.start, rank.share.expert_mlp.end],
                        "vocab": [rank.share.vocab.start, rank.share.vocab.end],
                        "weight_bytes": rank.weight_bytes,
                        "kv_bytes": rank.kv_bytes,
                        "memory_bytes": rank.memory_bytes,
                    }
                    for rank in stage.ranks
                ],
            }
            for stage in replica.stages
        ],
    }
