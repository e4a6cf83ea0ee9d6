"""What a chain of stages would reach: step times, KV capacity and the value that the objective minimises."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from skynet.coordinator.planner.allot import INFINITY, allot, allot_evenly
from skynet.coordinator.planner.config import Objective
from skynet.coordinator.planner.groups import Group, Variant
from skynet.coordinator.planner.model import Prediction
from skynet.coordinator.planner.swarm import StepKind, Swarm

_PARTS_OF_THE_WAY = (1.0, 0.75, 0.5, 0.25)  # from the best allotment of layers to the most level one

Arrangement = tuple[tuple[int, ...], ...]  # groups of worker indices in pipeline order


class Placed(NamedTuple):
    """One stage: who, with which shares, which layers."""

    variant: Variant
    start: int
    end: int


class Chain(NamedTuple):
    """One complete replica with its value by the objective: the smaller, the better."""

    stages: tuple[Placed, ...]
    value: float
    num_blocks: int
    prediction: Prediction

    @property
    def arrangement(self) -> Arrangement:
        return tuple(stage.variant.group.members for stage in self.stages)

    @property
    def num_workers(self) -> int:
        return sum(len(stage.variant.group.members) for stage in self.stages)


def are_joined(stages: Sequence[Placed]) -> bool:
    """Whether all who must talk to each other can."""
    groups = [stage.variant.group for stage in stages]
    hops = (b.hop_cost(a) for a, b in itertools.pairwise(groups))
    return all(group.is_joined for group in groups) and all(hop < INFINITY for hop in hops)


def stage_s(swarm: Swarm, stage: Placed, kind: StepKind) -> float:
    """Time of one step in one stage, hops apart."""
    times = stage.variant.step(kind)
    dense, moe = swarm.costs.count(stage.start, stage.end)
    total = dense * times.dense_s + moe * times.moe_s
    total += times.first_s if stage.start == 0 else 0.0
    return total + (times.last_s if stage.end == swarm.spec.num_layers else 0.0)


def hops_s(swarm: Swarm, stages: Sequence[Placed], tokens: int) -> float:
    """All hand-overs of one step, the sampled token's way back included."""
    groups = [stage.variant.group.members for stage in stages]
    forward = sum(swarm.hop_s(a, b, tokens) for a, b in itertools.pairwise(groups))
    return forward + swarm.return_s(groups[0], groups[-1])


def step_s(swarm: Swarm, stages: Sequence[Placed], kind: StepKind) -> float:
    """One step through the whole replica."""
    return sum(stage_s(swarm, stage, kind) for stage in stages) + hops_s(swarm, stages, kind.tokens)


def predict(swarm: Swarm, stages: Sequence[Placed], num_blocks: int) -> Prediction:
    """Speeds of a replica. Busy, its steps have a whole batch, or as many sequences as its KV blocks hold."""
    config = swarm.config
    room = num_blocks * config.block_size // (config.prompt_tokens + config.answer_tokens)
    sequences = max(1, min(room, config.batch))
    busy = StepKind(sequences, sequences, swarm.batch.context)
    return Prediction(
        prefill_tokens_per_s=config.prompt_tokens / step_s(swarm, stages, swarm.prefill),
        decode_tokens_per_s=1 / step_s(swarm, stages, swarm.decode),
        batch_tokens_per_s=sequences / step_s(swarm, stages, busy),
        sequences=sequences,
    )


def kv_blocks(swarm: Swarm, stages: Sequence[Placed]) -> int:
    """KV blocks that every rank can hold: the minimum, and a part of what its weights leave free beyond that."""
    blocks = swarm.max_blocks if swarm.config.objective is not Objective.MEMORY else swarm.min_blocks
    for stage in stages:
        for member, weights, block_bytes in rank_bytes(swarm, stage):
            if block_bytes:
                spare = swarm.memory[member] - weights - swarm.min_blocks * block_bytes
                blocks = min(blocks, swarm.min_blocks + int(spare * swarm.config.kv_share) // block_bytes)
    return blocks


def rank_bytes(swarm: Swarm, stage: Placed) -> list[tuple[int, int, int]]:
    """(worker, weight bytes, bytes per KV block) of each rank."""
    variant, num_layers = stage.variant, stage.end - stage.start
    dense, moe = swarm.costs.count(stage.start, stage.end)
    is_first, is_last = stage.start == 0, stage.end == swarm.spec.num_layers
    found = []
    for r, member in enumerate(variant.group.members):
        weights = dense * variant.dense_bytes[r] + moe * variant.moe_bytes[r]
        weights += is_first * variant.first_bytes[r] + is_last * variant.last_bytes[r]
        weights -= (is_first and is_last) * variant.tied_bytes[r]
        found.append((member, weights, num_layers * variant.kv_token_bytes[r] * swarm.config.block_size))
    return found


def finish(swarm: Swarm, stages: tuple[Placed, ...], num_blocks: int | None = None) -> Chain:
    """Score stages that fit."""
    blocks = kv_blocks(swarm, stages) if num_blocks is None else num_blocks
    prediction = predict(swarm, stages, blocks)
    config = swarm.config
    prompt_s = config.prompt_tokens / prediction.prefill_tokens_per_s
    token_s = 1 / prediction.decode_tokens_per_s + prompt_s / config.answer_tokens
    match config.objective:
        case Objective.LATENCY:
            value = token_s
        case Objective.THROUGHPUT:
            value = 1 / prediction.batch_tokens_per_s
        case Objective.MEMORY:
            held = [weights + blocks * block for stage in stages for _, weights, block in rank_bytes(swarm, stage)]
            value = sum(held) + token_s
    return Chain(stages, value, blocks, prediction)


def evaluate(swarm: Swarm, arrangement: Arrangement, may_skip: bool = True) -> Chain | None:
    """The best allotment of layers to these groups in this order, or None if they lack room.

    With `may_skip` groups that don't help are left out.
    """
    groups = [swarm.group(members) for members in arrangement]
    best: Chain | None = None
    if not all(group.is_joined for group in groups):
        return None
    for kv_tokens in swarm.kv_targets:
        chain = _allotted(swarm, groups, kv_tokens, may_skip)
        if chain is not None and (best is None or chain.value < best.value):
            best = chain
        if best is not None and best.prediction.sequences >= swarm.config.batch:
            break  # less cache can't make it faster
    return best


def _allotted(swarm: Swarm, groups: list[Group], kv_tokens: int, may_skip: bool) -> Chain | None:
    """The best allotment in which every rank has room for so many positions."""
    while True:
        entry = [0.0, *(b.hop_cost(a) for a, b in itertools.pairwise(groups))]
        columns = [group.options(kv_tokens) for group in groups]
        swarm.work += swarm.spec.num_layers * sum(map(len, columns))
        allotted = allot(columns, entry, may_skip)
        if allotted is None:
            return None
        if len(allotted) == len(groups):
            break
        groups = [groups[part.position] for part in allotted]  # hops changed: allot once more
    if max(entry) == INFINITY:
        return None
    stages = tuple(Placed(groups[p.position].variants[p.option], p.start, p.end) for p in allotted)
    return finish(swarm, stages)


def levelled(swarm: Swarm, chain: Chain, tolerance: float = 0.005) -> Chain:
    """The same groups with stages as level as `tolerance` of the value allows, which is next to nothing by default.

    Among like machines the sum of stage times hardly depends on who has how many layers, but even stages leave room
    for more KV blocks and let several sequences flow.
    """
    variants = [stage.variant for stage in chain.stages]
    options = [variant.option(swarm.min_tokens) for variant in variants]
    level = allot_evenly(options) if len(options) > 1 else None
    if level is None:
        return chain
    for part in _PARTS_OF_THE_WAY:
        edges = [
            round(had.start + part * (gets.start - had.start)) for had, gets in zip(chain.stages, level, strict=True)
        ]
        ends = [*edges[1:], swarm.spec.num_layers]
        stages = tuple(map(Placed, variants, edges, ends))
        if all(s.start < s.end and s.variant.fits(s.start, s.end) for s in stages):
            other = finish(swarm, stages)
            if other.value <= chain.value * (1 + tolerance):
                return other
    return chain
