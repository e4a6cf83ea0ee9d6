"""What holds for every plan, over thousands of random swarms."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections import Counter

import pytest

from skynet.coordinator.planner import Layout, Objective, Plan, PlannerConfig, plan
from skynet.errors import CapacityError
from skynet.models.costs import model_costs
from skynet.models.fit import held_bytes
from skynet.models.spec import ModelSpec
from skynet.protocol.ids import WorkerId
from skynet.protocol.profile import LinkProfile, WorkerProfile

from .swarms import need_bytes, random_links, random_workers, small_spec, token_s
from .test_split import assert_held_once

Case = tuple[ModelSpec, dict[WorkerId, WorkerProfile], list[LinkProfile], PlannerConfig]


def random_case(seed: int, max_workers: int) -> Case:
    rng = random.Random(seed)
    spec = small_spec(rng)
    layout = None
    if rng.random() < 0.25:
        layout = Layout(rng.randint(1, 3), rng.randint(1, min(3, spec.num_layers)))
    config = PlannerConfig(
        objective=rng.choice(list(Objective)), layout=layout, min_context_tokens=rng.choice([64, 512, 2048])
    )
    tokens = min(config.min_context_tokens, spec.max_positions)
    workers = random_workers(rng, rng.randint(1, max_workers), need_bytes(spec, tokens))
    return spec, workers, random_links(rng, workers, rng.choice([0.0, 0.5, 1.0])), config


def assert_sound(case: Case, found: Plan) -> None:
    """Memory bound, every layer once per replica, every share once per group, every worker once."""
    spec, workers, _, config = case
    costs = model_costs(spec)
    assert found.replicas
    assert Counter([*found.worker_ids, *found.spares]) == Counter(list(workers)), "each worker once, or a spare"
    for replica in found.replicas:
        edges = [stage.layers for stage in replica.stages]
        assert edges[0].start == 0
        assert edges[-1].end == spec.num_layers
        assert all(a.end == b.start for a, b in itertools.pairwise(edges))
        tokens = replica.num_blocks * config.block_size
        assert tokens >= min(config.min_context_tokens, spec.max_positions)
        assert replica.prediction.decode_tokens_per_s > 0
        for stage in replica.stages:
            assert_held_once(spec, tuple(rank.share for rank in stage.ranks))
            for rank in stage.ranks:
                assert rank.weight_bytes == costs.weight_bytes(stage.layers, rank.share)
                assert rank.weight_bytes + rank.kv_bytes == held_bytes(costs, stage.layers, rank.share, tokens)
                assert rank.weight_bytes + rank.kv_bytes <= workers[rank.worker_id].memory_bytes
    assignments = found.assignments()
    assert set(assignments) == set(found.worker_ids)
    if config.layout is not None:
        _assert_in_layout(config.layout, len(workers), found)
    elif config.objective is not Objective.THROUGHPUT:
        assert len(found.replicas) == 1


def _assert_in_layout(layout: Layout, num_workers: int, found: Plan) -> None:
    assert found.layout_is_met == (num_workers >= layout.num_workers)
    for replica in found.replicas:
        sizes = [len(stage.ranks) for stage in replica.stages]
        assert len(sizes) == min(layout.pipeline, num_workers)
        assert sum(sizes) == min(num_workers, layout.num_workers)
        assert max(sizes) <= layout.tensor_parallel


def try_plan(case: Case, current: Plan | None = None) -> Plan | None:
    try:
        return plan(*case, current=current)
    except CapacityError as exc:
        if exc.missing_bytes <= 0:
            raise AssertionError("the error says by how much") from exc
        return None


def check_many(seeds: range, max_workers: int) -> None:
    feasible = 0
    for seed in seeds:
        case = random_case(seed, max_workers)
        found = try_plan(case)
        if found is not None:
            feasible += 1
            assert_sound(case, found)
    assert feasible > len(seeds) / 3, "the swarms are no test if most can't hold their model"


def test_plans_of_random_tiny_swarms_are_sound() -> None:
    check_many(range(1200), 2)
    check_many(range(2000, 2150), 3)


def test_plans_of_random_small_swarms_are_sound() -> None:
    check_many(range(10_000, 10_030), 7)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_plans_of_many_random_swarms_are_sound() -> None:
    check_many(range(20_000, 26_000), 4)
    check_many(range(90_000, 95_000), 3)
    check_many(range(30_000, 30_500), 12)


def test_the_order_of_the_input_makes_no_difference() -> None:
    for seed in range(40_000, 40_040):
        spec, workers, links, config = random_case(seed, 5)
        found = try_plan((spec, workers, links, config))
        rng = random.Random(seed)
        shuffled = dict(rng.sample(sorted(workers.items()), len(workers)))
        assert try_plan((spec, shuffled, rng.sample(links, len(links)), config)) == found


def test_a_kept_plan_moves_nothing_and_asking_again_changes_nothing() -> None:
    kept = 0
    for seed in range(50_000, 50_060):
        case = random_case(seed, 4)
        first = try_plan(case)
        if first is None:
            continue
        second = plan(*case, current=first)
        assert second.replicas == first.replicas
        assert second.moved_bytes == 0
        assert not second.transition.must_drop_first
        kept += 1
    assert kept > 20


def test_replanning_after_a_loss_or_a_join_is_sound_and_its_transition_adds_up() -> None:
    checked = 0
    for seed in range(60_000, 60_060):
        spec, workers, links, config = random_case(seed, 4)
        first = try_plan((spec, workers, links, config))
        if first is None:
            continue
        rng = random.Random(seed)
        lost = rng.choice(sorted(workers))
        left = {w: p for w, p in workers.items() if w != lost}
        if rng.random() < 0.5:
            left[WorkerId("new")] = workers[lost]
        second = try_plan((spec, left, links, config), first) if left else None
        if second is None:
            continue
        assert_sound((spec, left, links, config), second)
        by_worker = {worker.worker_id: worker for worker in second.transition.workers}
        for replica in second.replicas:
            for stage in replica.stages:
                for rank in stage.ranks:
                    change = by_worker[rank.worker_id]
                    assert change.kept_bytes + change.fetched_bytes == rank.weight_bytes
                    assert change.kept_bytes >= 0
                    assert change.fetched_bytes >= 0
                    assert change.peak_bytes >= rank.weight_bytes + rank.kv_bytes
        checked += 1
    assert checked > 20


def test_more_memory_and_faster_workers_never_make_the_best_plan_worse() -> None:
    """Up to the 3% within which fewer workers win."""
    for seed in range(70_000, 70_040):
        spec, workers, links, config = random_case(seed, 3)
        config = dataclasses.replace(config, objective=Objective.LATENCY, layout=None)
        before = try_plan((spec, workers, links, config))
        if before is None:
            continue
        richer = {
            w: dataclasses.replace(
                p,
                memory_bytes=p.memory_bytes * 2,
                weight_bytes_per_s={k: v * 1.5 for k, v in p.weight_bytes_per_s.items()},
            )
            for w, p in workers.items()
        }
        after = plan(spec, richer, links, config)
        assert token_s(after) <= token_s(before) * 1.04
