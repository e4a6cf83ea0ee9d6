"""The plan: who holds what, what that should give, and what changing to it costs."""

from __future__ import annotations

from dataclasses import dataclass, field

from skynet.coordinator.planner.config import Layout, Objective
from skynet.models.spec import ModelSpec
from skynet.protocol.ids import WorkerId
from skynet.protocol.plan import LayerSpan, RankShare, StageAssignment


@dataclass(frozen=True, slots=True, kw_only=True)
class RankPlan:
    """One worker's part of a stage."""

    worker_id: WorkerId
    share: RankShare
    weight_bytes: int
    kv_bytes: int  # of all KV blocks
    memory_bytes: int  # what the worker lends; weight_bytes + kv_bytes <= memory_bytes

    def __post_init__(self) -> None:
        if self.weight_bytes + self.kv_bytes > self.memory_bytes:
            held = self.weight_bytes + self.kv_bytes
            raise ValueError(f"worker {self.worker_id}: {held} bytes planned, {self.memory_bytes} lent")


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePlan:
    """Consecutive layers and the ranks that share them, in rank order."""

    layers: LayerSpan
    ranks: tuple[RankPlan, ...]

    @property
    def worker_ids(self) -> tuple[WorkerId, ...]:
        return tuple(rank.worker_id for rank in self.ranks)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What a replica should reach, in tokens per second. Step deadlines and checks of the planner build on it."""

    prefill_tokens_per_s: float  # one prompt of the configured length (512) alone
    decode_tokens_per_s: float  # one sequence alone
    batch_tokens_per_s: float  # all sequences together, with `sequences` at once
    sequences: int

    @property
    def decode_step_s(self) -> float:
        """Of one sequence."""
        return 1 / self.decode_tokens_per_s


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaPlan:
    """One complete copy of the model, its stages in pipeline order."""

    stages: tuple[StagePlan, ...]
    num_blocks: int  # KV blocks, the same on every rank
    prediction: Prediction

    @property
    def worker_ids(self) -> tuple[WorkerId, ...]:
        return tuple(w for stage in self.stages for w in stage.worker_ids)

    @property
    def layout(self) -> str:
        """Like "2x3" where all groups have the same size, else "2+2+1" (ranks of each stage)."""
        sizes = [len(stage.ranks) for stage in self.stages]
        return f"{sizes[0]}x{len(sizes)}" if len(set(sizes)) == 1 else "+".join(map(str, sizes))


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerTransition:
    """How one worker gets from what it holds to what the new plan gives it."""

    worker_id: WorkerId
    kept_bytes: int  # weights of the old shard that the new one needs too
    fetched_bytes: int  # weights it must get
    peak_bytes: int  # old and new shard and both KV caches; layers whose share stays the same count once
    memory_bytes: int

    @property
    def can_overlap(self) -> bool:
        """Whether the new shard fits beside the old one; else the old one must be dropped first."""
        return self.peak_bytes <= self.memory_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Transition:
    """From the current plan to this one: every worker of the new plan."""

    workers: tuple[WorkerTransition, ...] = ()
    pause_s: float = 0.0  # predicted gap in service: 0 if every worker can load beside what it holds

    @property
    def must_drop_first(self) -> tuple[WorkerId, ...]:
        """Workers that can't hold old and new at once."""
        return tuple(w.worker_id for w in self.workers if not w.can_overlap)

    @property
    def moved_bytes(self) -> int:
        return sum(worker.fetched_bytes for worker in self.workers)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The whole assignment for one model."""

    spec: ModelSpec
    objective: Objective
    replicas: tuple[ReplicaPlan, ...]
    spares: tuple[WorkerId, ...]  # hold nothing, and step in when a worker is lost
    block_size: int
    layout: Layout | None = None  # the pinned one
    layout_is_met: bool = True  # False: too few workers for the pinned layout, `replicas` come as near as they can
    reasons: tuple[str, ...] = ()
    transition: Transition = field(default_factory=Transition)
    estimated_links: tuple[tuple[WorkerId, WorkerId], ...] = ()  # used by the plan but not measured yet: probe first

    @property
    def moved_bytes(self) -> int:
        """Weights that workers must get, compared with the plan that was in force."""
        return self.transition.moved_bytes

    @property
    def worker_ids(self) -> tuple[WorkerId, ...]:
        return tuple(w for replica in self.replicas for w in replica.worker_ids)

    @property
    def batch_tokens_per_s(self) -> float:
        """Of all replicas, each kept busy."""
        return sum(replica.prediction.batch_tokens_per_s for replica in self.replicas)

    def assignments(self) -> dict[WorkerId, StageAssignment]:
        """Each worker's part in the words of the wire."""
        return {w: a for replica in self.replicas for w, a in self.replica_assignments(replica).items()}

    def replica_assignments(self, replica: ReplicaPlan) -> dict[WorkerId, StageAssignment]:
        stages = tuple(stage.worker_ids for stage in replica.stages)
        return {
            rank.worker_id: StageAssignment(
                layers=stage.layers,
                num_layers=self.spec.num_layers,
                stage_index=stage_index,
                stages=stages,
                rank=rank_index,
                share=rank.share,
                num_blocks=replica.num_blocks,
                block_size=self.block_size,
                dtype=self.spec.dtype,
            )
            for stage_index, stage in enumerate(replica.stages)
            for rank_index, rank in enumerate(stage.ranks)
        }
