"""The lease table: granted once, ended in time, freed in one place."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from skynet.coordinator.fleet import Fleet
from skynet.coordinator.leases import Lease, LeaseKind, LeaseTable
from skynet.errors import CapacityError, StepRejected
from skynet.protocol.ids import LeaseId, PeerId, WorkerId
from skynet.protocol.plan import Epoch

WORKER, OTHER = WorkerId("w.cpu"), WorkerId("v.cpu")
ALICE, BOB = PeerId("alice.x"), PeerId("bob.x")


def lease(
    name: str = "a",
    *,
    kind: LeaseKind = LeaseKind.TASK,
    holder: PeerId = ALICE,
    worker: WorkerId = WORKER,
    resources: Mapping[str, int] | None = None,
    n: int = 0,
    ends_at: float = 10.0,
) -> Lease:
    return Lease(
        lease_id=LeaseId(name),
        kind=kind,
        holder=holder,
        worker=worker,
        resources={"memory_bytes": 40} if resources is None else resources,
        epoch=Epoch(1, n),
        ends_at=ends_at,
    )


def table() -> LeaseTable:
    leases = LeaseTable()
    leases.lend(WORKER, {"memory_bytes": 100, "devices": 1})
    leases.lend(OTHER, {"memory_bytes": 100})
    return leases


@pytest.mark.parametrize("kind", LeaseKind)
def test_every_kind_is_granted_and_released(kind: LeaseKind) -> None:
    leases = table()
    granted = leases.grant(lease(kind=kind), now=0.0)
    assert leases.get(granted.lease_id) == granted
    assert leases.free(WORKER) == {"memory_bytes": 60, "devices": 1}
    assert leases.release(granted.lease_id, granted.epoch) == granted
    assert leases.release(granted.lease_id, granted.epoch) is None
    assert leases.free(WORKER) == {"memory_bytes": 100, "devices": 1}


def test_repeated_grant_changes_nothing() -> None:
    leases = table()
    first = leases.grant(lease(ends_at=10.0), now=0.0)
    leases.renew(first.kind, {WORKER: 50.0})
    assert leases.grant(lease(ends_at=10.0), now=2.0).ends_at == 50.0
    assert len(leases) == 1


def test_newer_epoch_changes_a_lease_and_an_older_one_is_refused() -> None:
    leases = table()
    leases.grant(lease(n=1), now=0.0)
    changed = leases.grant(lease(n=2, resources={"memory_bytes": 90}), now=0.0)
    assert leases.free(WORKER)["memory_bytes"] == 10
    with pytest.raises(StepRejected, match="came late"):
        leases.grant(lease(n=1), now=0.0)
    with pytest.raises(StepRejected, match="came late"):
        leases.release(changed.lease_id, Epoch(1, 1))
    assert leases.get(changed.lease_id) == changed


def test_id_of_another_holder_is_not_taken_over() -> None:
    leases = table()
    leases.grant(lease(holder=ALICE), now=0.0)
    with pytest.raises(StepRejected, match="choose another id"):
        leases.grant(lease(holder=BOB, n=5), now=0.0)


def test_worker_lends_no_more_than_it_has() -> None:
    leases = table()
    leases.grant(lease("a", resources={"memory_bytes": 70}), now=0.0)
    with pytest.raises(CapacityError) as caught:
        leases.grant(lease("b", resources={"memory_bytes": 40}), now=0.0)
    assert caught.value.missing_bytes == 10
    with pytest.raises(CapacityError, match="gpu_slots"):
        leases.grant(lease("c", resources={"gpu_slots": 1}), now=0.0)
    assert len(leases) == 1


def test_lease_ends_and_frees_its_resources() -> None:
    leases = table()
    held = leases.grant(lease(ends_at=10.0), now=0.0)
    assert leases.expire(9.99) == ()
    assert leases.expire(10.0) == (held,)
    assert leases.expire(11.0) == ()
    assert leases.free(WORKER)["memory_bytes"] == 100


def test_signs_of_life_move_the_end_and_never_shorten() -> None:
    leases = table()
    stage = leases.grant(lease("a", kind=LeaseKind.STAGE, ends_at=10.0), now=0.0)
    elsewhere = leases.grant(lease("b", kind=LeaseKind.STAGE, worker=OTHER, ends_at=10.0), now=0.0)
    task = leases.grant(lease("c", ends_at=10.0), now=0.0)
    leases.renew(LeaseKind.STAGE, {WORKER: 20.0})
    leases.renew(LeaseKind.STAGE, {WORKER: 7.0})
    assert set(leases.expire(19.9)) == {elsewhere, task}
    assert [held.lease_id for held in leases.expire(20.0)] == [stage.lease_id]


def test_lease_that_has_ended_already_is_not_granted() -> None:
    with pytest.raises(StepRejected, match="ended"):
        table().grant(lease(ends_at=1.0), now=2.0)


def test_what_a_vanished_process_held_is_freed_in_one_place() -> None:
    leases = table()
    as_holder = leases.grant(lease("a", holder=PeerId(OTHER), worker=WORKER), now=0.0)
    as_worker = leases.grant(lease("b", holder=BOB, worker=OTHER), now=0.0)
    kept = leases.grant(lease("c", holder=BOB, worker=WORKER), now=0.0)
    assert set(leases.vanished(OTHER)) == {as_holder, as_worker}
    assert leases.export() == (kept,)
    assert leases.vanished(OTHER) == ()
    assert leases.free(OTHER) == {}


def test_a_lease_whose_worker_nobody_hears_of_is_freed() -> None:
    fleet = Fleet(leases=table())
    held = fleet.leases.grant(lease(kind=LeaseKind.STAGE, ends_at=10.0), now=0.0)
    fleet.renew({WORKER: 12.0}, now=10.0)
    assert fleet.leases.get(held.lease_id) is not None
    fleet.renew({OTHER: 30.0}, now=12.0)
    assert fleet.leases.free(WORKER)["memory_bytes"] == 100


class LeasesUnderFire(RuleBasedStateMachine):
    """Any order of commands keeps the invariant, and loses nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.leases = table()
        self.now = 0.0

    @rule(
        name=st.sampled_from("abcdef"),
        holder=st.sampled_from([ALICE, BOB]),
        worker=st.sampled_from([WORKER, OTHER]),
        amount=st.integers(0, 120),
        n=st.integers(0, 3),
        length=st.floats(0.1, 5.0),
    )
    def grant(self, name: str, holder: PeerId, worker: WorkerId, amount: int, n: int, length: float) -> None:
        wanted = lease(
            name, holder=holder, worker=worker, resources={"memory_bytes": amount}, n=n, ends_at=self.now + length
        )
        before = self.leases.get(wanted.lease_id)
        try:
            granted = self.leases.grant(wanted, self.now)
        except (StepRejected, CapacityError):
            assert self.leases.get(wanted.lease_id) == before
        else:
            assert self.leases.get(wanted.lease_id) == granted

    @rule(name=st.sampled_from("abcdef"), n=st.integers(0, 3))
    def release(self, name: str, n: int) -> None:
        held = self.leases.get(LeaseId(name))
        if held is not None and held.epoch <= Epoch(1, n):
            assert self.leases.release(LeaseId(name), Epoch(1, n)) == held

    @rule(passed=st.floats(0.0, 3.0))
    def expire(self, passed: float) -> None:
        self.now += passed
        assert all(freed.ends_at <= self.now for freed in self.leases.expire(self.now))
        assert all(held.ends_at > self.now for held in self.leases.export())

    @rule(holder=st.sampled_from([ALICE, BOB]))
    def vanish(self, holder: PeerId) -> None:
        held = tuple(lease for lease in self.leases.export() if lease.holder == holder)
        assert self.leases.vanished(holder) == held
        assert all(lease.holder != holder for lease in self.leases.export())

    @invariant()
    def never_overcommitted(self) -> None:
        for worker in (WORKER, OTHER):
            assert self.leases.free(worker)["memory_bytes"] >= 0


TestLeasesUnderFire = LeasesUnderFire.TestCase
