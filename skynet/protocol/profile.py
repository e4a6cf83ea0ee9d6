"""What workers and links can do, as measured; the planner's input."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from skynet.protocol.ids import WorkerId

PROCESS_OVERHEAD_BYTES: Final = 350 << 20  # interpreter, torch and buffers, beside weights and KV cache


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerProfile:
    """One worker's device as it measured itself at start. Checked when it arrives: rates are finite and positive."""

    device: str  # "cpu", "cuda:0", ...
    device_name: str  # for people
    threads: int
    memory_bytes: int  # what it lends for weights and KV cache: a hard bound, less where it `shares_machine`
    weight_bytes_per_s: dict[str, float]  # by dtype: weight bytes per second of a matrix-vector product
    matmul_flops_per_s: dict[str, float]  # by dtype: of a large matrix product
    layer_overhead_s: float = 0.0005  # fixed cost of one layer in one step, apart from bytes and operations
    host_id: str = ""  # workers with the same one share a machine, its memory bandwidth and its chunk cache
    machine_bytes: int = 0  # what workers may take of the machine's memory together, processes included; 0: not told
    shares_machine: bool = False  # no --memory was given: it takes no more than other workers of the machine leave it

    def __post_init__(self) -> None:
        rates = [*self.weight_bytes_per_s.values(), *self.matmul_flops_per_s.values()]
        if not rates or not all(0 < rate < 1e18 for rate in rates):
            raise ValueError(f"rates must be positive and finite, got {rates}")
        if min(self.memory_bytes, self.machine_bytes) < 0 or self.threads < 1 or not 0 <= self.layer_overhead_s < 60:
            memory = f"{self.memory_bytes} of {self.machine_bytes} bytes"
            raise ValueError(f"impossible profile: {memory}, {self.threads} threads, {self.layer_overhead_s} s")


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkProfile:
    """The way between two workers. Symmetric: `a` < `b`."""

    a: WorkerId
    b: WorkerId
    round_trip_s: float  # of a 4 KB message, request to answer
    bandwidth_bytes_per_s: float  # one way
    is_relayed: bool = False
    is_estimated: bool = field(default=False)  # bounded from other links; probed before a plan uses it
    is_cut: bool = False  # neither a direct way nor one through the coordinator; the rates mean nothing then

    def __post_init__(self) -> None:
        if not (0 < self.round_trip_s < 3600 and 0 < self.bandwidth_bytes_per_s < 1e15):
            raise ValueError(f"impossible link: {self.round_trip_s} s, {self.bandwidth_bytes_per_s} B/s")
