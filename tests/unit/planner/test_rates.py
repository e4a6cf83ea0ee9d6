"""Workers that measurements can't tell apart are treated alike."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skynet.coordinator.planner import Layout, Plan, PlannerConfig, plan
from skynet.coordinator.planner.rates import SCATTER, levelled_rates
from skynet.protocol.ids import WorkerId
from skynet.protocol.profile import WorkerProfile

from .swarms import Workers, worker
from .test_decisions import NEED, SPEC, links

CONFIG = PlannerConfig()


def measured(rates: dict[str, float], host_id: str = "") -> Workers:
    """Workers by name that can hold the model, with read rates in GB/s."""
    return {WorkerId(name): worker(2 * NEED, rate * 1e9, host_id=host_id) for name, rate in rates.items()}


def num_layers(found: Plan) -> list[int]:
    return [len(stage.layers) for stage in found.replicas[0].stages]


@pytest.mark.parametrize("stages", [2, 3])
def test_a_pinned_pipeline_of_machines_that_measured_almost_the_same_is_even(stages: int) -> None:
    rates = dict(zip("abc"[:stages], (33.0, 30.5, 31.9), strict=False))
    found = plan(SPEC, measured(rates), links("abc"[:stages], 0.001), replace(CONFIG, layout=Layout(1, stages)))
    assert max(num_layers(found)) - min(num_layers(found)) <= 1


def test_a_pinned_2x2_of_machines_that_measured_almost_the_same_is_even() -> None:
    workers = measured({"a": 33.0, "b": 30.5, "c": 31.9, "d": 29.5})
    (replica,) = plan(SPEC, workers, links("abcd", 0.0001), replace(CONFIG, layout=Layout(2, 2))).replicas
    assert [len(stage.layers) for stage in replica.stages] in ([6, 6], [5, 7], [7, 5])
    assert {len(rank.share.heads) for stage in replica.stages for rank in stage.ranks} == {8}


def test_workers_of_one_machine_are_alike_however_they_disturbed_each_other() -> None:
    workers = measured({"a": 25.0, "b": 35.0}, host_id="box")
    found = plan(SPEC, workers, [], replace(CONFIG, layout=Layout(1, 2)))
    assert num_layers(found) in ([6, 6], [5, 7], [7, 5])


def test_a_machine_that_is_twice_as_fast_still_gets_most_layers() -> None:
    found = plan(SPEC, measured({"a": 15.0, "b": 35.0}), links("ab", 0.001), replace(CONFIG, layout=Layout(1, 2)))
    by_worker = {stage.ranks[0].worker_id: len(stage.layers) for stage in found.replicas[0].stages}
    assert by_worker[WorkerId("b")] > 8


def test_measuring_again_changes_nothing_in_a_swarm_of_like_machines() -> None:
    rng, plans = random.Random(5), []
    for _ in range(8):
        rates = {name: 30 * rng.uniform(1, SCATTER) for name in "abcd"}
        (replica,) = plan(SPEC, measured(rates), links("abcd", 0.001), CONFIG).replicas
        plans.append([(stage.layers, stage.worker_ids) for stage in replica.stages])
    assert all(other == plans[0] for other in plans)


@given(rates=st.lists(st.floats(0, 1e12), max_size=12), hosts=st.lists(st.sampled_from(["", "a", "b"]), min_size=12))
def test_levelled_rates_stay_within_the_scatter_and_keep_the_order(rates: list[float], hosts: list[str]) -> None:
    alone = [worker(1) for _ in rates]
    found = levelled_rates(rates, alone)
    assert all(one / SCATTER * 0.999 <= other <= one * SCATTER * 1.001 for one, other in zip(rates, found, strict=True))
    order = sorted(range(len(rates)), key=lambda i: rates[i])
    assert all(found[a] <= found[b] for a, b in itertools.pairwise(order))
    profiles: list[WorkerProfile] = [replace(p, host_id=host) for p, host in zip(alone, hosts, strict=False)]
    backwards = levelled_rates(rates[::-1], profiles[::-1])
    assert backwards[::-1] == levelled_rates(rates, profiles)
