"""The slow way to plan: every ordered partition, every allotment of layers, every share on a grid. For comparison.

It shares the predictor with the planner (the question is how good the search is), but not its layer allotment, its
shares or its choice of layouts.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from skynet.coordinator.planner.config import Objective
from skynet.coordinator.planner.groups import Group, Variant
from skynet.coordinator.planner.moves import ordered_partitions
from skynet.coordinator.planner.predict import Chain, Placed, finish
from skynet.coordinator.planner.swarm import Swarm
from skynet.models.split import column_unit, head_unit, spans
from skynet.protocol.plan import RankShare, Span


def compositions(total: int, parts: int, least: int = 0) -> Iterator[tuple[int, ...]]:
    """All ways to write `total` as a sum of `parts` numbers of at least `least`."""
    if parts == 1:
        if total >= least:
            yield (total,)
        return
    for first in range(least, total - least * (parts - 1) + 1):
        for rest in compositions(total - first, parts - 1, least):
            yield (first, *rest)


def grid_spans(total: int, parts: tuple[int, ...], largest_unit: int) -> tuple[Span, ...]:
    """Columns cut at multiples of a grid of sum(parts) cells."""
    unit = column_unit(total, len(parts), largest_unit)
    cells, units = sum(parts), -(-total // unit)
    edges = [round(units * edge / cells) for edge in itertools.accumulate(parts, initial=0)]
    return spans([b - a for a, b in itertools.pairwise(edges)], unit, total)


def share_grid(group: Group, cells: int) -> list[Variant]:
    """Every split of heads, times every split of the columns and rows on a grid of `cells`."""
    spec, ranks = group.swarm.spec, len(group.members)
    if ranks == 1:
        return group.variants
    unit = head_unit(spec, ranks)
    found = []
    for heads in compositions(spec.num_heads // unit, ranks):
        for parts in compositions(cells, ranks):
            head_spans = spans(heads, unit)
            mlp, vocab = grid_spans(spec.intermediate_size, parts, 32), grid_spans(spec.vocab_size, parts, 64)
            expert = grid_spans(spec.expert_intermediate_size, parts, 32)
            shares = tuple(
                RankShare(heads=head_spans[r], mlp=mlp[r], expert_mlp=expert[r], vocab=vocab[r]) for r in range(ranks)
            )
            found.append(group.variant(shares))
    return found


def best_rate(swarm: Swarm, cells: int = 8) -> float:
    """The most tokens per second of any replicas side by side, all busy; 0 if nothing fits. For three workers or so.

    Cache is shared by all stages, so that the shares of one can't be judged without the others': all are tried.
    """
    grids: dict[tuple[int, ...], list[Variant]] = {}

    def placed(members: tuple[int, ...], start: int, end: int) -> list[Placed]:
        if members not in grids:
            grids[members] = share_grid(swarm.group(members), cells)
        return [Placed(v, start, end) for v in grids[members] if v.fits(start, end)]

    rates: dict[frozenset[int], float] = {}
    for count in range(1, len(swarm.ids) + 1):
        for subset in itertools.combinations(range(len(swarm.ids)), count):
            for arrangement in ordered_partitions(swarm.canonical(subset), swarm.config.max_group_size):
                for counts in compositions(swarm.spec.num_layers, len(arrangement), 1):
                    edges = itertools.pairwise(itertools.accumulate(counts, initial=0))
                    choices = [placed(m, a, b) for m, (a, b) in zip(arrangement, edges, strict=True)]
                    for stages in itertools.product(*choices):
                        rate = finish(swarm, stages).prediction.batch_tokens_per_s
                        rates[frozenset(subset)] = max(rate, rates.get(frozenset(subset), 0.0))

    def most(free: frozenset[int]) -> float:
        return max((rate + most(free - used) for used, rate in rates.items() if used <= free), default=0.0)

    return most(frozenset(range(len(swarm.ids))))


def best_value(swarm: Swarm, cells: int = 8) -> float | None:
    """The least value of any single replica, None if nothing fits. Of any set of replicas for throughput."""
    if swarm.config.objective is Objective.THROUGHPUT:
        rate = best_rate(swarm, cells)
        return 1 / rate if rate else None
    best: Chain | None = None
    stage_cache: dict[tuple[tuple[int, ...], int, int], Placed | None] = {}
    grids: dict[tuple[int, ...], list[Variant]] = {}

    def stage(members: tuple[int, ...], start: int, end: int) -> Placed | None:
        """The best share of this stage; stages don't influence each other's shares."""
        key = (members, start, end)
        if key not in stage_cache:
            if members not in grids:
                grids[members] = share_grid(swarm.group(members), cells)
            fitting = [Placed(v, start, end) for v in grids[members] if v.fits(start, end)]
            stage_cache[key] = min(fitting, key=lambda p: _stage_cost(swarm, p), default=None)
        return stage_cache[key]

    for count in range(1, len(swarm.ids) + 1):
        for subset in itertools.combinations(range(len(swarm.ids)), count):
            for arrangement in ordered_partitions(swarm.canonical(subset), swarm.config.max_group_size):
                for counts in compositions(swarm.spec.num_layers, len(arrangement), 1):
                    edges = itertools.pairwise(itertools.accumulate(counts, initial=0))
                    stages = [stage(m, a, b) for m, (a, b) in zip(arrangement, edges, strict=True)]
                    if all(placed is not None for placed in stages):
                        chain = finish(swarm, tuple(p for p in stages if p is not None))
                        best = chain if best is None or chain.value < best.value else best
    return None if best is None else best.value


def _stage_cost(swarm: Swarm, placed: Placed) -> float:
    """What this stage adds to the value."""
    from skynet.coordinator.planner.predict import rank_bytes, stage_s

    time = stage_s(swarm, placed, swarm.decode) + stage_s(swarm, placed, swarm.prefill) / swarm.config.answer_tokens
    if swarm.config.objective is Objective.LATENCY:
        return time
    return time + sum(weights + swarm.min_blocks * block for _, weights, block in rank_bytes(swarm, placed))
