"""Low-rank additions to a stage's projections, one set per adapter, applied to the rows of the sequences that name it.

A column-parallel projection (q, k, v, gate, up) takes all of A and this rank's rows of B; a row-parallel one (o, down)
takes this rank's columns of A and all of B: its addition is a partial sum like the projection's own.
"""

# T tokens, r adapter rank

from __future__ import annotations

from collections.abc import KeysView, Mapping
from typing import Literal, NamedTuple

from torch import Tensor

from skynet.errors import UnsupportedArchitecture
from skynet.models.spec import ModelSpec
from skynet.protocol.plan import Span, StageAssignment
from skynet.worker.stage.batch import StepBatch

Projection = Literal["q", "k", "v", "o", "gate", "up", "down"]


class LowRank(NamedTuple):
    """y += (x A^T) B^T; a scale is part of B."""

    a: Tensor  # [r, input features of this rank]
    b: Tensor  # [output features of this rank, r]


class AdapterTable:
    """The adapters of one stage's rank."""

    def __init__(self) -> None:
        self._weights: dict[int, dict[tuple[int, Projection], LowRank]] = {}

    def ids(self) -> KeysView[int]:
        """Which are loaded."""
        return self._weights.keys()

    def put(self, adapter: int, weights: Mapping[tuple[int, Projection], LowRank]) -> None:
        """Loads or replaces an adapter: this rank's share, by (layer of the whole model, projection)."""
        if adapter < 1:
            raise ValueError(f"adapters are numbered from 1, got {adapter}")
        self._weights[adapter] = dict(weights)

    def remove(self, adapter: int) -> None:
        """Unloads it; one that isn't loaded is fine."""
        self._weights.pop(adapter, None)

    def add(self, y: Tensor, x: Tensor, layer: int, projection: Projection, batch: StepBatch) -> None:
        """Adds to y [T, out] what the adapters of this batch's rows make of x [T, in]. Call it if any row has one."""
        for adapter, rows in batch.adapter_rows:
            low_rank = self._weights[adapter].get((layer, projection))
            if low_rank is not None:
                y[rows] += (x[rows] @ low_rank.a.T) @ low_rank.b.T


class ColumnRange(NamedTuple):
    """Where a projection's outputs lie within a fused matrix's."""

    projection: Projection
    span: Span


def shard_adapter(
    weights: Mapping[tuple[int, Projection], LowRank], spec: ModelSpec, assignment: StageAssignment
) -> dict[tuple[int, Projection], LowRank]:
    """What one rank keeps of a whole adapter: its stage's layers, its rows of B or columns of A.

    Raises UnsupportedArchitecture for projections that take none: GPT-2's, and those of experts.
    """
    if spec.model_type == "gpt2" or any(
        layer in spec.moe_layers and projection in ("gate", "up", "down") for layer, projection in weights
    ):
        raise UnsupportedArchitecture(f"{spec.model_type}: adapters aren't supported on these projections")
    share = assignment.share
    kv_heads = share.kv_heads(spec.group_size)
    kept: dict[tuple[int, Projection], LowRank] = {}
    for (layer, projection), low_rank in weights.items():
        if not assignment.layers.start <= layer < assignment.layers.end:
            continue
        match projection:
            case "q" | "o":
                start, end = share.heads.start * spec.head_size, share.heads.end * spec.head_size
            case "k" | "v":
                start, end = kv_heads.start * spec.head_size, kv_heads.end * spec.head_size
            case "gate" | "up" | "down":
                start, end = share.mlp.start, share.mlp.end
        if projection in ("o", "down"):
            kept[layer, projection] = LowRank(low_rank.a[:, start:end].contiguous(), low_rank.b)
        else:
            kept[layer, projection] = LowRank(low_rank.a, low_rank.b[start:end].contiguous())
    return kept
