"""The workers of one planning problem, indexed, with their rates and links."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

from skynet.coordinator.planner.config import Objective, PlannerConfig
from skynet.coordinator.planner.groups import Group
from skynet.coordinator.planner.links import LinkTable
from skynet.coordinator.planner.rates import known_rate, levelled_rates
from skynet.models.costs import model_costs
from skynet.models.fit import held_bytes
from skynet.models.spec import DTYPE_BYTES, ModelSpec
from skynet.models.split import whole_share
from skynet.protocol.ids import WorkerId
from skynet.protocol.plan import LayerSpan, RankShare
from skynet.protocol.profile import LinkProfile, WorkerProfile

_NEW_RANK_WORK = 30  # of one rank of a new group
_MOST_GROUPS, _SPARE_GROUPS = 64, 8
_FULL_VARIANTS = 7  # in larger swarms uneven memory inside one group matters less than which groups there are
# Measured on CPUs against whole stages (docs/benchmarks/planner_cpu_2026-11.md):
_PASSES = 10  # how often norms, rotations, activations and sums read or write each number of a token's way
_SCORE_BYTES = 72  # what one attention score costs, in bytes read


class StepKind(NamedTuple):
    """One forward pass: how many tokens, of how many sequences, at which average number of earlier positions."""

    tokens: int
    sequences: int
    context: int


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
        self.read_rate = levelled_rates([known_rate(p.weight_bytes_per_s, spec.dtype) for p in ordered], ordered)
        self.flops_rate = levelled_rates([known_rate(p.matmul_flops_per_s, spec.dtype) for p in ordered], ordered)
        self.overhead_s = levelled_rates([profile.layer_overhead_s for profile in ordered], ordered)
        self.links = LinkTable(self.ids, profiles, links, config)
        self.element_bytes = DTYPE_BYTES[spec.dtype]
        min_tokens = min(config.min_context_tokens, spec.max_positions)
        self.min_blocks = -(-min_tokens // config.block_size)
        self.min_tokens = self.min_blocks * config.block_size
        longest = spec.max_positions
        max_tokens = min(config.max_sequences * longest, max(config.max_context_tokens, longest))
        self.max_blocks = max(self.min_blocks, -(-max_tokens // config.block_size))
        prompt, answer = config.prompt_tokens, config.answer_tokens
        self.decode = StepKind(1, 1, prompt + answer // 2)
        self.prefill = StepKind(prompt, 1, prompt // 2)
        self.batch = StepKind(config.batch, config.batch, prompt + answer // 2)
        self.kv_targets = self._kv_targets()
        self.whole = whole_share(spec)
        everything = LayerSpan(0, spec.num_layers)
        self.replica_bytes = held_bytes(
            self.costs, everything, self.whole, self.min_tokens
        )  # the least one replica takes
        roomy = held_bytes(self.costs, everything, self.whole, self.kv_targets[0])
        self.roomy_bytes = roomy if roomy <= sum(self.memory) else self.replica_bytes  # with cache for a whole batch
        self.has_full_variants = len(self.ids) <= _FULL_VARIANTS
        self.is_large = len(self.ids) > config.thorough_up_to
        self.layer_flops = sum(self.costs.layer_flops(self.whole, bool(spec.moe_layers)))
        self.layer_read_bytes = sum(self.costs.layer_read_bytes(self.whole, bool(spec.moe_layers), 1))
        self.layer_touched_bytes = sum(self.touched_bytes(self.whole, bool(spec.moe_layers), self.decode))
        self.share_cache: dict[tuple[float, ...], tuple[RankShare, ...]] = {}
        self._groups: dict[tuple[int, ...], Group] = {}
        self.work = 0  # done so far, in the unit of `total_work`: counted, never timed, so that plans stay pure

    def _kv_targets(self) -> list[int]:
        """Positions that allotments of layers leave room for, the most first: a replica without room for a whole batch
        answers fewer at once. Beyond the minimum only `kv_share` of what is free becomes cache."""
        config = self.config
        if config.objective is not Objective.THROUGHPUT or config.kv_share == 0:
            return [self.min_tokens]
        counts = range(1, config.batch + 1) if len(self.ids) <= _FULL_VARIANTS else (1, 3, config.batch)
        return sorted({*map(self._kv_for, counts), self.min_tokens}, reverse=True)

    def _kv_for(self, num_sequences: int) -> int:
        """Positions to leave room for, so that this many typical requests fit into what becomes cache."""
        config = self.config
        tokens = num_sequences * (config.prompt_tokens + config.answer_tokens)
        extra = min(tokens, self.max_blocks * config.block_size) - self.min_tokens
        return self.min_tokens + max(0, int(extra / config.kv_share))

    @cached_property
    def kv_rooms(self) -> list[tuple[int, int]]:
        """(Positions to leave room for, bytes of one replica with them) of a whole batch, then of fewer sequences."""
        if len(self.kv_targets) == 1:
            return []
        everything, counts = LayerSpan(0, self.spec.num_layers), range(self.config.batch, 0, -1)
        targets = [kv for kv in dict.fromkeys(map(self._kv_for, counts)) if kv > self.min_tokens]
        return [(kv, held_bytes(self.costs, everything, self.whole, kv)) for kv in targets]

    @property
    def is_spent(self) -> bool:
        """Whether `total_work` is done: the best so far has to do."""
        return self.work >= self.config.total_work

    @property
    def most_groups(self) -> int:
        """Groups that one layout is made of at most: few more than there can be stages, each of a layer or more."""
        return max(_MOST_GROUPS, self.spec.num_layers + _SPARE_GROUPS)

    def group(self, members: tuple[int, ...]) -> Group:
        """The group of these workers, ranks in this order."""
        found = self._groups.get(members)
        if found is None:
            found = self._groups[members] = Group(self, members)
            self.work += _NEW_RANK_WORK * len(members)
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

    def touched_bytes(self, share: RankShare, is_moe: bool, kind: StepKind) -> tuple[float, float]:
        """What one layer reads and writes beside its matrices: (norm, rotation and attention; norm, activation)."""
        spec = self.spec
        kv_heads = len(share.kv_heads(spec.group_size))
        widths = 3 * (len(share.heads) + 2 * kv_heads) * spec.head_size
        columns = len(share.expert_mlp) * spec.experts_per_token if is_moe else len(share.mlp)
        number = kind.tokens * self.element_bytes * _PASSES
        scores = kind.tokens * kind.context * len(share.heads) * _SCORE_BYTES
        return number * (2 * spec.hidden_size + widths) + scores, number * (2 * spec.hidden_size + 3 * columns)

    def hop_s(self, previous: tuple[int, ...], following: tuple[int, ...], tokens: int) -> float:
        """Handing hidden states to the next stage: its fixed cost and the slowest of `StageAssignment`'s pairs."""
        copies = -(-len(following) // len(previous))
        size, slowest = self.activation_bytes(tokens), 0.0
        if len(previous) == len(following) == 1:  # by far the most frequent
            link = self.links.between(previous[0], following[0])
            return self.config.stage_overhead_s + link.round_trip_s / 2 + size / link.bandwidth_bytes_per_s
        links = [self.links.between(previous[i % len(previous)], b) for i, b in enumerate(following)]
        num_relayed = sum(link.is_relayed for link in links)  # all of them pass the coordinator at once
        for link in links:
            at_once = num_relayed if link.is_relayed else copies
            slowest = max(slowest, link.round_trip_s / 2 + size * at_once / link.bandwidth_bytes_per_s)
        return self.config.stage_overhead_s + slowest

    def return_s(self, first: tuple[int, ...], last: tuple[int, ...]) -> float:
        """The sampled token's way to the coordinator, and the next step's from there to the first stage's ranks."""
        from_last, to_first = self.links.to_coordinator_s(last[0]), [self.links.to_coordinator_s(w) for w in first]
        measured = [s for s in (from_last, *to_first) if s is not None]
        if from_last is not None and len(measured) == 1 + len(first):
            return self.config.step_overhead_s + from_last + max(measured[1:])
        trip = 0.0 if first[0] == last[0] else self.links.between(last[0], first[0]).round_trip_s
        return self.config.step_overhead_s + (trip / 2 if trip < float("inf") else self.config.default_round_trip_s)
