"""A step as tensors: built once from its RunStep, used by every layer."""

# T tokens of the step, all sequences one after another; S positions of one sequence

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from skynet.errors import StepRejected
from skynet.protocol.steps import RunStep, SamplingParams, SeenTokens, SequencePart

MAX_STEP_TOKENS = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLimits:
    """What a stage can be asked for."""

    vocab_size: int
    max_positions: int
    num_blocks: int
    block_size: int


class PartView(NamedTuple):
    """Where one sequence lies in the step's rows and in the cache."""

    row: int  # its first row
    num_rows: int
    start: int  # position of its first row
    first_slot: int | None  # slot of position 0, if its blocks are consecutive
    blocks: Tensor | None  # else its blocks, [ceil(end / block_size)] int64

    @property
    def end(self) -> int:
        """Positions in the cache after this step."""
        return self.start + self.num_rows


class Sample(NamedTuple):
    """A row whose next token is wanted."""

    row: int
    position: int  # of the token to be sampled
    params: SamplingParams
    seen: SeenTokens | None = None  # where there are penalties


@dataclass(slots=True, kw_only=True)
class StepBatch:
    """What the layers need to know about a step. Built by `build_batch`; attention fills the masks."""

    num_tokens: int
    token_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    slots: Tensor  # [T] int64, where each row's keys and values go
    parts: tuple[PartView, ...]
    samples: tuple[Sample, ...]
    adapter_rows: tuple[tuple[int, slice], ...]  # (adapter, rows) of the parts that use one
    block_size: int
    masks: dict[tuple[int, int, int | None], Tensor] = field(default_factory=dict)

    @property
    def write_slot(self) -> int | None:
        """The first slot, if all rows go to consecutive ones."""
        first = self.parts[0]
        if len(self.parts) == 1 and first.first_slot is not None:
            return first.first_slot + first.start
        return None


def build_batch(step: RunStep, limits: StepLimits, adapters: Collection[int], device: torch.device) -> StepBatch:
    """Checks the step against the stage and lays it out. Raises StepRejected; nothing is changed then."""
    check_step(step, limits, adapters)
    size, row = limits.block_size, 0
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    parts: list[PartView] = []
    samples: list[Sample] = []
    adapter_rows: list[tuple[int, slice]] = []
    for part in step.parts:
        count, table = len(part.token_ids), part.block_table
        end = part.start + count
        token_ids += part.token_ids
        positions += range(part.start, end)
        slots += [table[p // size] * size + p % size for p in range(part.start, end)]
        parts.append(_view(part, row, size, device))
        if part.sample is not None:
            samples.append(Sample(row + count - 1, end, part.sample, part.seen))
        if part.adapter:
            adapter_rows.append((part.adapter, slice(row, row + count)))
        row += count
    return StepBatch(
        num_tokens=row,
        token_ids=torch.tensor(token_ids, dtype=torch.int64, device=device),
        positions=torch.tensor(positions, dtype=torch.int64, device=device),
        slots=torch.tensor(slots, dtype=torch.int64, device=device),
        parts=tuple(parts),
        samples=tuple(samples),
        adapter_rows=tuple(adapter_rows),
        block_size=size,
    )


def check_step(step: RunStep, limits: StepLimits, adapters: Collection[int]) -> None:
    """Raises StepRejected for a step that can't be run here without reading or writing out of bounds."""
    if not step.parts:
        raise StepRejected(f"step {step.step}: has no parts")
    if (total := sum(len(part.token_ids) for part in step.parts)) > MAX_STEP_TOKENS:
        raise StepRejected(f"step {step.step}: has {total} tokens, at most {MAX_STEP_TOKENS} are allowed")
    written: set[int] = set()
    for part in step.parts:
        _check_part(part, f"step {step.step}, sequence {part.sequence_id}", limits, adapters)
        size = limits.block_size
        writes = part.block_table[part.start // size : -(-(part.start + len(part.token_ids)) // size)]
        if not written.isdisjoint(writes):
            raise StepRejected(f"step {step.step}, sequence {part.sequence_id}: writes a block that another one writes")
        written.update(writes)


def _check_part(part: SequencePart, who: str, limits: StepLimits, adapters: Collection[int]) -> None:
    if not part.token_ids:
        raise StepRejected(f"{who}: has no tokens")
    if not (min(part.token_ids) >= 0 and max(part.token_ids) < limits.vocab_size):
        raise StepRejected(f"{who}: token ids must lie in [0, {limits.vocab_size})")
    end = part.start + len(part.token_ids)
    if part.start < 0 or end > limits.max_positions:
        raise StepRejected(f"{who}: positions [{part.start}, {end}) must lie in [0, {limits.max_positions})")
    table = part.block_table
    if end > len(table) * limits.block_size:
        raise StepRejected(f"{who}: {len(table)} blocks of {limits.block_size} don't hold {end} positions")
    if not (min(table) >= 0 and max(table) < limits.num_blocks):
        raise StepRejected(f"{who}: block ids must lie in [0, {limits.num_blocks})")
    if len(set(table)) != len(table):
        raise StepRejected(f"{who}: its block table names a block twice")
    if part.adapter and part.adapter not in adapters:
        raise StepRejected(f"{who}: adapter {part.adapter} isn't loaded here")
    if part.sample is not None and part.sample.changes_logits:
        _check_changes(part.sample, part.seen, who, limits.vocab_size)


def _check_changes(params: SamplingParams, seen: SeenTokens | None, who: str, vocab_size: int) -> None:
    """What is to be done to logits must be about tokens that there are."""
    if any(token_id >= vocab_size for token_id, _ in params.logit_bias):
        raise StepRejected(f"{who}: logit_bias must be about token ids in [0, {vocab_size})")
    if params.penalties is None:
        return
    if seen is None:
        raise StepRejected(f"{who}: asks for penalties and doesn't say what tokens were seen")
    if params.penalties.counts_answer and len(seen.counts) != len(seen.ids):
        raise StepRejected(f"{who}: doesn't say how often the answer has the tokens that were seen")
    ids = np.frombuffer(seen.ids, "<u4").astype(np.int64)
    if len(ids) and not (ids[-1] < vocab_size and (np.diff(ids) > 0).all()):
        raise StepRejected(f"{who}: seen token ids must ascend in [0, {vocab_size})")


def _view(part: SequencePart, row: int, block_size: int, device: torch.device) -> PartView:
    count = len(part.token_ids)
    table = part.block_table[: -(-(part.start + count) // block_size)]
    if table == tuple(range(table[0], table[0] + len(table))):
        return PartView(row, count, part.start, table[0] * block_size, None)
    return PartView(row, count, part.start, None, torch.tensor(table, dtype=torch.int64, device=device))
