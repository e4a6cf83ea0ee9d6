"""What stands between now and service, in words for people: status and waiting clients are told the same."""

from __future__ import annotations

from skynet.coordinator.fleet import NO_WORKER, Fleet
from skynet.coordinator.membership import Member, Membership
from skynet.coordinator.replica import Replica
from skynet.protocol.ids import WorkerId


def why_waiting(fleet: Fleet, membership: Membership) -> str | None:
    """None: a replica serves, and nothing is short."""
    if not fleet.serving and fleet.preparing:
        return _getting_ready(fleet.preparing[-1], membership)
    num_usable = len(membership.usable())
    if fleet.shortage is NO_WORKER and num_usable:
        return f"{num_usable} worker{'s are' if num_usable > 1 else ' is'} there, a plan is being made"
    return None if fleet.shortage is None else str(fleet.shortage)


def _getting_ready(replica: Replica, membership: Membership) -> str:
    loading = [w for w in replica.workers if not replica.has_loaded(w)]
    if not loading:
        return "workers connect to each other" if len(replica.workers) > 1 else "a worker gets ready"
    reports = [m.loading for w in replica.workers if (m := membership.members.get(w)) is not None and m.loading]
    total = sum(report.bytes_total for report in reports)
    num = f"{len(loading)} of {len(replica.workers)} workers"
    if not total:
        return f"{num} load their layers"
    tenths = min(9, 10 * sum(report.bytes_done for report in reports) // total)  # a client is told of each
    return f"{num} load their layers ({10 * tenths}%)"


def state_of(member: Member, fleet: Fleet) -> str:
    """One word, or a few, about a worker."""
    worker_id = member.worker_id
    if member.unfit_reason is not None:
        return f"unfit: {member.unfit_reason}"
    if member.loading is not None and member.loading.bytes_total:
        return f"loading {100 * member.loading.bytes_done // member.loading.bytes_total}%"
    if member.state.name == "DRAINING":
        return "draining"
    if any(worker_id in replica.assignments for replica in fleet.replicas):
        return "serving"
    return _preparing_state(worker_id, fleet) or "spare"


def _preparing_state(worker_id: WorkerId, fleet: Fleet) -> str | None:
    replica = next((r for r in fleet.preparing if worker_id in r.workers), None)
    if replica is None:
        return None
    return "waiting for peers" if replica.has_loaded(worker_id) and len(replica.workers) > 1 else "preparing"
