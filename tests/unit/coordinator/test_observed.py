"""Step times against claims: lies are found out, busy machines are understood, and plans keep still meanwhile."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from skynet.coordinator.observed import MIN_STEPS, OFF, PAUSE_S, UNTIMED, Observations, Pace
from skynet.coordinator.planner import Layout, Plan, PlannerConfig, plan
from skynet.models.spec import ModelSpec
from skynet.protocol.ids import WorkerId
from skynet.protocol.profile import LinkProfile, WorkerProfile

SPEC = ModelSpec(
    model_type="llama", num_layers=12, hidden_size=1024, num_heads=16, num_kv_heads=8, head_size=64,
    intermediate_size=3072, vocab_size=4096, max_positions=2048, dtype="float32",
)  # fmt: skip
CONFIG = PlannerConfig(min_context_tokens=256)
A, B, C, LIAR = (WorkerId(name) for name in ("a", "b", "c", "liar"))
Claims = dict[WorkerId, WorkerProfile]


def profile(rate: float = 1e10, memory_bytes: int = 1 << 30, factor: float = 1.0) -> WorkerProfile:
    return WorkerProfile(
        device="cpu",
        device_name="test",
        threads=1,
        memory_bytes=memory_bytes,
        weight_bytes_per_s={"float32": rate * factor},
        matmul_flops_per_s={"float32": 40 * rate * factor},
        layer_overhead_s=0.0002 / factor,
        host_id="box",
    )


class World:
    """Plans by what is believed, runs by what is true, and lets the steps tell."""

    def __init__(self, claims: Claims, truth: Claims, links: tuple[LinkProfile, ...] = ()) -> None:
        self.claims, self.truth, self.links, self.config = claims, truth, links, CONFIG
        self.observations = Observations()
        self.now = 0.0
        self.plan: Plan | None = None
        self.pace = Pace()
        self.num_moves = -1
        self.replan()

    def replan(self) -> None:
        made = plan(SPEC, self.observations.corrected(self.claims), self.links, self.config, self.plan)
        if self.plan is None or made.assignments() != self.plan.assignments():
            self.num_moves += 1
            self.pace = Pace()
        self.plan = made

    def true_step_s(self) -> float:
        """What the present assignment takes with the true rates."""
        assert self.plan is not None
        pinned = replace(self.config, improvement_threshold=0.9, payback_s=1e-6)
        there = {w: self.truth[w] for w in self.plan.worker_ids}
        same = plan(SPEC, there, self.links, pinned, self.plan)
        assert same.assignments() == self.plan.assignments()
        return same.replicas[0].prediction.decode_step_s

    def run(self, num_steps: int, scatter: float = 0.0, load: float = 1.0, seed: int = 0) -> None:
        rng = random.Random(seed)
        for _ in range(num_steps):
            assert self.plan is not None
            took_s = self.true_step_s() * load * rng.uniform(1 - scatter, 1 + scatter)
            self.pace = self.pace.after(self.plan.replicas[0].prediction.decode_step_s, took_s)
            self.now += 1.0
            if self.pace.is_proven and not self.pace.is_off(self.now):
                self.observations.confirm(self.plan.worker_ids, self.claims)
            if self.pace.is_off(self.now):
                if self.observations.fold(self.plan.worker_ids, self.pace.ratio, self.claims):
                    self.pace = self.pace.corrected(self.now)
                    self.replan()
                else:
                    self.pace = self.pace.left_alone(self.now)


def test_claim_of_a_thousand_times_the_speed_does_not_attract_everything_for_ever() -> None:
    truth = {A: profile(), B: profile(), LIAR: profile(0.5e10)}
    world = World(truth | {LIAR: profile(factor=1000)}, truth)
    assert world.plan is not None
    assert LIAR in world.plan.worker_ids
    world.run(400)
    honest = plan(SPEC, {w: truth[w] for w in (A, B)}, (), CONFIG)
    assert world.true_step_s() <= 1.5 * honest.replicas[0].prediction.decode_step_s
    assert world.num_moves <= 4
    believed = world.observations.corrected(world.claims)[LIAR]
    assert believed.weight_bytes_per_s["float32"] < 2 * truth[LIAR].weight_bytes_per_s["float32"]


def test_liar_that_joins_those_who_are_known_is_blamed_and_they_are_not() -> None:
    """All share each layer, so a step alone doesn't tell who keeps the others waiting."""
    truth = {A: profile(), B: profile(), LIAR: profile(1e9)}
    world = World({A: truth[A], B: truth[B]}, truth)
    world.run(800)
    honest_s = world.true_step_s()
    world.claims = {**world.claims, LIAR: profile(1e9, factor=1000)}
    world.replan()
    assert world.plan is not None
    assert LIAR in world.plan.worker_ids
    world.run(400)
    assert world.true_step_s() <= 1.3 * honest_s
    assert world.num_moves <= 6


@pytest.mark.parametrize("load", [0.5, 1.0, 2.0, 5.0])
def test_busy_machine_moves_nothing_and_its_prediction_becomes_true(load: float) -> None:
    truth = {w: profile() for w in (A, B, C)}
    world = World(truth, truth)
    world.run(300, scatter=0.3, load=load)
    assert world.num_moves == 0
    assert world.plan is not None
    shown_s = world.plan.replicas[0].prediction.decode_step_s * world.pace.ratio
    assert shown_s == pytest.approx(world.true_step_s() * load, rel=0.25)


def test_load_that_comes_and_goes_does_not_make_plans_flap() -> None:
    truth = {w: profile(1e10 * speed) for w, speed in ((A, 1.0), (B, 0.95), (C, 0.9))}
    world = World(truth, truth)
    for turn in range(12):
        world.run(50, scatter=0.4, load=3.0 if turn % 2 else 1.0, seed=turn)
    assert world.num_moves <= 3


def test_like_worker_that_joins_on_a_busy_machine_takes_nothing_over() -> None:
    busy = profile(factor=1 / 3.5)
    world = World({A: profile()}, {A: busy})
    world.config = replace(CONFIG, layout=Layout(1, 1))
    world.run(200)
    world.claims[B], world.truth[B] = profile(), busy
    world.observations.joined(B, world.claims[B])
    world.replan()
    world.run(200)
    assert world.plan is not None
    assert world.plan.worker_ids == (A,)
    assert world.num_moves == 0


def test_worker_that_became_slow_loses_its_work_to_another() -> None:
    truth = {A: profile(2e10), B: profile()}
    far = LinkProfile(a=A, b=B, round_trip_s=0.05, bandwidth_bytes_per_s=1e7)
    world = World(dict(truth), truth, (far,))
    assert world.plan is not None
    assert world.plan.worker_ids == (A,)
    world.truth[A] = profile(1e9)
    world.run(200)
    assert world.plan.worker_ids == (B,)


def test_untimed_claims_are_capped_and_never_raised() -> None:
    claims = {A: profile(), B: profile(), LIAR: profile(factor=1000), C: profile(1e8)}
    believed = Observations().corrected(claims)
    assert believed[LIAR].weight_bytes_per_s["float32"] == UNTIMED * 1e10
    assert believed[LIAR].matmul_flops_per_s["float32"] == UNTIMED * 4e11
    assert {w: believed[w] for w in (A, B, C)} == {w: claims[w] for w in (A, B, C)}
    assert Observations().corrected({LIAR: claims[LIAR]}) == {LIAR: claims[LIAR]}


def test_fast_worker_is_capped_only_until_it_was_timed() -> None:
    claims = {A: profile(), B: profile(5e11)}
    world = World(claims, claims)
    world.run(200)
    believed = world.observations.corrected(claims)[B].weight_bytes_per_s["float32"]
    assert believed > 2 * UNTIMED * 1e10


def test_few_steps_say_nothing_and_small_errors_are_none() -> None:
    pace = Pace()
    for _ in range(MIN_STEPS - 1):
        pace = pace.after(1.0, 10.0)
    assert pace.ratio == 1.0
    assert not pace.is_off(0.0)
    pace = pace.after(1.0, 10.0)
    assert pace.ratio == pytest.approx(10.0)
    assert pace.is_off(0.0)
    again = pace.corrected(0.0)
    for _ in range(2 * MIN_STEPS):
        again = again.after(1.0, 10.0)
    assert not again.is_off(PAUSE_S - 0.1)
    assert again.is_off(PAUSE_S)
    fine = Pace()
    for _ in range(50):
        fine = fine.after(1.0, 0.95 * OFF)
    assert not fine.is_off(1e9)
