"""An admitted worker sends its neighbours nonsense in steps: the real compute thread, on real sockets, outlives it."""

from __future__ import annotations

import json
import queue
import struct
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import zmq
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from skynet.models.embedded import EMBEDDED_DIR
from skynet.models.tensors import DirectorySource
from skynet.protocol.channel import DataChannel
from skynet.protocol.codec import Decoder, encode
from skynet.protocol.data_frame import Tag
from skynet.protocol.entrance import COORDINATOR
from skynet.protocol.ids import PeerId, SequenceId
from skynet.protocol.messages import WORK_TO_COORDINATOR, Linked, PeerInfo
from skynet.protocol.plan import Epoch
from skynet.protocol.sockets import Port, SocketFactory
from skynet.protocol.steps import RunStep, SamplingParams, SequencePart, StepDone, StepFailed
from skynet.testing.replica import assignments
from skynet.worker.compute import Attach, ComputeThread, Drop, Install, LinkUp, Report
from skynet.worker.stage.loader import load_stage
from skynet.worker.stage.stage import Stage
from skynet.worker.zmq_group import PayloadKind

WAIT_S = 10.0
HOST = "127.0.0.1"
CONFIG = json.loads((EMBEDDED_DIR / "config.json").read_text())
WIDTH, VOCAB = CONFIG["hidden_size"], CONFIG["vocab_size"]
# The victim is rank 0 of the last stage: it gets hidden states from the stage before, and sums and samples with rank 1.
UPSTREAM, VICTIM, NEIGHBOUR = PeerId("s0r0"), PeerId("s1r0"), PeerId("s1r1")
LAYOUT = assignments(CONFIG, [[1.0], [1.0, 1.0]])
NUM_SUMS = 2 * len(LAYOUT[1][0].layers)
NUM_TOKENS = 3
HONEST_HIDDEN = np.ones((NUM_TOKENS, WIDTH), dtype=np.float32).tobytes()
HONEST_SUM = bytes(len(HONEST_HIDDEN))


def gathered(values: Sequence[float]) -> bytes:
    return struct.pack("<BQ", 1, len(values)) + np.array(values, dtype=np.float32).tobytes()


HONEST_CANDIDATES = gathered([1, 1e9, VOCAB - 1])  # one row's: how many, values, ids


class Swarm:
    """The victim's compute thread, and what it talks to: a coordinator's socket and two workers' data channels."""

    def __init__(self) -> None:
        peers = (COORDINATOR, VICTIM, UPSTREAM, NEIGHBOUR)
        self.factories = {peer: SocketFactory(*zmq.curve_keypair()) for peer in peers}
        for mine, factory in self.factories.items():
            for other, theirs in self.factories.items():
                if other != mine:
                    factory.allow(theirs.public_key, other, {"data", "work", "relay"})
        self.reports: queue.Queue[Report] = queue.Queue()
        self.compute = ComputeThread(self.factories[VICTIM], [HOST], torch.device("cpu"), None, self.reports.put)
        self.compute.start()
        self.threads = {peer: ThreadPoolExecutor(1) for peer in (UPSTREAM, NEIGHBOUR)}
        self.channels = {
            peer: thread.submit(DataChannel, self.factories[peer], [HOST]).result(WAIT_S)
            for peer, thread in self.threads.items()
        }
        self.work, self.relay = self._attach()
        self.stage: Stage = load_stage(CONFIG, LAYOUT[1][0], DirectorySource(EMBEDDED_DIR), torch.device("cpu"))
        self.epoch = Epoch(1, 0)

    def _attach(self) -> tuple[Port, Port]:
        factory = self.factories[COORDINATOR]
        work, relay = (factory.bind_router(domain, [HOST]) for domain in ("work", "relay"))
        endpoints = [f"tcp://{HOST}:{port.number}" for port in (work, relay)]
        self.compute.order(Attach(endpoints[0], endpoints[1], factory.public_key, COORDINATOR))
        assert work.socket.poll(int(WAIT_S * 1000))
        received = work.receive()
        assert received is not None
        self.routing_id = received.routing_id
        return work, relay

    def next_epoch(self) -> None:
        """The same shard again, with new links where there are none."""
        self.compute.order(Drop(self.epoch))
        assert all(self.has_cut(peer) for peer in self.channels)
        self.epoch = Epoch(1, self.epoch.n + 1)
        peers = [
            PeerInfo(
                peer_id=peer,
                curve_key=self.factories[peer].public_key,
                hosts=(HOST,),
                data_port=channel.port,
                bulk_port=1,
            )
            for peer, channel in self.channels.items()
        ]
        stage = self.stage.with_fresh_cache(LAYOUT[1][0])
        self.compute.order(Install(self.epoch, LAYOUT[1][0], stage, tuple(peers)))
        self.compute.order(LinkUp(self.epoch))
        assert self.compute.channel is not None
        key, addresses = self.factories[VICTIM].public_key, [(HOST, self.compute.channel.port)]
        until = time.monotonic() + WAIT_S
        for future in [
            self.threads[peer].submit(channel.connect, VICTIM, key, addresses, until)
            for peer, channel in self.channels.items()
        ]:
            future.result(WAIT_S)
        while not isinstance(report := self.reports.get(timeout=WAIT_S), Linked):
            pass
        assert not report.unreachable

    def send(self, sender: PeerId, kind: PayloadKind, payload: bytes, exchange: int = 0) -> None:
        channel, tag = self.channels[sender], Tag(kind, 0, exchange)
        until = time.monotonic() + WAIT_S
        self.threads[sender].submit(channel.send, VICTIM, self.epoch, tag, payload, until).result(WAIT_S)

    def step(
        self,
        hidden: bytes = HONEST_HIDDEN,
        addend: bytes = HONEST_SUM,
        candidates: bytes = HONEST_CANDIDATES,
        sample: SamplingParams | None = None,
    ) -> StepDone | StepFailed:
        """One step in which the others send that; `addend` in the second sum."""
        ids = tuple(range(NUM_TOKENS))
        part = SequencePart(
            sequence_id=SequenceId(1), token_ids=ids, start=0, block_table=(0,), sample=sample or SamplingParams()
        )
        run = RunStep(epoch=self.epoch, step=0, parts=(part,), timeout_s=WAIT_S)
        self.send(UPSTREAM, PayloadKind.HIDDEN, hidden)
        for exchange in range(1, NUM_SUMS + 1):
            self.send(NEIGHBOUR, PayloadKind.SUM, addend if exchange == 2 else HONEST_SUM, exchange)
        self.send(NEIGHBOUR, PayloadKind.GATHER, candidates, NUM_SUMS + 1)
        self.work.socket.send_multipart([self.routing_id, *encode(run)])
        assert self.work.socket.poll(int(WAIT_S * 1000)), "the victim says nothing any more"
        received = self.work.receive()
        assert received is not None
        reply, _ = Decoder(*WORK_TO_COORDINATOR).decode([frame.buffer for frame in received.frames])
        assert isinstance(reply, StepDone | StepFailed)
        return reply

    def has_cut(self, peer: PeerId) -> bool:
        """Whether the victim closed the link: the other side sees that."""
        channel, until = self.channels[peer], time.monotonic() + WAIT_S
        while channel.is_connected(VICTIM) and time.monotonic() < until:
            self.threads[peer].submit(channel.wait, (), time.monotonic() + 0.01).result(WAIT_S)
        return not channel.is_connected(VICTIM)

    def close(self) -> None:
        self.compute.stop()
        self.work.close()
        self.relay.close()
        for peer, thread in self.threads.items():
            thread.submit(self.channels[peer].close).result(WAIT_S)
            thread.shutdown()
        for factory in self.factories.values():
            factory.close()


@pytest.fixture(scope="module")
def swarm() -> Iterator[Swarm]:
    torch.set_num_threads(1)
    built = Swarm()
    yield built
    built.close()


def is_blamed(swarm: Swarm, reply: StepDone | StepFailed, culprit: PeerId) -> bool:
    assert isinstance(reply, StepFailed), "nonsense was taken for a result"
    return reply.is_nonsense and reply.suspect == culprit and swarm.has_cut(culprit) and swarm.compute.is_alive


@pytest.mark.parametrize(
    ("culprit", "nonsense"),
    [
        (UPSTREAM, {"hidden": HONEST_HIDDEN[:-4]}),
        (UPSTREAM, {"hidden": b""}),
        (NEIGHBOUR, {"addend": HONEST_SUM[:-4]}),
        (NEIGHBOUR, {"addend": HONEST_SUM * 2}),
        (NEIGHBOUR, {"candidates": b""}),
        (NEIGHBOUR, {"candidates": b"\xff"}),
        (NEIGHBOUR, {"candidates": struct.pack("<B2Q", 2, 0, 2**63)}),
        (NEIGHBOUR, {"candidates": struct.pack("<B8Q", 8, 0, *[2**31] * 7)}),
        (NEIGHBOUR, {"candidates": struct.pack("<B", 0) + bytes(4)}),
        (NEIGHBOUR, {"candidates": struct.pack("<B2Q", 2, 1, 3) + HONEST_CANDIDATES[9:]}),
        (NEIGHBOUR, {"candidates": gathered([1e30, 1, 2])}),
        (NEIGHBOUR, {"candidates": gathered([float("nan"), 1, 2])}),
        (NEIGHBOUR, {"candidates": gathered([-1, 1, 2])}),
        (NEIGHBOUR, {"candidates": gathered([1, 1, float("nan")])}),
        (NEIGHBOUR, {"candidates": gathered([1, 1, VOCAB])}),
        (NEIGHBOUR, {"candidates": gathered([1, 1, 0.5])}),
        (NEIGHBOUR, {"candidates": gathered([1, 1, 0])}),  # a row of rank 0's
        (NEIGHBOUR, {"candidates": gathered([2, 1, 1, VOCAB - 1, VOCAB - 2])}),
    ],
)
def test_nonsense_fails_the_step_names_its_sender_and_cuts_it_off(
    swarm: Swarm, culprit: PeerId, nonsense: dict[str, bytes]
) -> None:
    swarm.next_epoch()
    assert is_blamed(swarm, swarm.step(**nonsense), culprit)  # type: ignore[arg-type]
    swarm.next_epoch()
    assert swarm.step() == StepDone(epoch=swarm.epoch, step=0, token_ids=(VOCAB - 1,))


shaped = st.builds(
    lambda extents, data: struct.pack(f"<B{len(extents)}Q", len(extents), *extents) + data,
    st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 8), max_size=9),
    st.binary(max_size=64),
)
numbers = st.builds(gathered, st.lists(st.floats(width=32) | st.sampled_from([1.0, 2.0, 2047.0]), max_size=12))
payloads = st.binary(max_size=80) | shaped | numbers
sampling = st.sampled_from(
    [
        SamplingParams(),
        SamplingParams(temperature=0.8),
        SamplingParams(temperature=1.0, top_k=3, top_p=0.9),
        SamplingParams(temperature=1.0, min_p=0.1, logprobs=2),
    ]
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.sampled_from(["hidden", "addend", "candidates", "candidates"]), payload=payloads, sample=sampling)
@example(where="candidates", payload=gathered([2, 5, float("inf"), 2046, 2047]), sample=SamplingParams(temperature=0.1))
@example(where="candidates", payload=gathered([1, 1, 5, 2047, 5, 6, 5, 2047]), sample=SamplingParams(logprobs=1))
@example(where="candidates", payload=gathered([1, 1, 5, 2047, 5, 4, 5, 2047]), sample=SamplingParams(logprobs=1))
def test_whatever_a_neighbour_sends_the_step_ends_and_the_thread_lives(
    swarm: Swarm, where: str, payload: bytes, sample: SamplingParams
) -> None:
    swarm.next_epoch()
    reply = swarm.step(**{where: payload}, sample=sample)
    if isinstance(reply, StepDone):
        assert where == "candidates"
        assert all(0 <= token_id < VOCAB for token_id in reply.token_ids)
    else:
        assert is_blamed(swarm, reply, UPSTREAM if where == "hidden" else NEIGHBOUR)


@pytest.mark.parametrize("error", [TypeError("a bug"), KeyError("a bug"), MemoryError(), zmq.ZMQError(5)])
def test_a_bug_in_a_step_fails_that_step_alone_and_is_logged_with_its_traceback(
    swarm: Swarm, error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise error

    swarm.next_epoch()
    with monkeypatch.context() as patched:
        patched.setattr(Stage, "run", fail)
        reply = swarm.step()
    assert isinstance(reply, StepFailed)
    assert (reply.suspect, reply.is_nonsense) == (None, False)
    assert type(error).__name__ in reply.reason
    assert any(record.exc_info for record in caplog.records)
    swarm.next_epoch()
    assert isinstance(swarm.step(), StepDone)
