"""What serves, what is being made ready, and which sequences wait for one of them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from skynet.coordinator.leases import Lease, LeaseKind, LeaseTable
from skynet.coordinator.replica import Phase, Replica, ReplicaFault
from skynet.coordinator.scheduler import Sequence
from skynet.errors import CapacityError
from skynet.protocol.entrance import COORDINATOR
from skynet.protocol.ids import LeaseId, SequenceId, WorkerId
from skynet.protocol.plan import Epoch

logger = logging.getLogger(__name__)

NO_WORKER: Final = CapacityError("no worker has joined yet")


@dataclass(slots=True)
class Fleet:
    """A sequence is in exactly one place: the queue (no replica can run it) or a replica's scheduler."""

    replicas: list[Replica] = field(default_factory=list)  # in service, or broken and not yet replaced
    preparing: list[Replica] = field(default_factory=list)  # load, link or build caches
    queue: list[Sequence] = field(default_factory=list)
    leases: LeaseTable = field(default_factory=LeaseTable)
    shortage: CapacityError | None = NO_WORKER
    has_served: bool = False

    @property
    def all(self) -> list[Replica]:
        return [*self.replicas, *self.preparing]

    @property
    def serving(self) -> list[Replica]:
        return [r for r in self.replicas if r.phase is Phase.SERVING]

    @property
    def is_idle(self) -> bool:
        """Nothing is computed and nothing is made ready."""
        return not self.preparing and not any(r.scheduler.num_sequences for r in self.replicas)

    def find(self, epoch: Epoch, worker_id: WorkerId) -> Replica | None:
        """The replica of this epoch, if the worker is one of its own."""
        return next((r for r in self.all if r.epoch == epoch and worker_id in r.workers), None)

    def workers(self) -> frozenset[WorkerId]:
        """All that hold a part of a replica in service."""
        return frozenset[WorkerId]().union(*(r.workers for r in self.replicas))

    def lost(self, worker_id: WorkerId, reason: str, *, is_expected: bool = False) -> None:
        """Every replica with this worker breaks, and what the worker was lent for is free."""
        self.leases.vanished(worker_id)
        for replica in self.all:
            if worker_id in replica.workers:
                gone = frozenset({worker_id})
                text = f"{worker_id} is gone: {reason}"
                replica.fail(ReplicaFault(text, gone, is_loss=True, is_expected=is_expected))

    def drop(self, sequence_id: SequenceId) -> None:
        """Forget a sequence, wherever it is."""
        self.queue = [s for s in self.queue if s.sequence_id != sequence_id]
        for replica in self.replicas:
            replica.scheduler.cancel(sequence_id)

    def put_into_service(self, replica: Replica, now: float, lease_s: float) -> None:
        """From now on it takes sequences. A shard in service is a lease of its worker, like whatever else it may be."""
        for stage in replica.plan.stages:
            for rank in stage.ranks:
                lease = Lease(
                    lease_id=_lease_id(replica, rank.worker_id),
                    kind=LeaseKind.STAGE,
                    holder=COORDINATOR,
                    worker=rank.worker_id,
                    resources={"memory_bytes": rank.weight_bytes + rank.kv_bytes},
                    epoch=replica.epoch,
                    ends_at=now + lease_s,  # `renew` moves it
                )
                self.leases.grant(lease, now)
        self.replicas.append(replica)
        self.shortage, self.has_served = None, True

    def renew(self, ends_at: Mapping[WorkerId, float], now: float) -> None:
        """A shard in service is leased until its worker's membership ends. Leases that nobody renewed end."""
        self.leases.renew(LeaseKind.STAGE, ends_at)
        for lease in self.leases.expire(now):
            logger.info("lease ended lease=%s kind=%s worker=%s", lease.lease_id, lease.kind, lease.worker)

    def release(self, replica: Replica) -> None:
        """Forget a replica; its sequences go back to the queue with what they have."""
        if replica in self.replicas:
            self.replicas.remove(replica)
            self.queue.extend(replica.scheduler.evacuate())
            self.give_back(replica)
        replica.phase = Phase.BROKEN
        replica.wake.set()

    def release_broken(self) -> None:
        for replica in [r for r in self.replicas if r.phase is Phase.BROKEN]:
            self.release(replica)

    def give_back(self, replica: Replica) -> None:
        """Its workers are free of it."""
        for worker_id in replica.workers:
            self.leases.release(_lease_id(replica, worker_id), replica.epoch)
        replica.discard()

    def take_queue(self) -> Iterable[Sequence]:
        """Everything that waits; whoever takes it finds each a place, or puts it back."""
        waiting, self.queue = self.queue, []
        return waiting


def _lease_id(replica: Replica, worker_id: WorkerId) -> LeaseId:
    return LeaseId(f"stage-{replica.epoch}-{worker_id}")
