"""Every promise that a worker does something for someone, in one table. Pure: the time is an argument.

A lease lasts until its end, which its worker's signs of life may move; one place frees what a vanished holder or
worker held. Commands are idempotent by (id, epoch): a repeated one changes nothing, one of an older epoch is refused.
Ids are text, for whoever grants to choose. Those of shards in service name the epoch: they don't outlive a restart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Final

from skynet.errors import CapacityError, StepRejected
from skynet.protocol.ids import LeaseId, PeerId, WorkerId
from skynet.protocol.plan import Epoch

MAX_LEASES: Final = 100_000


class LeaseKind(StrEnum):
    """What a worker lends itself for."""

    STAGE = "stage"  # layers of a replica
    DEVICE = "device"  # its raw device, to a remote program
    TRAINING = "training"  # adapters and their optimizer state
    TASK = "task"  # a process of somebody's


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """A promise with an end time."""

    lease_id: LeaseId
    kind: LeaseKind
    holder: PeerId  # for whom; the coordinator itself holds stages
    worker: WorkerId  # who does it
    resources: Mapping[str, int] = field(default_factory=dict, hash=False)  # "memory_bytes", "devices", ...: at least 0
    epoch: Epoch  # of the command that granted or last changed it
    ends_at: float  # of the clock that `now` comes from

    def __post_init__(self) -> None:
        if any(amount < 0 for amount in self.resources.values()):
            raise ValueError(f"lease {self.lease_id}: negative resources {dict(self.resources)}")


class LeaseTable:
    """All leases of one coordinator. Changed by its methods alone; a lease is in it until it is released or freed.

    Invariant: the resources leased on a worker never exceed what that worker lends.
    """

    def __init__(self) -> None:
        self._leases: dict[LeaseId, Lease] = {}
        self._capacity: dict[WorkerId, Mapping[str, int]] = {}

    def __len__(self) -> int:
        return len(self._leases)

    def get(self, lease_id: LeaseId) -> Lease | None:
        """None if it isn't held."""
        return self._leases.get(lease_id)

    def of_worker(self, worker: WorkerId) -> tuple[Lease, ...]:
        return tuple(lease for lease in self._leases.values() if lease.worker == worker)

    def lend(self, worker: WorkerId, capacity: Mapping[str, int]) -> None:
        """What this worker lends in all. Resources it doesn't name aren't lent."""
        self._capacity[worker] = dict(capacity)

    def free(self, worker: WorkerId) -> dict[str, int]:
        """What of it isn't leased. Negative where the worker lends less than it did when the leases were granted."""
        left = dict(self._capacity.get(worker, {}))
        for lease in self.of_worker(worker):
            for name, amount in lease.resources.items():
                left[name] = left.get(name, 0) - amount
        return left

    def grant(self, lease: Lease, now: float) -> Lease:
        """Add a lease, or change the one of this id to the state that a newer epoch wants; returns the one that holds.

        The same command again changes nothing. Raises StepRejected for an older epoch, or for an id that has another
        holder, worker or kind; CapacityError if the worker doesn't lend that much.
        """
        held = self._leases.get(lease.lease_id)
        if held is not None:
            if (held.holder, held.worker, held.kind) != (lease.holder, lease.worker, lease.kind):
                raise StepRejected(
                    f"lease {lease.lease_id}: is a {held.kind} of {held.holder} on {held.worker}, not a {lease.kind} "
                    f"of {lease.holder} on {lease.worker}; choose another id"
                )
            if not _is_newer(lease.lease_id, lease.epoch, held.epoch):
                return held
        elif len(self._leases) >= MAX_LEASES:
            raise CapacityError(f"lease {lease.lease_id}: the table holds {MAX_LEASES} already; release some")
        if lease.ends_at <= now:
            raise StepRejected(f"lease {lease.lease_id}: would have ended {now - lease.ends_at:g} s ago")
        self._check_fits(lease, held)
        self._leases[lease.lease_id] = lease
        return lease

    def renew(self, kind: LeaseKind, ends_at: Mapping[WorkerId, float]) -> None:
        """Signs of life: leases of this kind last as long as their workers are sure to be there, never shorter."""
        for lease in self.export():
            if lease.kind is kind and ends_at.get(lease.worker, -math.inf) > lease.ends_at:
                self._leases[lease.lease_id] = replace(lease, ends_at=ends_at[lease.worker])

    def release(self, lease_id: LeaseId, epoch: Epoch) -> Lease | None:
        """Give a lease back; None if it was already. Raises StepRejected if a newer epoch has granted it since."""
        held = self._leases.get(lease_id)
        if held is None:
            return None
        if epoch < held.epoch:
            raise StepRejected(f"lease {lease_id}: is of epoch {held.epoch}, a release of {epoch} came late")
        return self._leases.pop(lease_id)

    def expire(self, now: float) -> tuple[Lease, ...]:
        """Free every lease whose end has come, and return them."""
        return self._free_all(lambda lease: lease.ends_at <= now)

    def vanished(self, peer: PeerId | WorkerId) -> tuple[Lease, ...]:
        """A process is gone: free what it held and what was promised on it, and return that. The one place for it."""
        self._capacity.pop(WorkerId(peer), None)
        return self._free_all(lambda lease: peer in (lease.holder, lease.worker))

    def export(self) -> tuple[Lease, ...]:
        """Everything, in the order of granting."""
        return tuple(self._leases.values())

    def _free_all(self, is_over: Callable[[Lease], bool]) -> tuple[Lease, ...]:
        freed = tuple(lease for lease in self._leases.values() if is_over(lease))
        for lease in freed:
            del self._leases[lease.lease_id]
        return freed

    def _check_fits(self, lease: Lease, held: Lease | None) -> None:
        left = self.free(lease.worker)
        for name, amount in lease.resources.items():
            available = left.get(name, 0) + (held.resources.get(name, 0) if held else 0)
            if amount > available:
                missing = amount - available
                raise CapacityError(
                    f"worker {lease.worker}: lease {lease.lease_id} asks for {name} {amount}, {max(available, 0)} free",
                    missing_bytes=missing if name.endswith("_bytes") else 0,
                )


def _is_newer(lease_id: LeaseId, epoch: Epoch, than: Epoch) -> bool:
    if epoch < than:
        raise StepRejected(f"lease {lease_id}: is of epoch {than}, a command of {epoch} came late")
    return epoch > than
