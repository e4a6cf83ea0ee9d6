"""One LocalSwarm per layout; a test replaces only what it killed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest

from skynet.client.swarm import Completion, CompletionStream, Event
from skynet.testing import cuts
from skynet.testing.local_swarm import LocalSwarm, LocalSwarmConfig
from skynet.testing.processes import NodeProcess

LAYOUTS = ("2x1", "3x1", "1x2", "1x3", "2x2")
PROMPT = "Once upon a time"
MAX_TOKENS = 96
Fault = Callable[["Patient"], None]


@dataclass
class Patient:
    """A swarm under treatment: hurts itself on command, and is made whole again afterwards."""

    swarm: LocalSwarm
    undisturbed: CompletionStream
    victims: Iterator[str] = field(default_factory=lambda: itertools.repeat(""))

    def serving(self) -> list[list[NodeProcess]]:
        """By stage: the workers that serve now, or next if none does."""
        replica = next(r for r in self.swarm.wait_serving(60)["replicas"] if r["phase"] == "serving")
        return [[self.swarm.workers[w.partition(".")[2]] for w in stage["workers"]] for stage in replica["stages"]]

    def holding(self, stage: int = -1, rank: int = -1) -> NodeProcess:
        """The worker at this place of the layout that serves now."""
        return self.serving()[stage][rank]

    def answer(self, at: dict[int, Fault], timeout_s: float = 90) -> CompletionStream:
        """The same prompt again, hurt at these token counts; each fault strikes once."""
        pending = dict(at)

        def strike(stream: CompletionStream, _: Event) -> None:
            for count in [c for c in pending if len(stream.token_ids) >= c]:
                pending.pop(count)(self)

        completion = Completion(prompt=PROMPT, max_tokens=MAX_TOKENS, ignore_eos=True, timeout_s=60)
        stream = self.swarm.complete(completion, strike, timeout_s)
        assert not pending, f"the answer ended before the faults at {sorted(pending)}"
        return stream

    def assert_undisturbed(self, stream: CompletionStream) -> None:
        """Same text, each token once."""
        assert stream.token_ids == self.undisturbed.token_ids
        assert stream.text == self.undisturbed.text

    def heal(self) -> None:
        """Bring back as many workers as the layout has, and wait until they all serve."""
        self.swarm.mend()
        for name, node in list(self.swarm.workers.items()):
            node.resume()
            if node.is_interrupted:  # it leaves, and may take a moment
                node.wait(30)
            if not node.is_running:
                del self.swarm.workers[name]
        while len(self.swarm.workers) < self.swarm.num_workers:
            self.swarm.start_worker()
        while len(self.swarm.workers) > self.swarm.num_workers:
            name, node = self.swarm.workers.popitem()
            node.stop()
        self.swarm.wait_serving(60, num_workers=self.swarm.num_workers)


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


@pytest.fixture(scope="module", params=LAYOUTS)
def shared_patient(request: pytest.FixtureRequest) -> Iterator[Patient]:
    config = LocalSwarmConfig(layout=request.param, dtype="float32")
    with LocalSwarm(config) as swarm:
        completion = Completion(prompt=PROMPT, max_tokens=MAX_TOKENS, ignore_eos=True)
        yield Patient(swarm, swarm.complete(completion))


@pytest.fixture(scope="session")
def cuttable() -> None:
    if reason := cuts.missing():
        pytest.skip(reason)


@pytest.fixture
def patient(shared_patient: Patient) -> Patient:
    shared_patient.heal()
    return shared_patient
