"""Which device a worker computes on, how much memory it lends, and how fast it is."""

from __future__ import annotations

import logging
import platform
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import psutil
import torch

from skynet.errors import ConfigError
from skynet.protocol.profile import PROCESS_OVERHEAD_BYTES, WorkerProfile
from skynet.worker.stage.matrix import make_matrix

logger = logging.getLogger(__name__)

GIB: Final = 1 << 30
_PASSES: Final = 3
_VECTOR_S, _MATRIX_S, _SMALL_S = 0.024, 0.016, 0.004  # how long each thing is measured in one pass
_LAYER_ADDITIONS: Final = 200  # as long as these one layer takes apart from its bytes: 0.2 ms where one takes 1 us
MEASURED_DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)


def pick_device(asked: str | None, is_experimental: bool = False) -> torch.device:
    """The device asked for, or the first CUDA device, or the CPU. Raises ConfigError naming what is there."""
    if asked is None:
        return torch.device("cuda:0") if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(asked)
    except RuntimeError as exc:
        raise ConfigError(f"--device {asked}: not a device; use cpu or cuda:N") from exc
    if device.type == "mps":
        if not is_experimental:
            raise ConfigError("--device mps: nobody has tested it; add --experimental to try it all the same")
        if not torch.backends.mps.is_available():
            raise ConfigError("--device mps: this machine has no MPS device")
    elif device.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(f"--device {asked} (--gpu): this PyTorch sees no CUDA device; use --device cpu")
        if (device.index or 0) >= torch.cuda.device_count():
            raise ConfigError(
                f"--device {asked} (--gpu): this machine has CUDA devices 0 to {torch.cuda.device_count() - 1}"
            )
        return torch.device("cuda", device.index or 0)
    elif device.type != "cpu" or device.index:
        raise ConfigError(f"--device {asked}: not supported; use cpu or cuda:N")
    return torch.device(device.type)


def device_name(device: torch.device) -> str:
    """For people."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
        platform.processor() or "CPU",
    )


def free_memory_bytes(device: torch.device) -> int:
    """What could be lent now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


class Lending(NamedTuple):
    """What a worker lends for weights and KV cache: see `WorkerProfile`."""

    memory_bytes: int
    machine_bytes: int
    shares_machine: bool


def lending(device: torch.device, cap_bytes: int | None) -> Lending:
    """The owner's cap, or 80% of what is free, less the process itself."""
    free = free_memory_bytes(device)
    machine = free * 8 // 10
    total = machine if cap_bytes is None else min(cap_bytes, free)
    if cap_bytes is not None and cap_bytes > free:
        logger.warning(
            "less memory is free than --memory asks asked_gib=%.2f free_gib=%.2f", cap_bytes / GIB, free / GIB
        )
    overhead = PROCESS_OVERHEAD_BYTES if device.type == "cpu" else 0
    if total <= overhead:
        raise ConfigError(
            f"--memory {total / GIB:.2f}GiB: a worker's own process takes {overhead / GIB:.2f} GiB; lend more than that"
        )
    is_cpu = device.type == "cpu"
    return Lending(total - overhead, machine if is_cpu else 0, is_cpu and cap_bytes is None)


def measure_profile(device: torch.device, lent: Lending, host_id: str) -> WorkerProfile:
    """Measure the device for about a second: matrix-vector bandwidth and matrix rate by dtype.

    Whatever else runs on the machine (other workers, just started and measuring too) disturbs it for moments. So all is
    measured in turns, several times over, and what the best tenth of the turns reached counts (docs/decisions/0015).
    """
    vector, matrix, overhead = defaultdict[str, list[float]](list), defaultdict[str, list[float]](list), list[float]()
    small = torch.ones(1, 64, device=device)
    for _ in range(_PASSES):
        for dtype in MEASURED_DTYPES:
            name = str(dtype).removeprefix("torch.")
            vector_s, matrix_s = _measure(device, dtype)
            vector[name] += vector_s
            matrix[name] += matrix_s
        overhead += _seconds(device, lambda: small + small, _SMALL_S)
    profile = WorkerProfile(
        device=str(device),
        device_name=device_name(device)[:128],
        threads=torch.get_num_threads() if device.type == "cpu" else 1,
        memory_bytes=lent.memory_bytes,
        weight_bytes_per_s={name: 1 / undisturbed_s(times) for name, times in vector.items()},
        matmul_flops_per_s={name: 1 / undisturbed_s(times) for name, times in matrix.items()},
        layer_overhead_s=_LAYER_ADDITIONS * undisturbed_s(overhead),
        host_id=host_id,
        machine_bytes=lent.machine_bytes,
        shares_machine=lent.shares_machine,
    )
    logger.info(
        "device measured read_gb_per_s=%s gflops=%s layer_overhead_us=%.0f",
        _in_billions(profile.weight_bytes_per_s),
        _in_billions(profile.matmul_flops_per_s),
        profile.layer_overhead_s * 1e6,
    )
    return profile


def undisturbed_s(times: Sequence[float]) -> float:
    """What one call takes if nothing gets between: the slowest of the quickest tenth, as a single one may be luck."""
    return sorted(times)[len(times) // 10]


def _in_billions(rates: dict[str, float]) -> str:
    return ",".join(f"{name}:{rate / 1e9:.1f}" for name, rate in rates.items())


def _measure(device: torch.device, dtype: torch.dtype) -> tuple[list[float], list[float]]:
    """Seconds per weight byte of matrix-vector products, and per operation of matrix products; one of each call."""
    side, batch, total = (2048, 64, 64 << 20) if device.type == "cpu" else (8192, 2048, 512 << 20)
    count = max(2, total // (side * side * dtype.itemsize))
    # Several, more than caches hold; in the layout that stages multiply with.
    weights = [make_matrix(torch.full((side, side), 0.01, dtype=dtype, device=device)) for _ in range(count)]
    vector = torch.full((1, side), 0.01, dtype=dtype, device=device)
    matrix = torch.full((batch, side), 0.01, dtype=dtype, device=device)
    turns = iter(range(1 << 30))
    vector_s = _seconds(device, lambda: weights[next(turns) % count](vector), _VECTOR_S)
    matrix_s = _seconds(device, lambda: weights[0](matrix), _MATRIX_S)
    return [s / weights[0].nbytes for s in vector_s], [s / (2 * batch * side * side) for s in matrix_s]


def _seconds(device: torch.device, work: Callable[[], object], budget_s: float) -> list[float]:
    """The time of each call, for as long as the budget lasts."""
    times: list[float] = []
    with torch.inference_mode():
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = now = time.perf_counter()
        while now - started < budget_s or not times:
            before = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            now = time.perf_counter()
            times.append(max(now - before, 1e-9))
    return times
