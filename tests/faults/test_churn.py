"""After many joins and losses nothing is left over; and losses at random moments change nothing."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import psutil
import pytest

from skynet.client.swarm import Completion
from skynet.testing import cuts
from skynet.testing.local_swarm import LocalSwarm, LocalSwarmConfig
from skynet.testing.processes import NodeProcess

from .conftest import LONG, MAX_TOKENS, PROMPT, Patient, cut_neighbours, cut_off, join_mid_answer, kill_first, kill_last

MIB = 1 << 20


def footprint(node: NodeProcess) -> dict[str, int]:
    """What a process holds that could leak."""
    process = psutil.Process(node.process.pid)
    return {
        "files": process.num_fds(),
        "threads": process.num_threads(),
        "sockets": len(process.net_connections(kind="tcp")),
        "memory": process.memory_info().rss,
    }


def settled(swarm: LocalSwarm, node: NodeProcess, at_most: dict[str, int] | None = None) -> dict[str, int]:
    """The footprint once one worker serves alone and has answered something; then until it is as small as it should be.

    What ended a moment ago takes one to be closed.
    """
    swarm.wait_serving(60, num_workers=1)
    swarm.complete(Completion(prompt=PROMPT, max_tokens=8))
    deadline = time.monotonic() + 15
    while True:
        swarm.status()
        found = footprint(node)
        is_small = at_most is None or all(found[what] <= at_most[what] for what in found)
        if is_small or time.monotonic() > deadline:
            return found


def churn(rounds: int, seed: int) -> None:
    """Random joins, losses and leaves around one worker that stays."""
    choose = random.Random(seed)
    # A leak of one in every round is more than this; the coordinator's thread pool fills slowly.
    slack = {"files": 2, "threads": 2 + rounds // 10, "sockets": 2, "memory": (24 + rounds // 2) * MIB}
    with LocalSwarm(LocalSwarmConfig(layout="2x1")) as swarm:
        stayer = swarm.workers["w0"]
        assert swarm.coordinator is not None
        swarm.workers["w1"].kill()
        swarm.workers.pop("w1")
        alone: dict[str, list[dict[str, int]]] = {swarm.coordinator.name: [], stayer.name: []}
        for number in range(rounds + 2):
            if number in (1, 2):  # what wasn't needed before is loaded by then, pools have begun to fill
                for node in (swarm.coordinator, stayer):
                    alone[node.name].append(settled(swarm, node))
            guest = swarm.start_worker()
            guest.wait_for("worker ready", 60)
            swarm.wait_serving(60, num_workers=2)
            if choose.random() < 0.5:
                guest.kill()
            else:
                guest.interrupt()
                guest.wait(30)
            swarm.workers.pop(guest.name)
        for node in (swarm.coordinator, stayer):
            at_most = {what: min(r[what] for r in alone[node.name]) + more for what, more in slack.items()}
            after = settled(swarm, node, at_most)
            assert all(after[what] <= at_most[what] for what in after), (node.name, alone[node.name], after)


@pytest.mark.timeout(180)
def test_nothing_leaks_over_a_few_joins_and_losses() -> None:
    churn(rounds=3, seed=1)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_nothing_leaks_over_fifty_joins_and_losses() -> None:
    churn(rounds=50, seed=2)


FAULTS: dict[str, Callable[[Patient], None]] = {
    "kill last": kill_last,
    "kill first": kill_first,
    "hang": lambda patient: patient.holding(0, 0).pause(),
    "leave": lambda patient: patient.holding(-1, 0).interrupt(),
    "join": join_mid_answer,
    "cut workers": cut_neighbours,
    "cut off": cut_off,
}


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(10))
def test_faults_at_random_moments_change_nothing(shared_patient: Patient, seed: int) -> None:
    choose, patient = random.Random(seed), shared_patient
    possible = sorted(name for name in FAULTS if not (name.startswith("cut") and cuts.missing()))
    for _ in range(3):
        moments = choose.sample(range(2, MAX_TOKENS - 10), k=choose.choice((1, 1, 2)))
        faults = {moment: FAULTS[choose.choice(possible)] for moment in moments}
        patient.heal(num_spare=len(faults) - 1)  # so that something is left to lose
        patient.assert_undisturbed(patient.answer(faults, LONG))
