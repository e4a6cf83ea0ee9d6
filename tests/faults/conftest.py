"""One LocalSwarm per layout; a test replaces only what it killed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from skynet.client.swarm import Completion, CompletionStream, Event
from skynet.testing import cuts
from skynet.testing.local_swarm import LocalSwarm, LocalSwarmConfig
from skynet.testing.processes import NodeProcess

LAYOUTS = ("2x1", "3x1", "1x2", "1x3", "2x2")
PROMPT = "Once upon a time"
MAX_TOKENS = 96
LONG = 256  # tokens of an answer that a change of plan, without anybody's loss, must come into the middle of
Fault = Callable[["Patient"], None]


@dataclass
class Patient:
    """A swarm under treatment: hurts itself on command, and is made whole again afterwards."""

    swarm: LocalSwarm
    undisturbed: dict[int, CompletionStream]  # by number of tokens

    def serving(self) -> list[list[NodeProcess]]:
        """By stage: the workers that serve now, or next if none does."""
        replica = next(r for r in self.swarm.wait_serving(60)["replicas"] if r["phase"] == "serving")
        return [[self.swarm.workers[w.partition(".")[2]] for w in stage["workers"]] for stage in replica["stages"]]

    def holding(self, stage: int = -1, rank: int = -1) -> NodeProcess:
        """The worker at this place of the layout that serves now."""
        return self.serving()[stage][rank]

    def answer(self, at: dict[int, Fault], max_tokens: int = MAX_TOKENS, timeout_s: float = 90) -> CompletionStream:
        """The same prompt again, hurt at these token counts; each fault strikes once."""
        pending = dict(at)

        def strike(stream: CompletionStream, _: Event) -> None:
            for count in [c for c in pending if len(stream.token_ids) >= c]:
                pending.pop(count)(self)

        completion = Completion(prompt=PROMPT, max_tokens=max_tokens, ignore_eos=True, timeout_s=60)
        stream = self.swarm.complete(completion, strike, timeout_s)
        assert not pending, f"the answer ended before the faults at {sorted(pending)}"
        return stream

    def assert_undisturbed(self, stream: CompletionStream) -> None:
        """Same text, each token once."""
        undisturbed = self.undisturbed[stream.completion.max_tokens]
        assert stream.token_ids == undisturbed.token_ids
        assert stream.text == undisturbed.text

    def assert_moved(self) -> None:
        """Of the answer that just ended, those who serve now computed the rest."""
        (replica,) = [r for r in self.swarm.status()["replicas"] if r["phase"] == "serving"]
        assert 0 < replica["tokens_done"] < LONG, "the change of plan came before or after the answer, not into it"

    def heal(self, num_missing: int = 0, num_spare: int = 0) -> None:
        """Bring back as many workers as the layout has (some fewer, some more), and wait until they all serve."""
        self.swarm.mend()
        for name, node in list(self.swarm.workers.items()):
            node.resume()
            if node.is_interrupted:  # it leaves, and may take a moment
                node.wait(30)
            if not node.is_running:
                del self.swarm.workers[name]
        num_serving = self.swarm.num_workers - num_missing
        num_lacking = num_serving + num_spare - len(self.swarm.workers)
        started = [self.swarm.start_worker() for _ in range(num_lacking)]
        for _ in range(-num_lacking):
            _, node = self.swarm.workers.popitem()
            node.stop()
        for node in started:
            node.wait_for("worker ready", 60)
        self.swarm.wait_serving(60, num_workers=num_serving)


def kill_last(patient: Patient) -> None:
    patient.holding(-1, -1).kill()


def kill_first(patient: Patient) -> None:
    patient.holding(0, 0).kill()


def cut_neighbours(patient: Patient) -> None:
    """Between the first two workers that exchange something, ranks of a stage or stages; one alone has no neighbour."""
    names = [node.name for stage in patient.serving() for node in stage]
    if len(names) > 1:
        patient.swarm.cut(*names[:2])


def cut_off(patient: Patient) -> None:
    """Between the coordinator and the worker that samples."""
    patient.swarm.cut("coordinator", patient.holding(-1, 0).name)


def join(patient: Patient) -> None:
    patient.swarm.start_worker().wait_for("worker ready", 60)


def join_mid_answer(patient: Patient) -> None:
    """Those who serve are held until the newcomer is there: it takes longer to start than they to answer."""
    with held(patient.holding(-1, -1)):
        join(patient)


@contextmanager
def held(node: NodeProcess) -> Iterator[None]:
    """It stands still for a second at a time, and says in between that it lives: nobody takes it for lost."""
    is_over = threading.Event()

    def hold() -> None:
        while not is_over.is_set():
            node.pause()
            is_over.wait(1.0)
            node.resume()
            is_over.wait(0.02)

    holder = threading.Thread(target=hold, name=f"hold-{node.name}")
    holder.start()
    try:
        yield
    finally:
        is_over.set()
        holder.join()


@pytest.fixture(scope="module", params=LAYOUTS)
def shared_patient(request: pytest.FixtureRequest) -> Iterator[Patient]:
    config = LocalSwarmConfig(layout=request.param, dtype="float32")
    with LocalSwarm(config) as swarm:
        completions = {n: Completion(prompt=PROMPT, max_tokens=n, ignore_eos=True) for n in (MAX_TOKENS, LONG)}
        yield Patient(swarm, {n: swarm.complete(completion) for n, completion in completions.items()})


@pytest.fixture(scope="session")
def cuttable() -> None:
    if reason := cuts.missing():
        pytest.skip(reason)


@pytest.fixture
def patient(shared_patient: Patient) -> Patient:
    shared_patient.heal()
    return shared_patient


@pytest.fixture
def short_patient(shared_patient: Patient) -> Patient:
    """One worker fewer than the layout needs."""
    shared_patient.heal(num_missing=1)
    return shared_patient


@pytest.fixture
def rich_patient(shared_patient: Patient) -> Patient:
    """One worker more than the layout needs, so that something is left to lose."""
    shared_patient.heal(num_spare=1)
    return shared_patient
