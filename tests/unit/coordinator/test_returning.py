"""What returning workers say they hold: taken over if it makes a whole, and left alone if anything about it is odd."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from skynet.coordinator.planner import Layout, Plan, PlannerConfig, plan
from skynet.coordinator.returning import Returned, absent, plan_in_force, without_cache
from skynet.models.spec import ModelSpec
from skynet.protocol.ids import WorkerId
from skynet.protocol.messages import HeldShard
from skynet.protocol.plan import Epoch, LayerSpan, Span, StageAssignment
from skynet.protocol.profile import WorkerProfile

SPEC = ModelSpec(
    model_type="llama", num_layers=6, hidden_size=256, num_heads=8, num_kv_heads=4, head_size=32,
    intermediate_size=768, vocab_size=1000, max_positions=2048, dtype="float32",
)  # fmt: skip
DIGEST = "d" * 64
LENT = 1 << 30
CONFIG = PlannerConfig(layout=Layout(2, 2))
Shards = dict[WorkerId, Returned]


def profile() -> WorkerProfile:
    rates = {"float32": 1e10}
    return WorkerProfile(
        device="cpu", device_name="test", threads=1, memory_bytes=LENT, weight_bytes_per_s=rates,
        matmul_flops_per_s=rates, host_id="box",
    )  # fmt: skip


WORKERS = {WorkerId(name): profile() for name in "abcdef"}


def served(config: PlannerConfig = CONFIG) -> tuple[Plan, Shards]:
    """A plan, and what its workers tell after the coordinator that made it is gone."""
    made = plan(SPEC, {w: WORKERS[w] for w in list(WORKERS)[2:]}, (), config)
    shards: Shards = {}
    for n, replica in enumerate(made.replicas):
        for worker_id, assignment in made.replica_assignments(replica).items():
            held = HeldShard(epoch=Epoch(1, n), digest=DIGEST, assignment=assignment)
            shards[worker_id] = Returned(held, LENT)
    return made, shards


def taken_over(shards: Shards, config: PlannerConfig = CONFIG) -> Plan | None:
    return plan_in_force(SPEC, DIGEST, config, shards)


def test_plan_of_before_comes_out_of_what_its_workers_hold() -> None:
    made, shards = served()
    found = taken_over(shards)
    assert found is not None
    assert found.assignments() == made.assignments()
    assert [r.stages for r in found.replicas] == [r.stages for r in made.replicas]


def test_new_coordinator_plans_the_same_although_others_would_do_as_well() -> None:
    made, shards = served()
    found = taken_over(shards)
    assert found is not None
    again = plan(SPEC, WORKERS, (), CONFIG, without_cache(found, dict.fromkeys(WORKERS, LENT)))
    assert again.assignments() == made.assignments()
    assert again.moved_bytes == 0
    assert plan(SPEC, WORKERS, (), CONFIG).assignments() != made.assignments(), "else this shows nothing"


def test_two_replicas_come_back_and_one_that_lacks_a_worker_is_left_out() -> None:
    _, one = served()
    other = {
        WorkerId(f"{w}2"): replaced(
            r, epoch=Epoch(1, 9), stages=tuple(tuple(WorkerId(f"{x}2") for x in s) for s in r.shard.assignment.stages)
        )
        for w, r in one.items()
    }
    both = taken_over(one | other)
    assert both is not None
    assert len(both.replicas) == 2
    lost = next(iter(other))
    left = one | {w: r for w, r in other.items() if w != lost}
    assert absent(left, DIGEST) == {lost}
    found = taken_over(left)
    assert found is not None
    assert set(found.worker_ids) == one.keys()


def replaced(returned: Returned, epoch: Epoch | None = None, digest: str = DIGEST, **changes: object) -> Returned:
    shard = returned.shard
    assignment: StageAssignment = replace(shard.assignment, **changes)  # type: ignore[arg-type]
    return Returned(HeldShard(epoch=epoch or shard.epoch, digest=digest, assignment=assignment), returned.memory_bytes)


def other_share(returned: Returned) -> Returned:
    share = returned.shard.assignment.share
    return replaced(returned, share=replace(share, heads=Span(0, 8)))


ODD: dict[str, Callable[[Returned], Returned]] = {
    "another model": lambda r: replaced(r, digest="e" * 64),
    "another epoch": lambda r: replaced(r, epoch=Epoch(1, 7)),
    "another place": lambda r: replaced(r, rank=1 - r.shard.assignment.rank),
    "other peers": lambda r: replaced(r, stages=(r.shard.assignment.stages[1], r.shard.assignment.stages[0])),
    "the same peer twice": lambda r: replaced(r, stages=(r.shard.assignment.stages[0],) * 2),
    "other layers": lambda r: replaced(r, layers=LayerSpan(0, 5)),
    "layers that the model lacks": lambda r: replaced(r, layers=LayerSpan(0, 10**9)),
    "a larger model": lambda r: replaced(r, num_layers=60),
    "all heads": other_share,
    "another type": lambda r: replaced(r, dtype="bfloat16"),
    "other blocks": lambda r: replaced(r, block_size=32),
    "more blocks": lambda r: replaced(r, num_blocks=10**9),
    "less memory": lambda r: Returned(r.shard, 1 << 10),
}


@pytest.mark.parametrize("what", ODD)
def test_whoever_tells_of_something_odd_is_not_believed(what: str) -> None:
    _, shards = served()
    for worker_id in shards:
        assert taken_over(shards | {worker_id: ODD[what](shards[worker_id])}) is None


@pytest.mark.parametrize("what", ["more blocks", "layers that the model lacks", "a larger model", "all heads"])
def test_lies_that_all_workers_tell_alike_are_seen(what: str) -> None:
    _, shards = served()
    assert taken_over({w: ODD[what](r) for w, r in shards.items()}) is None


def test_replica_whose_cache_no_longer_fits_is_no_longer_held() -> None:
    made, shards = served()
    found = taken_over(shards)
    assert found is not None
    assert without_cache(found, dict.fromkeys(WORKERS, LENT)) is not None
    rank = made.replicas[0].stages[0].ranks[0]
    assert without_cache(found, {rank.worker_id: rank.weight_bytes + rank.kv_bytes - 1}) is None
