"""Uneven shares of a layer: who in a tensor-parallel group holds which heads, MLP columns and vocabulary rows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from skynet.models.spec import ModelSpec
from skynet.protocol.plan import RankShare, Span

_UNITS_PER_RANK = 16  # a coarser unit than this would round a rank's share by more than about 3%


def apportion(total: int, weights: Sequence[float], limits: Sequence[int] | None = None) -> list[int]:
    """Whole numbers that sum to `total`, in proportion to `weights`, by largest remainder; ties go to the lower rank.

    `limits` bounds each one; what a bounded rank can't take goes to the others by their weights. A rank of weight 0
    gets something only when the others are full. Raises ValueError if the limits can't hold `total`.
    """
    count = len(weights)
    room = [total] * count if limits is None else [min(max(limit, 0), total) for limit in limits]
    if total < 0 or not count or not all(0 <= weight < math.inf for weight in weights):
        raise ValueError(f"can't share {total} by weights {list(weights)}")
    if sum(room) < total:
        raise ValueError(f"{total} units don't fit limits {room}")
    taken = [0] * count
    while (left := total - sum(taken)) > 0:
        open_ranks = [r for r in range(count) if room[r] > taken[r]]
        weighted = [r for r in open_ranks if weights[r] > 0] or open_ranks
        scale = sum(weights[r] for r in weighted)
        ideal = {r: left * (weights[r] / scale if scale > 0 else 1 / len(weighted)) for r in weighted}
        given = {r: min(int(ideal[r] + 1e-9), room[r] - taken[r]) for r in weighted}
        rest = left - sum(given.values())
        for r in sorted(weighted, key=lambda r: (given[r] - ideal[r], r)):
            if rest > 0 and given[r] < room[r] - taken[r] and given[r] <= ideal[r]:
                given[r] += 1
                rest -= 1
        for r in weighted:
            taken[r] += given[r]
    return taken


def bounded_fractions(weights: Sequence[float], limits: Sequence[float]) -> list[float] | None:
    """Fractions that sum to 1, proportional to `weights` but none above its limit; None if the limits sum below 1."""
    if sum(max(limit, 0.0) for limit in limits) < 1:
        return None
    fractions = [0.0] * len(weights)
    bounded: set[int] = set()
    while True:
        free = [r for r in range(len(weights)) if r not in bounded]
        left = 1 - sum(fractions[r] for r in bounded)
        scale = sum(weights[r] for r in free)
        for r in free:
            fractions[r] = left * (weights[r] / scale if scale > 0 else 1 / len(free))
        over = [r for r in free if fractions[r] > max(limits[r], 0.0)]
        if not over:
            return fractions
        for r in over:
            fractions[r] = max(limits[r], 0.0)
        bounded.update(over)
        if len(bounded) == len(weights):  # rounding only: the limits sum to 1
            return fractions


def column_unit(total: int, ranks: int, largest: int = 32) -> int:
    """The widest power of two, up to `largest`, that leaves every rank some 16 units: kernels like whole tiles."""
    unit = largest
    while unit > 1 and total < unit * ranks * _UNITS_PER_RANK:
        unit //= 2
    return unit


def head_unit(spec: ModelSpec, ranks: int) -> int:
    """Query heads that move together: a KV group while there are enough of them, else one head."""
    return spec.group_size if ranks <= spec.num_kv_heads else 1


def spans(counts: Sequence[int], unit: int = 1, total: int | None = None) -> tuple[Span, ...]:
    """Consecutive spans of `counts` units each; the last unit may be short so that they end at `total`."""
    end = sum(counts) * unit if total is None else total
    edges = [min(edge * unit, end) for edge in itertools.accumulate(counts, initial=0)]
    return tuple(Span(a, b) for a, b in itertools.pairwise(edges))


def split_columns(total: int, weights: Sequence[float], largest_unit: int) -> tuple[Span, ...]:
    """Spans that hold each of `total` columns once, in multiples of a unit where there are many."""
    unit = column_unit(total, len(weights), largest_unit)
    return spans(apportion(-(-total // unit), weights), unit, total)


def split_group(spec: ModelSpec, weights: Sequence[float]) -> tuple[RankShare, ...]:
    """One share per rank, in proportion to `weights` (any positive scale: tokens/s, bytes/s).

    Every head, column and row is held exactly once; KV heads may be held by two neighbours when there are more ranks
    than KV heads. Each part is split on its own, since the group waits for its slowest rank after attention and again
    after the MLP. Raises ValueError for weights that are negative, infinite or absent.
    """
    ranks = len(weights)
    unit = head_unit(spec, ranks)
    heads = spans(apportion(spec.num_heads // unit, weights), unit)
    mlp = split_columns(spec.intermediate_size, weights, 32)
    expert_mlp = split_columns(spec.expert_intermediate_size, weights, 32)
    vocab = split_columns(spec.vocab_size, weights, 64)
    return tuple(RankShare(heads=heads[r], mlp=mlp[r], expert_mlp=expert_mlp[r], vocab=vocab[r]) for r in range(ranks))


def whole_share(spec: ModelSpec) -> RankShare:
    """The share of a group of one."""
    return split_group(spec, (1.0,))[0]
