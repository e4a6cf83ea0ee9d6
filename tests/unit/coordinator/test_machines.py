"""Workers of one machine never promise more memory than it has, in whichever order they come, hold and go."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from skynet.coordinator.machines import held_bytes, lent_bytes
from skynet.coordinator.membership import Membership
from skynet.coordinator.planner import Plan, PlannerConfig, plan
from skynet.errors import CapacityError
from skynet.models.spec import ModelSpec
from skynet.protocol.ids import WorkerId
from skynet.protocol.messages import Join
from skynet.protocol.profile import PROCESS_OVERHEAD_BYTES, WorkerProfile

GIB = 1 << 30
MIB = 1 << 20
SPEC = ModelSpec(
    model_type="llama", num_layers=8, hidden_size=512, num_heads=8, num_kv_heads=8, head_size=64,
    intermediate_size=2048, vocab_size=4000, max_positions=2048, dtype="float32",
)  # fmt: skip


class Machine:
    """One with so much for workers, its members, and what a plan had them load."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.membership = Membership()
        self.held: dict[WorkerId, int] = {}
        self.plan: Plan | None = None

    def start(self, name: str, asked: int | None = None, host_id: str = "box") -> WorkerId:
        """A worker measures what is free and joins; with --memory it takes that. Without room it doesn't start."""
        free = self.total - sum(self.held.values()) - len(self.membership.members) * PROCESS_OVERHEAD_BYTES
        lends = min(asked or free, free) - PROCESS_OVERHEAD_BYTES
        if lends <= 0:
            return WorkerId(name)
        profile = WorkerProfile(
            device="cpu", device_name="test", threads=1, memory_bytes=lends,
            weight_bytes_per_s={"float32": 1e10}, matmul_flops_per_s={"float32": 1e11}, host_id=host_id,
            machine_bytes=free, shares_machine=asked is None,
        )  # fmt: skip
        join = Join(profile=profile, hosts=("127.0.0.1",), data_port=1, bulk_port=2, pid=1)
        self.membership.join(WorkerId(name), join, b"k" * 40, "127.0.0.1", 0.0)
        self.membership.work_linked(WorkerId(name))
        return WorkerId(name)

    def end(self, name: str) -> None:
        self.membership.remove(WorkerId(name))
        self.held.pop(WorkerId(name), None)

    def lent(self) -> dict[WorkerId, int]:
        return lent_bytes(self.membership, self.held)

    def load(self, config: PlannerConfig) -> None:
        """Have a plan made and carried out."""
        lent = self.lent()
        workers = {w: replace(p, memory_bytes=lent[w]) for w, p in self.membership.usable().items()}
        self.plan = plan(SPEC, workers, (), config, self.plan)
        self.held = held_bytes(self.plan.replicas)

    @property
    def processes(self) -> int:
        return len(self.membership.members) * PROCESS_OVERHEAD_BYTES


def test_one_alone_lends_all_there_is() -> None:
    machine = Machine(8 * GIB)
    machine.start("a")
    assert machine.lent() == {"a": 8 * GIB - PROCESS_OVERHEAD_BYTES}


def test_two_that_saw_the_same_free_memory_lend_half_each() -> None:
    machine = Machine(8 * GIB)
    machine.start("a")
    machine.membership.members[machine.start("b")].join = machine.membership.members[WorkerId("a")].join
    assert machine.lent() == dict.fromkeys("ab", 4 * GIB - PROCESS_OVERHEAD_BYTES)


def test_what_was_asked_for_comes_first() -> None:
    machine = Machine(8 * GIB)
    asked = machine.start("asked", asked=3 * GIB)
    machine.start("a")
    machine.start("b")
    assert machine.lent()[asked] == 3 * GIB - PROCESS_OVERHEAD_BYTES
    assert sum(machine.lent().values()) + machine.processes <= machine.total


def test_nobody_lends_less_than_it_holds_and_late_ones_get_the_rest() -> None:
    machine = Machine(8 * GIB)
    early = machine.start("early")
    machine.held[early] = 5 * GIB
    late = machine.start("late")
    assert machine.lent() == {early: 5 * GIB, late: 3 * GIB - 2 * PROCESS_OVERHEAD_BYTES}


def test_a_worker_that_starts_again_beside_a_loaded_one_gets_back_what_it_had() -> None:
    machine = Machine(8 * GIB)
    for name in "ab":
        machine.held[machine.start(name)] = 3 * GIB
    machine.end("a")
    machine.start("a")
    machine.end("b")  # and what it saw of the whole machine is remembered
    machine.start("b")
    assert sum(machine.lent().values()) + machine.processes >= machine.total - MIB


def test_what_one_that_drains_still_holds_is_not_lent_to_others() -> None:
    machine = Machine(8 * GIB)
    first, second = machine.start("first"), machine.start("second")
    machine.held[first] = 2 * GIB
    machine.membership.drain(first)
    assert machine.lent() == {first: 2 * GIB, second: 6 * GIB - 2 * PROCESS_OVERHEAD_BYTES}


def test_machines_that_differ_or_are_not_named_share_nothing() -> None:
    for hosts in (("box", "hut"), ("", "")):
        machine = Machine(8 * GIB)
        for name, host_id in zip("ab", hosts, strict=True):
            machine.start(name, host_id=host_id)
        said = {w: m.join.profile.memory_bytes for w, m in machine.membership.members.items()}
        assert machine.lent() == said


def test_a_worker_that_comes_back_with_less_memory_gets_a_smaller_cache() -> None:
    machine = Machine(1600 * MIB)
    machine.start("a")
    machine.load(PlannerConfig(min_context_tokens=64))
    before = machine.held[WorkerId("a")]
    machine.end("a")
    machine.start("a", asked=600 * MIB)
    machine.load(PlannerConfig(min_context_tokens=64))
    assert machine.held[WorkerId("a")] <= machine.lent()[WorkerId("a")] < before


EVENTS = st.lists(
    st.tuples(st.sampled_from("abcd"), st.sampled_from(["start", "ask", "end", "drain", "load"])), max_size=12
)


@given(st.integers(1600, 3000), EVENTS)
@settings(max_examples=100, deadline=None)
def test_planned_bytes_of_one_machine_never_exceed_it(total_mib: int, events: list[tuple[str, str]]) -> None:
    machine = Machine(total_mib * MIB)
    config = PlannerConfig(min_context_tokens=64)
    asked: Mapping[str, int] = {"a": 600 * MIB, "b": 400 * MIB}
    for name, event in [("a", "start"), *events, ("z", "load")]:
        if event in ("start", "ask") and name not in machine.membership.members:
            machine.start(name, asked.get(name) if event == "ask" else None)
        elif event == "end":
            machine.end(name)
        elif event == "drain" and name in machine.membership.members:
            machine.membership.drain(WorkerId(name))
        elif event == "load" and machine.membership.usable():
            before, held = machine.lent(), dict(machine.held)
            with contextlib.suppress(CapacityError):
                machine.load(config)
            at_once = {w: max(machine.held.get(w, 0), held.get(w, 0)) for w in before}
            assert all(at_once[w] <= before[w] for w in before)
        lent, held = machine.lent(), machine.held
        assert all(held.get(w, 0) <= some for w, some in lent.items())
        asking = [m for m in machine.membership.members.values() if not m.join.profile.shares_machine]
        spare = sum(m.join.profile.memory_bytes - held.get(m.worker_id, 0) for m in asking)
        assert sum(lent.values()) + machine.processes <= machine.total + spare, (lent, held)
        if not asking:
            assert sum(lent.values()) + machine.processes <= machine.total
