"""How far the planner's choice is from an exhaustive search over layouts, allotments and shares."""

from __future__ import annotations

import random
import statistics
from dataclasses import replace

import pytest

from skynet.coordinator.planner import Objective, PlannerConfig, plan
from skynet.coordinator.planner.swarm import Swarm
from skynet.errors import CapacityError

from .exhaustive import best_value
from .swarms import excess_over_copies, need_bytes, random_links, random_workers, small_spec, token_s, value

SINGLE = (Objective.LATENCY, Objective.MEMORY)  # one replica serves


def gap(
    seed: int, num_workers: int, exact_up_to: int, cells: int, objectives: tuple[Objective, ...] = SINGLE
) -> float | None:
    """Relative excess of the chosen plan's value over the least one; None where nothing fits."""
    rng = random.Random(seed)
    spec = small_spec(rng, max_layers=4 if num_workers > 3 else 6)
    config = PlannerConfig(objective=rng.choice(objectives), min_context_tokens=512, exact_up_to=exact_up_to)
    workers = random_workers(rng, num_workers, need_bytes(spec, 512))
    links = random_links(rng, workers)
    least = best_value(Swarm(spec, workers, links, config), cells)
    try:
        found = plan(spec, workers, links, config)
    except CapacityError:
        assert least is None, f"seed {seed}: a plan exists"
        return None
    if least is None:  # the planner's shares are finer than the grid
        return 0.0
    tie_breaker = token_s(found) if config.objective is Objective.MEMORY else 0.0
    return (value(found) + tie_breaker) / least - 1


def distribution(
    seeds: range, num_workers: int, exact_up_to: int, cells: int, objectives: tuple[Objective, ...] = SINGLE
) -> list[float]:
    found = [gap(seed, num_workers, exact_up_to, cells, objectives) for seed in seeds]
    gaps = sorted(g for g in found if g is not None)
    assert len(gaps) >= len(seeds) / 3
    return gaps


@pytest.mark.parametrize("exact_up_to", [4, 0], ids=["exact", "heuristic"])
def test_plans_of_small_swarms_are_within_five_percent_of_the_best(exact_up_to: int) -> None:
    gaps = distribution(range(40), 2, exact_up_to, 8) + distribution(range(100, 105), 3, exact_up_to, 5)
    assert statistics.median(gaps) <= 0.03
    assert statistics.quantiles(gaps, n=20)[-1] <= 0.05


@pytest.mark.parametrize("exact_up_to", [4, 0], ids=["exact", "heuristic"])
def test_plans_for_throughput_are_within_five_percent_of_the_best(exact_up_to: int) -> None:
    busy = (Objective.THROUGHPUT,)
    gaps = distribution(range(140), 2, exact_up_to, 8, busy) + distribution(range(1200, 1225), 3, exact_up_to, 4, busy)
    assert statistics.median(gaps) <= 0.01
    assert statistics.quantiles(gaps, n=20)[-1] <= 0.05
    assert max(gaps) <= 0.5


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_plans_of_more_small_swarms_are_within_five_percent_of_the_best() -> None:
    gaps = distribution(range(1000, 1300), 3, 4, 6) + distribution(range(2000, 2030), 4, 4, 4)
    assert statistics.quantiles(gaps, n=20)[-1] <= 0.05


@pytest.mark.parametrize("objective", list(Objective))
def test_construction_and_local_search_come_close_to_trying_every_layout(objective: Objective) -> None:
    """In four-worker swarms, with the exhaustive part of the planner switched off."""
    ratios = [r for r in (excess(seed, 4, objective) for seed in range(500, 525)) if r is not None]
    assert len(ratios) > 8
    assert statistics.median(ratios) <= 1.01
    assert sum(ratio > 1.05 for ratio in ratios) <= len(ratios) // 8


@pytest.mark.parametrize("objective", list(Objective))
def test_the_search_among_five_comes_close_to_trying_every_layout(objective: Objective) -> None:
    ratios = [r for r in (excess(seed, 5, objective) for seed in range(608, 616)) if r is not None]
    assert len(ratios) >= 4
    assert statistics.mean(ratios) <= 1.05
    assert max(ratios) <= 1.5


def test_a_layout_with_room_for_more_sequences_is_found_behind_quicker_ones_without() -> None:
    """Among six workers, three layouts that answer one sequence at a time have better step times than the best one."""
    ratio = excess(535, 6, Objective.THROUGHPUT)
    assert ratio is not None
    assert ratio <= 1.05


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("objective", list(Objective))
def test_the_search_comes_close_to_trying_every_layout_in_many_swarms(objective: Objective) -> None:
    found = [excess(seed, 5, objective) for seed in range(3000, 3150)]
    found += [excess(seed, 6, objective) for seed in range(4000, 4040)]
    ratios = [r for r in found if r is not None]
    assert statistics.mean(ratios) <= 1.05
    assert max(ratios) <= 1.5


@pytest.mark.parametrize("seed", [702, 703, 708])
def test_a_large_swarm_of_far_workers_serves_about_as_much_as_its_parts_would(seed: int) -> None:
    """25 copies of a swarm of four that holds one replica with all its memory, on links too slow for groups."""
    ratio = excess_over_copies(seed, 4, 25, Objective.THROUGHPUT)
    assert ratio is not None
    assert ratio <= 1.05


def excess(seed: int, num_workers: int, objective: Objective) -> float | None:
    """Value of the search's plan to that of the best layout, allotments and shares being the planner's in both."""
    rng = random.Random(seed)
    spec = small_spec(rng)
    config = PlannerConfig(objective=objective, min_context_tokens=512, exact_up_to=num_workers)
    workers = random_workers(rng, num_workers, need_bytes(spec, 512))
    links = random_links(rng, workers)
    try:
        exact = plan(spec, workers, links, config)
    except CapacityError:
        return None
    quick = plan(spec, workers, links, replace(config, exact_up_to=0))
    return value(quick) / value(exact)
