"""One step of a replica: what the coordinator asks of every rank, and what comes back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from skynet.protocol.ids import SequenceId
from skynet.protocol.plan import Epoch


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen. Random numbers depend on (seed, index, position), never on batch or layout."""

    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: no limit
    seed: int = 0
    index: int = 0  # which of several answers to one prompt

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 100:
            raise ValueError(f"temperature must lie in [0, 100], got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")
        if not 0 <= self.top_k < 2**31:
            raise ValueError(f"top_k must be at least 0, got {self.top_k}")
        if not 0 <= self.seed < 2**64 or not 0 <= self.index < 2**32:
            raise ValueError(f"seed and index must fit 64 and 32 bits, got {self.seed} and {self.index}")


@dataclass(frozen=True, slots=True, kw_only=True)
class SequencePart:
    """One sequence's share of a step: tokens to run at positions [start, start + len(token_ids))."""

    sequence_id: SequenceId
    token_ids: tuple[int, ...]
    start: int
    block_table: tuple[int, ...]  # KV block of positions [i * block_size, (i + 1) * block_size)
    sample: SamplingParams | None = None  # None: a prompt chunk before the last, nothing is sampled
    adapter: int = 0  # LoRA adapter; 0: none


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStep:
    """Coordinator -> every rank: "run this batch". Steps of one epoch are numbered without gaps and run in order."""

    kind: ClassVar[str] = "run_step"
    epoch: Epoch
    step: int
    parts: tuple[SequencePart, ...]
    timeout_s: float  # ranks give up waiting for each other after this long


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDone:
    """Sampling rank -> coordinator: the sampled token of each part that asked for one, in order of parts."""

    kind: ClassVar[str] = "step_done"
    epoch: Epoch
    step: int
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFailed:
    """Rank -> coordinator: this step can't be finished.

    `suspect` is the peer that is to blame, if one is known; `is_nonsense` says that it sent what can't be used.
    """

    kind: ClassVar[str] = "step_failed"
    epoch: Epoch
    step: int
    reason: str
    suspect: str | None = None
    is_nonsense: bool = False
