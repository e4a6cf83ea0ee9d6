"""A variant of a group as the layer allotment sees it: its costs by the objective, and which layers fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from skynet.coordinator.planner.allot import Option
from skynet.coordinator.planner.config import Objective

if TYPE_CHECKING:  # a variant makes its options
    from skynet.coordinator.planner.groups import Variant


def make_option(variant: Variant, kv_tokens: int) -> Option:
    """A variant's costs by the objective, and what fits beside a cache of so many positions."""
    swarm = variant.group.swarm
    num_layers, objective = swarm.spec.num_layers, swarm.config.objective
    match objective:
        case Objective.THROUGHPUT:
            dense, moe, first, last = variant.step(swarm.batch)
        case Objective.LATENCY | Objective.MEMORY:
            one, prompt = variant.step(swarm.decode), variant.step(swarm.prefill)
            dense, moe, first, last = (a + b / swarm.config.answer_tokens for a, b in zip(one, prompt, strict=True))
    whole = first + last
    if objective is Objective.MEMORY:  # bytes; the time is only there to decide between equals
        kv = sum(variant.kv_token_bytes) * swarm.min_tokens
        dense, moe = dense + sum(variant.dense_bytes) + kv, moe + sum(variant.moe_bytes) + kv
        first, last = first + sum(variant.first_bytes), last + sum(variant.last_bytes)
        whole = first + last - sum(variant.tied_bytes)
    before = swarm.costs.moe_before
    return Option(
        prefix=[(i - before[i]) * dense + before[i] * moe for i in range(num_layers + 1)],
        low=_low(variant, kv_tokens),
        first_end=_most_at_end(variant, kv_tokens, is_first=True),
        last_start=num_layers - _most_at_end(variant, kv_tokens, is_first=False),
        fits_whole=variant.fits(0, num_layers, kv_tokens),
        first_cost=first,
        last_cost=last,
        whole_cost=whole,
    )


def _low(variant: Variant, kv_tokens: int) -> list[int]:
    """For each end the first start such that the layers between fit as a middle stage."""
    swarm = variant.group.swarm
    num_layers = swarm.spec.num_layers
    if swarm.costs.moe_before[num_layers] in (0, num_layers):  # all layers alike
        most = _most_alike(variant, kv_tokens, [0] * len(variant.shares))
        return [max(0, i - most) for i in range(num_layers + 1)]
    low, start = [0], 0
    for end in range(1, num_layers + 1):
        while start < end and not variant.fits(max(start, 1), min(end, num_layers - 1), kv_tokens):
            start += 1
        low.append(start)
    return low


def _most_alike(variant: Variant, kv_tokens: int, extra_bytes: list[int]) -> int:
    """Most layers that fit beside `extra_bytes` per rank, in a model whose layers are all alike."""
    swarm = variant.group.swarm
    per_layer = variant.moe_bytes if swarm.spec.moe_layers else variant.dense_bytes
    return min(
        max(0, swarm.memory[member] - extra_bytes[r]) // (per_layer[r] + kv_tokens * variant.kv_token_bytes[r])
        for r, member in enumerate(variant.group.members)
    )


def _most_at_end(variant: Variant, kv_tokens: int, *, is_first: bool) -> int:
    """Most layers that fit in the first or the last stage of several."""
    swarm, num_layers = variant.group.swarm, variant.group.swarm.spec.num_layers
    if swarm.costs.moe_before[num_layers] in (0, num_layers):
        ends = variant.first_bytes if is_first else variant.last_bytes
        return min(num_layers - 1, _most_alike(variant, kv_tokens, ends))

    def holds(n: int) -> bool:
        return variant.fits(0, n, kv_tokens) if is_first else variant.fits(num_layers - n, num_layers, kv_tokens)

    return _largest(num_layers - 1, holds)


def _largest(upper: int, holds: Callable[[int], bool]) -> int:
    """The largest n in [0, upper] for which `holds`, given that it holds up to some number and 0 is free."""
    low = 0
    while low < upper:
        middle = (low + upper + 1) // 2
        if holds(middle):
            low = middle
        else:
            upper = middle - 1
    return low
