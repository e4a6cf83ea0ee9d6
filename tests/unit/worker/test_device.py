"""How a worker measures its device."""

from __future__ import annotations

import math
import random

import torch

from skynet.protocol.profile import PROCESS_OVERHEAD_BYTES
from skynet.worker.device import MEASURED_DTYPES, Lending, lending, measure_profile, undisturbed_s


def test_what_disturbs_most_of_the_turns_doesnt_change_a_rate() -> None:
    rng = random.Random(1)
    quiet = [0.001 * rng.uniform(1, 1.02) for _ in range(200)]
    busy = [s * rng.choice([1, 1.5, 3, 10, 10]) for s in quiet]
    assert math.isclose(undisturbed_s(busy), undisturbed_s(quiet), rel_tol=0.03)


def test_one_lucky_turn_doesnt_make_a_device_fast() -> None:
    assert undisturbed_s([0.1, *[1.0] * 19]) == 1.0


def test_a_single_turn_is_all_there_is_to_go_by() -> None:
    assert undisturbed_s([0.5]) == 0.5


def test_a_profile_has_rates_for_every_dtype_and_what_was_lent() -> None:
    profile = measure_profile(torch.device("cpu"), Lending(123, 456, True), "box")
    names = {str(dtype).removeprefix("torch.") for dtype in MEASURED_DTYPES}
    assert set(profile.weight_bytes_per_s) == set(profile.matmul_flops_per_s) == names
    assert all(1e6 < rate < 1e13 for rate in profile.weight_bytes_per_s.values())
    assert 1e-6 < profile.layer_overhead_s < 0.1
    assert (profile.device, profile.memory_bytes, profile.host_id) == ("cpu", 123, "box")
    assert (profile.machine_bytes, profile.shares_machine) == (456, True)


def test_a_worker_without_memory_option_takes_part_of_the_machine_and_one_with_it_what_it_was_given() -> None:
    device = torch.device("cpu")
    alone, asked = lending(device, None), lending(device, 1 << 30)
    assert alone.shares_machine
    assert alone.memory_bytes == alone.machine_bytes - PROCESS_OVERHEAD_BYTES
    assert not asked.shares_machine
    assert asked.memory_bytes == (1 << 30) - PROCESS_OVERHEAD_BYTES
    assert asked.machine_bytes > asked.memory_bytes
