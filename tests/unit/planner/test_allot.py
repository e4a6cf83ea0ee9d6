"""Layer allotment against trying every allotment."""

from __future__ import annotations

import itertools
import random

import pytest

from skynet.coordinator.planner.allot import Allotted, Option, allot, allot_evenly


def random_option(rng: random.Random, num_layers: int) -> Option:
    """Costs differ by layer; what fits shrinks at the ends, as embedding and head take room."""
    prefix = [0.0, *itertools.accumulate(rng.uniform(0.5, 2) for _ in range(num_layers))]
    most = rng.randint(0, num_layers)
    first, last = rng.randint(0, most), rng.randint(0, most)
    return Option(
        prefix=prefix,
        low=[max(0, i - most) for i in range(num_layers + 1)],
        first_end=min(first, num_layers - 1),
        last_start=num_layers - min(last, num_layers - 1),
        fits_whole=first == last == num_layers,
        first_cost=rng.uniform(0, 1),
        last_cost=rng.uniform(0, 3),
        whole_cost=3.5,
    )


def fits(option: Option, start: int, end: int, num_layers: int) -> bool:
    if start == 0 and end == num_layers:
        return option.fits_whole
    if start == 0:
        return end <= option.first_end
    return start >= (option.last_start if end == num_layers else option.low[end])


def cost(option: Option, start: int, end: int, num_layers: int) -> float:
    own = option.prefix[end] - option.prefix[start]
    if start == 0 and end == num_layers:
        return own + option.whole_cost
    return own + option.first_cost * (start == 0) + option.last_cost * (end == num_layers)


def value(parts: list[Allotted], columns: list[list[Option]], entry: list[float], slowest: bool, layers: int) -> float:
    costs = [cost(columns[p.position][p.option], p.start, p.end, layers) for p in parts]
    return max(costs) if slowest else sum(costs) + sum(entry[p.position] for p in parts if p.start > 0)


def brute(columns: list[list[Option]], entry: list[float], slowest: bool, may_skip: bool, layers: int) -> float | None:
    """Every choice of groups, of cuts and of options."""
    best: float | None = None
    everyone = tuple(range(len(columns)))
    chosen_sets = [c for k in range(1, len(columns) + 1) for c in itertools.combinations(everyone, k)]
    for chosen in chosen_sets if may_skip else [everyone]:
        for cuts in itertools.combinations(range(1, layers), len(chosen) - 1):
            edges = [0, *cuts, layers]
            for options in itertools.product(*(range(len(columns[g])) for g in chosen)):
                parts = [
                    Allotted(g, o, edges[i], edges[i + 1]) for i, (g, o) in enumerate(zip(chosen, options, strict=True))
                ]
                if all(fits(columns[p.position][p.option], p.start, p.end, layers) for p in parts):
                    found = value(parts, columns, entry, slowest, layers)
                    best = found if best is None else min(best, found)
    return best


@pytest.mark.parametrize(("slowest", "may_skip"), [(False, True), (False, False), (True, False)])
def test_the_allotment_is_the_best_of_all(slowest: bool, may_skip: bool) -> None:
    feasible = 0
    for seed in range(600):
        rng = random.Random(seed)
        layers, groups = rng.randint(1, 7), rng.randint(1, 4)
        most_options = 1 if slowest else 2
        columns = [[random_option(rng, layers) for _ in range(rng.randint(1, most_options))] for _ in range(groups)]
        entry = [rng.uniform(0, 0.5) for _ in range(groups)]
        least = brute(columns, entry, slowest, may_skip, layers)
        parts = allot_evenly([only for (only,) in columns]) if slowest else allot(columns, entry, may_skip)
        assert (parts is None) == (least is None), seed
        if parts is None or least is None:
            continue
        feasible += 1
        assert [p.start for p in parts] == [0, *(p.end for p in parts[:-1])]
        assert all(fits(columns[p.position][p.option], p.start, p.end, layers) for p in parts)
        assert value(parts, columns, entry, slowest, layers) == pytest.approx(least), seed
    assert feasible > 60
