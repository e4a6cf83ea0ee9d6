"""What a plan aims for, and the constants of its predictions."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from skynet.errors import ConfigError


class Objective(StrEnum):
    """What is minimised; every objective keeps memory as a hard bound."""

    LATENCY = "latency"  # time of one typical request, alone in the swarm: its prompt and its answer
    THROUGHPUT = "throughput"  # answer tokens per second of all replicas together, each kept busy
    MEMORY = "memory"  # bytes taken from the workers, with the smallest KV cache that will do


@dataclass(frozen=True, slots=True)
class Layout:
    """A pinned layout: ranks per stage x stages of every replica."""

    tensor_parallel: int
    pipeline: int

    def __post_init__(self) -> None:
        if not (1 <= self.tensor_parallel <= 64 and 1 <= self.pipeline <= 1024):
            raise ConfigError(f"layout {self}: up to 64 ranks per stage and 1024 stages can be asked for")

    @classmethod
    def parse(cls, text: str) -> Layout:
        """Read "2x3": tensor parallel by pipeline. Raises ConfigError."""
        match = re.fullmatch(r"([1-9]\d{0,3})x([1-9]\d{0,3})", text.strip().lower())
        if match is None:
            raise ConfigError(f'layout {text!r}: expected two numbers such as "2x3" (ranks per stage x stages)')
        return cls(int(match[1]), int(match[2]))

    @property
    def num_workers(self) -> int:
        return self.tensor_parallel * self.pipeline

    def __str__(self) -> str:
        return f"{self.tensor_parallel}x{self.pipeline}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannerConfig:
    """Defaults suit a home network; times are in seconds."""

    objective: Objective = Objective.LATENCY
    layout: Layout | None = None  # None: the planner chooses
    block_size: int = 16  # positions per KV block
    min_context_tokens: int = 2048  # every replica can hold one sequence of this length (or of the model's longest)
    max_context_tokens: int = 65536  # a replica reserves KV for at most this many positions, of all sequences together
    max_sequences: int = 16  # ... and for at most so many of the model's longest; one of these fits if memory allows
    kv_share: float = 0.5  # of what weights leave free, beyond the minimum; the rest lets a later plan load beside this
    prompt_tokens: int = 512  # the typical request, for predictions
    answer_tokens: int = 128
    batch: int = 8  # sequences in each step of a busy replica
    improvement_threshold: float = 0.03  # plans this close count as equal; the present plan stays unless beaten by more
    payback_s: float = 600.0  # a change must win back the time its bytes take to move within this time
    fetch_bytes_per_s: float = 50e6  # at which one worker gets weights it doesn't hold
    max_group_size: int = 8  # ranks that a group may have (a pinned layout may ask for more)
    near_round_trip_s: float = (
        0.003  # machines further apart are never put into one group, unless memory leaves no choice
    )
    exchange_round_trips: float = 1.0  # one exchange inside a group, in round trips of its slowest link
    exchange_overhead_s: float = 0.00012  # and this: ranks are never ready at the same moment
    step_overhead_s: float = 0.0008  # of each step: forming and sending it, a worker's part beside layers, the answer
    stage_overhead_s: float = 0.0005  # of each further stage: its worker takes the step, and wakes for hidden states
    local_round_trip_s: float = 0.00012  # between workers of one host, until measured
    local_bandwidth_bytes_per_s: float = 1.2e9
    default_round_trip_s: float = 0.001  # between hosts of which no link at all is known
    default_bandwidth_bytes_per_s: float = 100e6
    hosts_share_bandwidth: bool = (
        False  # True: rates were measured one worker at a time, so a host's workers divide them
    )
    exact_up_to: int = 4  # swarms of up to this many workers are searched exhaustively
    thorough_up_to: int = 40  # beyond, groups and clusters are tried in fewer ways
    search_effort: int = 40_000  # bounds local search in larger swarms: layers x stages tried, about 4 us each
    total_work: int = 2_000_000  # bounds all search, about 0.6 us each; beyond, once a plan is known, nothing is begun

    def __post_init__(self) -> None:
        if self.min_context_tokens < 1:
            raise ConfigError(f"context tokens: {self.min_context_tokens} must be at least 1")
        if self.block_size < 1 or self.batch < 1 or self.prompt_tokens < 1 or self.answer_tokens < 1:
            raise ConfigError("block_size, batch, prompt_tokens and answer_tokens must be at least 1")
        if not (0 <= self.improvement_threshold < 1 and 0 <= self.kv_share <= 1):
            raise ConfigError("improvement_threshold must lie in [0, 1), kv_share in [0, 1]")
        if not (self.payback_s > 0 and self.fetch_bytes_per_s > 0 and self.max_group_size >= 1):
            raise ConfigError("payback_s and fetch_bytes_per_s must be positive, max_group_size at least 1")
