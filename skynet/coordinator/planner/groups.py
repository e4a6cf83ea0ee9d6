"""What a group of workers could do with a layer: ways to share it, times of a step, and what fits memory.

Inside a group ranks wait for each other twice per layer, so a layer takes the slowest rank's attention, the slowest
rank's MLP, two exchanges and a fixed overhead (docs/decisions/0014).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from skynet.coordinator.planner.allot import Option
from skynet.coordinator.planner.config import Objective
from skynet.coordinator.planner.options import make_option
from skynet.models.fit import split_group_within
from skynet.models.split import split_group
from skynet.protocol.plan import LayerSpan, RankShare

if TYPE_CHECKING:  # a swarm makes its groups
    from skynet.coordinator.planner.swarm import StepKind, Swarm

_CHOICE_BYTES = 8  # per token and chosen expert: which, and its weight
_EXPERT_OVERHEAD = 1 / 6  # of a layer's fixed cost: what each expert in use adds to it, about ten operations of sixty
# Measured on CPUs against whole stages (docs/benchmarks/planner_cpu_2026-11.md):
_READ_EFFICIENCY = 0.85  # a layer's matrices are smaller than the one whose rate was measured, and never in a cache
_SEQUENCE_OVERHEAD = 1 / 7  # of a layer's fixed cost: what each further sequence adds, as it attends on its own
_FEW_TOKENS = 16  # up to here weights are read once and each token adds its operations; beyond, a matrix product


class StepTimes(NamedTuple):
    """Seconds of one stage: per dense layer, per mixture layer, and what being first or last adds."""

    dense_s: float
    moe_s: float
    first_s: float
    last_s: float


def phase_s(read_bytes: float, flops_per_token: float, tokens: int, read_rate: float, flops_rate: float) -> float:
    """Time of one rank's matrices for a batch of tokens: reading them, then being short of operations."""
    few = read_bytes / (_READ_EFFICIENCY * read_rate) + (min(tokens, _FEW_TOKENS) - 1) * flops_per_token / flops_rate
    return max(few, tokens * flops_per_token / flops_rate)


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
    options: dict[int, Option] = field(default_factory=dict)

    def option(self, kv_tokens: int) -> Option:
        """For the layer allotment, with room for so many positions on each rank."""
        found = self.options.get(kv_tokens)
        if found is None:
            found = self.options[kv_tokens] = make_option(self, kv_tokens)
        return found

    def step(self, kind: StepKind) -> StepTimes:
        found = self.times.get(kind)
        if found is None:
            found = self.times[kind] = self.group.step_times(self.shares, kind)
        return found

    def fits(self, start: int, end: int, kv_tokens: int | None = None) -> bool:
        """Whether every rank can hold these layers with a KV cache of so many positions (None: the smallest)."""
        swarm = self.group.swarm
        dense, moe = swarm.costs.count(start, end)
        is_first, is_last = start == 0, end == swarm.spec.num_layers
        tokens = swarm.min_tokens if kv_tokens is None else kv_tokens
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
        self.is_joined = self.round_trip_s < float("inf")  # every two of them can talk to each other
        direct = [link.bandwidth_bytes_per_s for link in links if not link.is_relayed]
        relayed = [link.bandwidth_bytes_per_s for link in links if link.is_relayed]
        # Seconds per byte of everybody sending to everybody: a rank's copies share its own link, and all relayed ones
        # of the group, both ways, share the coordinator's.
        self.copy_s_per_byte = max(
            (len(members) - 1) / min(direct, default=float("inf")),
            2 * len(relayed) / min(relayed, default=float("inf")),
        )
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
            around = swarm.layer_touched_bytes * tokens / read
            return matrices + around + overhead + 2 * self.exchange_s(tokens)

        if config.objective is Objective.THROUGHPUT:
            return step(config.batch)
        return step(1) + step(config.prompt_tokens) / config.answer_tokens

    @cached_property
    def head_s(self) -> float:
        """Roughly what being the last stage adds to a token."""
        spec, swarm = self.swarm.spec, self.swarm
        return spec.vocab_size * spec.hidden_size * swarm.element_bytes / sum(self.read_rates) + self.exchange_s(1)

    @cached_property
    def share_of_room(self) -> float:
        """`room` in fractions of layers, with as much cache as serves the objective best."""
        lent = sum(self.swarm.memory[m] for m in self.members)
        return min(1.0, lent / self.swarm.roomy_bytes) * self.swarm.spec.num_layers

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
        copies_s = self.swarm.activation_bytes(tokens) * self.copy_s_per_byte
        return self.swarm.config.exchange_overhead_s + min(trip + copies_s, 2 * trip + 2 / ranks * copies_s)

    def choice_s(self, tokens: int) -> float:
        """Rank 0 of a mixture layer scores the experts and tells the others; nobody goes on before."""
        spec = self.swarm.spec
        weights = spec.num_experts * spec.hidden_size
        rates = (self.read_rates[0], self.swarm.flops_rate[self.members[0]])
        score_s = phase_s(weights * self.swarm.element_bytes, 2.0 * weights, tokens, *rates)
        if len(self.members) == 1:
            return score_s
        size = tokens * spec.experts_per_token * _CHOICE_BYTES
        return score_s + self.round_trip_s / 2 + size * self.copy_s_per_byte

    def step_times(self, shares: tuple[RankShare, ...], kind: StepKind) -> StepTimes:
        swarm, exchange = self.swarm, self.exchange_s(kind.tokens)
        overhead = max(swarm.overhead_s[m] for m in self.members) * (1 + (kind.sequences - 1) * _SEQUENCE_OVERHEAD)
        has_dense, has_moe = swarm.costs.count(0, swarm.spec.num_layers)
        dense = self._layer_s(shares, kind, False) + 2 * exchange + overhead if has_dense else 0.0
        moe = 0.0
        if has_moe:
            experts = swarm.costs.experts_used(kind.tokens)
            moe = self._layer_s(shares, kind, True) + 2 * exchange + self.choice_s(kind.tokens)
            moe += overhead * (1 + experts * _EXPERT_OVERHEAD)
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
            around_attention, around_mlp = swarm.touched_bytes(share, is_moe, kind)
            attention_s = phase_s(read_attention + kv_bytes, flops_attention, kind.tokens, *rates)
            mlp_s = phase_s(read_mlp, flops_mlp, kind.tokens, *rates)
            attention = max(attention, attention_s + around_attention / rates[0])
            mlp = max(mlp, mlp_s + around_mlp / rates[0])
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
        """By speed; then, where memory binds first, shares that make room for a batch's cache, and for more layers."""
        swarm, num_layers = self.swarm, self.swarm.spec.num_layers
        weights = tuple(rate / self.read_rates[0] for rate in self.read_rates)
        shares = swarm.share_cache.get(weights)
        if shares is None:
            shares = swarm.share_cache[weights] = split_group(swarm.spec, weights)
        found = [self.variant(shares)]
        if len(self.members) == 1:
            return found
        limits = [swarm.memory[m] for m in self.members]
        for kv_tokens, num_bytes in swarm.kv_rooms:  # with the most sequences at once
            if found[0].fits(0, num_layers, kv_tokens):
                break
            if num_bytes <= sum(limits):
                within = split_group_within(swarm.costs, weights, limits, LayerSpan(0, num_layers), kv_tokens)
                if within is not None:
                    found.append(self.variant(within))
                    break
        for layers in () if found[0].fits(0, num_layers) else self._targets(found[0]):
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

    def options(self, kv_tokens: int) -> list[Option]:
        """For `allot`, in the order of `variants`."""
        return [variant.option(kv_tokens) for variant in self.variants]

    def hop_cost(self, previous: Group) -> float:
        """What entering this group from another costs by the objective; infinite where that can't be."""
        swarm, config = self.swarm, self.swarm.config
        members = (previous.members, self.members)
        if config.objective is Objective.THROUGHPUT:
            return swarm.hop_s(*members, swarm.batch.tokens)
        prefill_s = swarm.hop_s(*members, swarm.prefill.tokens)
        return swarm.hop_s(*members, 1) + prefill_s / config.answer_tokens
