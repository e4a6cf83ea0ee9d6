"""The workers of one planning problem with their rates and links, and what a group of them could do with a layer.

Times follow design section 7. Inside a group ranks wait for each other twice per layer, so a layer takes the slowest
rank's attention, the slowest rank's MLP, two exchanges and a fixed overhead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from skynet.coordinator.planner.allot import Option
from skynet.coordinator.planner.config import Objective, PlannerConfig
from skynet.coordinator.planner.links import LinkTable
from skynet.models.costs import model_costs
from skynet.models.fit import held_bytes, split_group_within
from skynet.models.spec import DTYPE_BYTES, ModelSpec
from skynet.models.split import split_group, whole_share
from skynet.protocol.ids import WorkerId
from skynet.protocol.plan import LayerSpan, RankShare
from skynet.protocol.profile import LinkProfile, WorkerProfile

_FULL_VARIANTS = 6  # in larger swarms uneven memory inside one group matters less than which groups there are
_FEW_TOKENS = 16  # up to here weights are read once and each token adds its operations; beyond, a matrix product


class StepKind(NamedTuple):
    """One forward pass: how many tokens, of how many sequences, at which average number of earlier positions."""

    tokens: int
    sequences: int
    context: int


class StepTimes(NamedTuple):
    """Seconds of one stage: per dense layer, per mixture layer, and what being first or last adds."""

    dense_s: float
    moe_s: float
    first_s: float
    last_s: float


def phase_s(read_bytes: float, flops_per_token: float, tokens: int, read_rate: float, flops_rate: float) -> float:
    """Time of one rank's matrices for a batch of tokens: reading them, then being short of operations."""
    few = read_bytes / read_rate + (min(tokens, _FEW_TOKENS) - 1) * flops_per_token / flops_rate
    return max(few, tokens * flops_per_token / flops_rate)


def known_rate(rates: Mapping[str, float], dtype: str) -> float:
    """The rate for a dtype; a worker that didn't measure it is taken to be as slow as in its slowest one."""
    return rates.get(dtype) or min(rates.values())


class Swarm:
    """Input of one call of the planner in indexed form; workers are numbered in the order of their ids."""

    def __init__(
        self,
        spec: ModelSpec,
        profiles: Mapping[WorkerId, WorkerProfile],
        links: Sequence[LinkProfile],
        config: PlannerConfig,
    ) -> None:
        self.spec, self.config = spec, config
        self.costs = model_costs(spec)
        self.ids = sorted(profiles)
        ordered = [profiles[worker_id] for worker_id in self.ids]
        self.memory = [profile.memory_bytes for profile in ordered]
        self.hosts = [profile.host_id for profile in ordered]
        self.read_rate = [known_rate(profile.weight_bytes_per_s, spec.dtype) for profile in ordered]
        self.flops_rate = [known_rate(profile.matmul_flops_per_s, spec.dtype) for profile in ordered]
        self.overhead_s = [profile.layer_overhead_s for profile in ordered]
        self.links = LinkTable(self.ids, profiles, links, config)
        self.element_bytes = DTYPE_BYTES[spec.dtype]
        min_tokens = min(config.min_context_tokens, spec.max_positions)
        self.min_blocks = -(-min_tokens // config.block_size)
        self.min_tokens = self.min_blocks * config.block_size
        self.max_blocks = max(self.min_blocks, config.max_context_tokens // config.block_size)
        prompt, answer = config.prompt_tokens, config.answer_tokens
        self.decode = StepKind(1, 1, prompt + answer // 2)
        self.prefill = StepKind(prompt, 1, prompt // 2)
        self.batch = StepKind(config.batch, config.batch, prompt + answer // 2)
        self.whole = whole_share(spec)
        everything = LayerSpan(0, spec.num_layers)
        self.replica_bytes = held_bytes(
            self.costs, everything, self.whole, self.min_tokens
        )  # the least one replica takes
        self.has_full_variants = len(self.ids) <= _FULL_VARIANTS
        self.is_large = len(self.ids) > config.thorough_up_to
        self.layer_flops = sum(self.costs.layer_flops(self.whole, bool(spec.moe_layers)))
        self.layer_read_bytes = sum(self.costs.layer_read_bytes(self.whole, bool(spec.moe_layers), 1))
        self.share_cache: dict[tuple[float, ...], tuple[RankShare, ...]] = {}
        self._groups: dict[tuple[int, ...], Group] = {}

    def group(self, members: tuple[int, ...]) -> Group:
        """The group of these workers, ranks in this order."""
        found = self._groups.get(members)
        if found is None:
            found = self._groups[members] = Group(self, members)
        return found

    def use_full_variants(self) -> None:
        """Memory is short: from now on work out every way in which groups could make room."""
        self.has_full_variants = True
        self._groups.clear()

    def knows_group(self, members: tuple[int, ...]) -> bool:
        """Whether the group's shares were worked out before."""
        return members in self._groups

    def canonical(self, members: Sequence[int]) -> tuple[int, ...]:
        """Members in rank order: fastest first."""
        return tuple(sorted(members, key=lambda m: (-self.read_rate[m], -self.memory[m], m)))

    def activation_bytes(self, tokens: int) -> int:
        return tokens * self.spec.hidden_size * self.element_bytes

    def hop_s(self, previous: tuple[int, ...], following: tuple[int, ...], tokens: int) -> float:
        """Handing hidden states to the next stage: the slowest of the pairs that `StageAssignment` lays down."""
        copies = -(-len(following) // len(previous))
        size, slowest = self.activation_bytes(tokens) * copies, 0.0
        for i, b in enumerate(following):
            link = self.links.between(previous[i % len(previous)], b)
            slowest = max(slowest, link.round_trip_s / 2 + size / link.bandwidth_bytes_per_s)
        return slowest

    def return_s(self, first: tuple[int, ...], last: tuple[int, ...]) -> float:
        """The sampled token's way back to the first stage, through the coordinator."""
        if first[0] == last[0]:
            return self.config.step_overhead_s
        return self.config.step_overhead_s + self.links.between(last[0], first[0]).round_trip_s / 2


@dataclass(slots=True)
class Variant:
    """One way to share a stage among a group's ranks; lists are per rank."""

    group: Group
    shares: tuple[RankShare, ...]
    dense_bytes: list[int]  # weights of one layer
    moe_bytes: list[int]
    kv_token_bytes: list[int]  # of one position in one layer
    first_bytes: list[int]
    last_bytes: list[int]
    tied_bytes: list[int]
    times: dict[StepKind, StepTimes] = field(default_factory=dict)
    option: Option | None = None  # for the layer allotment, made when first asked for

    def step(self, kind: StepKind) -> StepTimes:
        found = self.times.get(kind)
        if found is None:
            found = self.times[kind] = self.group.step_times(self.shares, kind)
        return found

    def fits(self, start: int, end: int) -> bool:
        """Whether every rank can hold these layers with the smallest KV cache."""
        swarm = self.group.swarm
        dense, moe = swarm.costs.count(start, end)
        is_first, is_last = start == 0, end == swarm.spec.num_layers
        tokens = swarm.min_tokens
        for r, member in enumerate(self.group.members):
            need = dense * self.dense_bytes[r] + moe * self.moe_bytes[r]
            need += (end - start) * tokens * self.kv_token_bytes[r]
            need += is_first * self.first_bytes[r] + is_last * self.last_bytes[r]
            if need - (is_first and is_last) * self.tied_bytes[r] > swarm.memory[member]:
                return False
        return True


class Group:
    """Workers that could share a stage, and the ways to do so."""

    def __init__(self, swarm: Swarm, members: tuple[int, ...]) -> None:
        self.swarm, self.members = swarm, members
        self._variants: dict[tuple[RankShare, ...], Variant] = {}
        links = [swarm.links.between(a, b) for i, a in enumerate(members) for b in members[:i]]
        self.round_trip_s = max((link.round_trip_s for link in links), default=0.0)
        self.bandwidth = min((link.bandwidth_bytes_per_s for link in links), default=float("inf"))
        self.read_rates = [swarm.read_rate[m] for m in members]
        if swarm.config.hosts_share_bandwidth:
            hosts = [swarm.hosts[m] for m in members]
            self.read_rates = [
                rate / (hosts.count(h) if h else 1) for rate, h in zip(self.read_rates, hosts, strict=True)
            ]

    @cached_property
    def pace_s(self) -> float:
        """Roughly what a layer costs here by the objective; without splitting anything, so for ranking only."""
        swarm, config = self.swarm, self.swarm.config
        read, flops = sum(self.read_rates), sum(swarm.flops_rate[m] for m in self.members)
        overhead = max(swarm.overhead_s[m] for m in self.members)

        def step(tokens: int) -> float:
            matrices = phase_s(swarm.layer_read_bytes, swarm.layer_flops, tokens, read, flops)
            return matrices + overhead + 2 * self.exchange_s(tokens)

        if config.objective is Objective.THROUGHPUT:
            return step(config.batch)
        return step(1) + step(config.prompt_tokens) / config.answer_tokens

    @cached_property
    def room(self) -> int:
        """Roughly the most layers it can hold."""
        lent = sum(self.swarm.memory[m] for m in self.members)
        return min(self.swarm.spec.num_layers, lent * self.swarm.spec.num_layers // self.swarm.replica_bytes)

    def exchange_s(self, tokens: int) -> float:
        """One all-reduce of hidden states: every rank to every other, or reduce-scatter and all-gather when large."""
        ranks = len(self.members)
        if ranks == 1:
            return 0.0
        trip = self.round_trip_s * self.swarm.config.exchange_round_trips
        copy_s = self.swarm.activation_bytes(tokens) / self.bandwidth
        return min(trip + (ranks - 1) * copy_s, 2 * trip + 2 * (ranks - 1) / ranks * copy_s)

    def step_times(self, shares: tuple[RankShare, ...], kind: StepKind) -> StepTimes:
        swarm, exchange = self.swarm, self.exchange_s(kind.tokens)
        overhead = max(swarm.overhead_s[m] for m in self.members)
        has_dense, has_moe = swarm.costs.count(0, swarm.spec.num_layers)
        dense = self._layer_s(shares, kind, False) + 2 * exchange + overhead if has_dense else 0.0
        moe = self._layer_s(shares, kind, True) + 2 * exchange + overhead if has_moe else 0.0
        head, head_row_bytes = 0.0, swarm.spec.hidden_size * swarm.element_bytes
        for r, member in enumerate(self.members):
            rows, flops = len(shares[r].vocab), 2.0 * swarm.spec.hidden_size
            rates = (self.read_rates[r], swarm.flops_rate[member])
            head = max(head, phase_s(rows * head_row_bytes, rows * flops, kind.sequences, *rates))
        # A split vocabulary costs one exchange after the embedding and one gather before sampling.
        return StepTimes(dense, moe, exchange, head + self.exchange_s(kind.sequences))

    def _layer_s(self, shares: tuple[RankShare, ...], kind: StepKind, is_moe: bool) -> float:
        swarm, attention, mlp = self.swarm, 0.0, 0.0
        for r, member in enumerate(self.members):
            share, rates = shares[r], (self.read_rates[r], swarm.flops_rate[member])
            read_attention, read_mlp = swarm.costs.layer_read_bytes(share, is_moe, kind.tokens)
            flops_attention, flops_mlp = swarm.costs.layer_flops(share, is_moe)
            kv_bytes = swarm.costs.kv_bytes_per_token(1, share) * kind.context * kind.sequences
            flops_attention += 4.0 * kind.context * len(share.heads) * swarm.spec.head_size
            attention = max(attention, phase_s(read_attention + kv_bytes, flops_attention, kind.tokens, *rates))
            mlp = max(mlp, phase_s(read_mlp, flops_mlp, kind.tokens, *rates))
        return attention + mlp

    def variant(self, shares: tuple[RankShare, ...]) -> Variant:
        """The group with these shares."""
        found = self._variants.get(shares)
        if found is None:
            found = self._variants[shares] = self._make_variant(shares)
        return found

    def _make_variant(self, shares: tuple[RankShare, ...]) -> Variant:
        costs, group_size = self.swarm.costs, self.swarm.spec.group_size
        kv_heads = [len(share.kv_heads(group_size)) for share in shares]
        pairs = list(zip(shares, kv_heads, strict=True))
        return Variant(
            self,
            shares,
            [costs.dense.bytes_of(share, kv) for share, kv in pairs],
            [costs.moe.bytes_of(share, kv) for share, kv in pairs],
            [costs.kv_bytes_per_token(1, share) for share in shares],
            [costs.embedding.bytes_of(share, 0) for share in shares],
            [costs.head.bytes_of(share, 0) for share in shares],
            [costs.tied.bytes_of(share, 0) for share in shares],
        )

    @cached_property
    def variants(self) -> list[Variant]:
        """By speed; then, where memory binds before all layers are held, shares that make room for more layers."""
        swarm, num_layers = self.swarm, self.swarm.spec.num_layers
        weights = tuple(rate / self.read_rates[0] for rate in self.read_rates)
        shares = swarm.share_cache.get(weights)
        if shares is None:
            shares = swarm.share_cache[weights] = split_group(swarm.spec, weights)
        found = [self.variant(shares)]
        if len(self.members) == 1 or found[0].fits(0, num_layers):
            return found
        for layers in self._targets(found[0]):
            limits = [swarm.memory[m] for m in self.members]
            within = split_group_within(swarm.costs, weights, limits, layers, swarm.min_tokens)
            if within is not None and within not in [v.shares for v in found]:
                found.append(self.variant(within))
        return found

    def _targets(self, by_speed: Variant) -> list[LayerSpan]:
        """Spans to make room for: the whole model, the most layers that fit, and half way there; at either end too."""
        swarm, num_layers = self.swarm, self.swarm.spec.num_layers
        layer_bytes = swarm.replica_bytes / num_layers
        most = min(num_layers, int(sum(swarm.memory[m] for m in self.members) / layer_bytes))
        reached = max((n for n in range(num_layers) if by_speed.fits(0, n + 1)), default=-1) + 1
        targets = [LayerSpan(0, num_layers)]
        if not swarm.has_full_variants:
            return [*targets, *([LayerSpan(1, most)] if reached < most - 1 < num_layers - 1 else [])]
        for count in sorted({most, most - 1, (most + reached + 1) // 2}, reverse=True):
            if reached < count < num_layers:
                targets += [LayerSpan(0, count), LayerSpan(num_layers - count, num_layers)]
                if count + 1 < num_layers:
                    targets.append(LayerSpan(1, 1 + count))
        return targets

    def options(self) -> list[Option]:
        """For `allot`, in the order of `variants`."""
        for variant in self.variants:
            if variant.option is None:
                variant.option = make_option(variant)
        return [variant.option for variant in self.variants if variant.option is not None]

    def hop_cost(self, previous: Group) -> float:
        """What entering this group from another costs by the objective."""
        swarm, config = self.swarm, self.swarm.config
        if config.objective is not Objective.LATENCY:
            return 0.0
        members = (previous.members, self.members)
        prefill_s = swarm.hop_s(*members, swarm.prefill.tokens)
        return swarm.hop_s(*members, 1) + prefill_s / config.answer_tokens


def make_option(variant: Variant) -> Option:
    """A variant's costs by the objective, and what fits."""
    swarm = variant.group.swarm
    num_layers, objective = swarm.spec.num_layers, swarm.config.objective
    match objective:
        case Objective.THROUGHPUT:
            times = variant.step(swarm.batch)
        case Objective.LATENCY | Objective.MEMORY:
            one, prompt = variant.step(swarm.decode), variant.step(swarm.prefill)
            times = StepTimes(*(a + b / swarm.config.answer_tokens for a, b in zip(one, prompt, strict=True)))
    dense, moe, first, last = times
    whole = first + last
    if objective is Objective.MEMORY:  # bytes; the time is only there to decide between equals
        kv = sum(variant.kv_token_bytes) * swarm.min_tokens
        dense, moe = dense + sum(variant.dense_bytes) + kv, moe + sum(variant.moe_bytes) + kv
        first, last = first + sum(variant.first_bytes), last + sum(variant.last_bytes)
        whole = first + last - sum(variant.tied_bytes)
    before = swarm.costs.moe_before
    return Option(
        prefix=[(i - before[i]) * dense + before[i] * moe for i in range(num_layers + 1)],
        low=_low(variant),
        first_end=_most_at_end(variant, is_first=True),
        last_start=num_layers - _most_at_end(variant, is_first=False),
        fits_whole=variant.fits(0, num_layers),
        first_cost=first,
        last_cost=last,
        whole_cost=whole,
    )


def _low(variant: Variant) -> list[int]:
    """For each end the first start such that the layers between fit as a middle stage."""
    swarm = variant.group.swarm
    num_layers = swarm.spec.num_layers
    if swarm.costs.moe_before[num_layers] in (0, num_layers):  # all layers alike
        most = _most_alike(variant, [0] * len(variant.shares))
        return [max(0, i - most) for i in range(num_layers + 1)]
    low, start = [0], 0
    for end in range(1, num_layers + 1):
        while start < end and not variant.fits(max(start, 1), min(end, num_layers - 1)):
            start += 1
        low.append(start)
    return low


def _most_alike(variant: Variant, extra_bytes: list[int]) -> int:
    """Most layers that fit beside `extra_bytes` per rank, in a model whose layers are all alike."""
    swarm = variant.group.swarm
    per_layer = variant.moe_bytes if swarm.spec.moe_layers else variant.dense_bytes
    kv_tokens = swarm.min_tokens
    return min(
        max(0, swarm.memory[member] - extra_bytes[r]) // (per_layer[r] + kv_tokens * variant.kv_token_bytes[r])
        for r, member in enumerate(variant.group.members)
    )


def _most_at_end(variant: Variant, is_first: bool) -> int:
    """Most layers that fit in the first or the last stage of several."""
    swarm, num_layers = variant.group.swarm, variant.group.swarm.spec.num_layers
    if swarm.costs.moe_before[num_layers] in (0, num_layers):
        return min(num_layers - 1, _most_alike(variant, variant.first_bytes if is_first else variant.last_bytes))
    return _largest(
        num_layers - 1, lambda n: variant.fits(0, n) if is_first else variant.fits(num_layers - n, num_layers)
    )


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
