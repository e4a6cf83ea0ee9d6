"""The plan as a worker sees it: what it holds, with whom it sums, whom it hands on to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from skynet.protocol.ids import WorkerId

Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, slots=True, order=True)
class Epoch:
    """A plan's number. It grows at each change; frames of older epochs are dropped everywhere."""

    start: int  # how often this swarm's coordinator has started; persisted
    n: int  # changes since that start

    def __post_init__(self) -> None:
        if self.start < 0 or self.n < 0:
            raise ValueError(f"negative epoch {self.start}.{self.n}")

    def __str__(self) -> str:
        return f"{self.start}.{self.n}"


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """A half-open range [start, end), which may be empty: heads, MLP columns, vocabulary rows."""

    start: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.end:
            raise ValueError(f"negative or reversed span [{self.start}, {self.end})")

    def __len__(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, slots=True, order=True)
class LayerSpan:
    """Consecutive transformer layers, half-open: [start, end), never empty."""

    start: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end:
            raise ValueError(f"empty or negative span [{self.start}, {self.end})")

    def __len__(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, slots=True, kw_only=True)
class RankShare:
    """What one rank of a tensor-parallel group holds of every layer of its stage; each part may be empty.

    `heads` are query heads; the rank also holds the KV heads they use (`kv_heads`). `mlp` are columns of a dense MLP,
    `expert_mlp` columns of every expert, `vocab` rows of embedding and LM head.
    """

    heads: Span
    mlp: Span
    expert_mlp: Span
    vocab: Span

    def kv_heads(self, group_size: int) -> Span:
        """The KV heads that this rank's query heads attend to (`group_size` query heads share one).

        Neighbouring ranks may hold the same KV head.
        """
        if not len(self.heads):
            return Span(0, 0)
        return Span(self.heads.start // group_size, (self.heads.end - 1) // group_size + 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageAssignment:
    """One worker's part of a replica. The groups name workers in rank order; rank 0 of the last stage samples."""

    layers: LayerSpan
    num_layers: int  # of the whole model
    stage_index: int
    stages: tuple[tuple[WorkerId, ...], ...]  # every stage's ranks, in pipeline order
    rank: int  # within this stage
    share: RankShare
    num_blocks: int  # KV blocks, numbered from 0
    block_size: int  # positions per KV block
    dtype: Dtype

    def __post_init__(self) -> None:
        if not 0 <= self.stage_index < len(self.stages) or not 0 <= self.rank < len(self.stages[self.stage_index]):
            raise ValueError(
                f"stage {self.stage_index} rank {self.rank} isn't in a layout of {len(self.stages)} stages"
            )
        if self.num_blocks < 1 or self.block_size < 1:
            raise ValueError(f"{self.num_blocks} KV blocks of {self.block_size} positions can't hold a sequence")

    @property
    def is_first(self) -> bool:
        return self.stage_index == 0

    @property
    def is_last(self) -> bool:
        return self.stage_index == len(self.stages) - 1

    @property
    def group(self) -> tuple[WorkerId, ...]:
        """This stage's ranks."""
        return self.stages[self.stage_index]

    @property
    def upstream(self) -> WorkerId | None:
        """Who sends this rank its hidden states; None on the first stage."""
        if self.is_first:
            return None
        previous = self.stages[self.stage_index - 1]
        return previous[self.rank % len(previous)]

    @property
    def downstream(self) -> tuple[WorkerId, ...]:
        """The next stage's ranks to which this rank sends hidden states."""
        if self.is_last:
            return ()
        following = self.stages[self.stage_index + 1]
        return tuple(w for i, w in enumerate(following) if i % len(self.group) == self.rank)
