"""Who may be planned with: what a worker says of itself, and what others say of it."""

from __future__ import annotations

import pytest

from skynet.coordinator.membership import MAX_BLAMERS, Membership
from skynet.protocol.ids import WorkerId
from skynet.protocol.messages import Join
from skynet.protocol.profile import WorkerProfile

LIAR, ANN, BEN, CID = (WorkerId(letter * 26 + ".cpu") for letter in "labc")
JOIN = Join(
    profile=WorkerProfile(
        device="cpu", device_name="played", threads=1, memory_bytes=1 << 30,
        weight_bytes_per_s={"bfloat16": 1e9}, matmul_flops_per_s={"bfloat16": 1e11},
    ),
    hosts=("127.0.0.1",), data_port=1, bulk_port=2, pid=1,
)  # fmt: skip


@pytest.fixture
def swarm() -> Membership:
    membership = Membership()
    for worker_id in (LIAR, ANN, BEN, CID):
        membership.join(worker_id, JOIN, b"k" * 40, "127.0.0.1", 0.0)
        membership.work_linked(worker_id)
    return membership


def blame(swarm: Membership, accused: WorkerId, accuser: WorkerId) -> None:
    swarm.mark_unfit(accused, f"{accuser}: 7 bytes", 0.0, 30.0, accuser=accuser)


def unfit(swarm: Membership) -> set[WorkerId]:
    return swarm.members.keys() - swarm.usable().keys()


@pytest.mark.parametrize("second", [ANN, BEN])
def test_who_blames_twice_alone_is_the_suspect_and_the_blamed_are_fit_again(
    swarm: Membership, second: WorkerId
) -> None:
    blame(swarm, ANN, LIAR)
    assert unfit(swarm) == {ANN}
    for accused in (second, CID, BEN, ANN):
        blame(swarm, accused, LIAR)
        assert unfit(swarm) == {LIAR}
    assert swarm.members[ANN].num_unfit == 0


def test_another_worker_of_a_node_that_blamed_is_believed_no_more(swarm: Membership) -> None:
    other = WorkerId("l" * 26 + ".cpu-2")
    swarm.join(other, JOIN, b"k" * 40, "127.0.0.1", 0.0)
    swarm.work_linked(other)
    blame(swarm, ANN, LIAR)
    blame(swarm, BEN, other)
    assert unfit(swarm) == {other}


def test_whom_two_nodes_blame_is_not_planned_with_however_often_they_do(swarm: Membership) -> None:
    blame(swarm, LIAR, ANN)
    blame(swarm, LIAR, BEN)
    blame(swarm, LIAR, ANN)
    assert unfit(swarm) == {LIAR}
    assert swarm.members[LIAR].num_unfit == 3
    blame(swarm, CID, ANN)  # ANN was right the first time, but nobody else says this
    assert unfit(swarm) == {LIAR, ANN}


def test_a_reason_of_its_own_stays_when_blame_is_taken_back(swarm: Membership) -> None:
    blame(swarm, ANN, LIAR)
    swarm.mark_unfit(ANN, "disk full", 0.0, 30.0)
    blame(swarm, BEN, LIAR)
    assert unfit(swarm) == {ANN, LIAR}


def test_blame_of_a_worker_that_has_gone_counts_against_nobody_twice(swarm: Membership) -> None:
    blame(swarm, ANN, LIAR)
    swarm.remove(LIAR)
    blame(swarm, BEN, LIAR)
    assert unfit(swarm) == set()


def test_what_is_remembered_of_blame_is_bounded(swarm: Membership) -> None:
    for number in range(2 * MAX_BLAMERS):
        blame(swarm, ANN, WorkerId(f"{number:026}.cpu"))
    assert len(swarm.blamed) <= MAX_BLAMERS
