"""What workers lend where several of them run on one machine. Pure.

A worker without --memory says what it could take if it were alone there. Two of them would promise the same bytes
twice, so together they get what the machine has, less what workers with --memory take and what each process takes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from skynet.coordinator.membership import Member, Membership
from skynet.coordinator.planner import ReplicaPlan
from skynet.protocol.ids import WorkerId
from skynet.protocol.profile import PROCESS_OVERHEAD_BYTES


def held_bytes(replicas: Iterable[ReplicaPlan]) -> dict[WorkerId, int]:
    """What each worker holds for one of these; it has room for the largest."""
    found: dict[WorkerId, int] = {}
    for rank in (rank for replica in replicas for stage in replica.stages for rank in stage.ranks):
        found[rank.worker_id] = max(found.get(rank.worker_id, 0), rank.weight_bytes + rank.kv_bytes)
    return found


def lent_bytes(membership: Membership, held: Mapping[WorkerId, int]) -> dict[WorkerId, int]:
    """What each member lends; those of a machine together never more than it has, but nobody less than it holds."""
    by_machine: defaultdict[str, list[Member]] = defaultdict(list)
    for member in membership.members.values():
        by_machine[member.machine].append(member)
    lent = {w: member.join.profile.memory_bytes for w, member in membership.members.items()}
    usable = membership.usable()
    for machine, members in by_machine.items():
        sharing = [m.worker_id for m in members if m.join.profile.shares_machine] if machine else []
        most = [lent[w] if w in usable else min(lent[w], held.get(w, 0)) for w in sharing]
        least = [min(some, held.get(w, 0)) for w, some in zip(sharing, most, strict=True)]
        taken = sum(lent[m.worker_id] for m in members if not m.join.profile.shares_machine)
        left = membership.machine_bytes.get(machine, 0) - len(members) * PROCESS_OVERHEAD_BYTES - taken
        lent |= zip(sharing, _shared_out(left, least, most), strict=True)
    return lent


def _shared_out(total: int, least: Sequence[int], most: Sequence[int]) -> list[int]:
    """Parts of a total, each within its bounds and apart from them equal; above the total only where `least` is."""

    def parts(level: int) -> list[int]:
        return [max(low, min(level, high)) for low, high in zip(least, most, strict=True)]

    low, high = 0, max(most, default=0)
    while low < high:
        level = (low + high + 1) // 2
        if sum(parts(level)) <= total:
            low = level
        else:
            high = level - 1
    return parts(low)
