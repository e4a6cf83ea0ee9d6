"""Hostile bytes on the data channel: one error, one link closed, others undisturbed."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import zmq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from skynet.errors import ProtocolError
from skynet.protocol.channel import DataChannel
from skynet.protocol.data_frame import HEADER_BYTES, FrameType, Tag, control_header, data_header, split
from skynet.protocol.ids import PeerId
from skynet.protocol.lane import Lane
from skynet.protocol.plan import Epoch
from skynet.protocol.sealed import SealedSession
from skynet.protocol.sockets import SocketFactory
from skynet.protocol.zap import answer

ALICE, MALLORY, VICTIM = PeerId("alice.cpu"), PeerId("mallory.cpu"), PeerId("victim.cpu")
EPOCH = Epoch(1, 1)


@given(first=st.binary(max_size=64), second=st.none() | st.binary(max_size=64))
def test_any_bytes_are_a_frame_or_a_protocol_error(first: bytes, second: bytes | None) -> None:
    try:
        frame = split(memoryview(first), None if second is None else memoryview(second))
    except ProtocolError:
        return
    assert frame.header == first[:HEADER_BYTES]
    assert bytes(frame.payload) == (first[HEADER_BYTES:] if second is None else second)


@given(arrived=st.binary(max_size=4096), sealed=st.none() | st.lists(st.binary(max_size=64), max_size=3))
def test_any_bytes_on_a_lane_are_refused_or_waited_for(arrived: bytes, sealed: list[bytes] | None) -> None:
    near, far = socket.socketpair()
    sender, receiver = (
        Lane(end, bytes(32), is_dialler=is_dialler, max_payload_bytes=1000)
        for end, is_dialler in ((near, True), (far, False))
    )
    try:
        for plaintext in sealed or ():  # a peer that has the key, and nothing sensible to say
            near.sendall(sender._seal(plaintext))
        near.sendall(arrived)
        with contextlib.suppress(ProtocolError):
            for frame in receiver.receive():
                assert frame.payload.nbytes <= 1000
    finally:
        sender.close()
        receiver.close()


@given(message=st.binary(max_size=128), is_initiator=st.booleans())
def test_any_bytes_from_the_relay_are_harmless(message: bytes, is_initiator: bool) -> None:
    session = SealedSession(b"s" * 32, b"a" * 40, b"b" * 40, is_initiator=is_initiator)
    with contextlib.suppress(ProtocolError):
        assert session.handle(message, lambda reply: None) is None
    assert not session.is_ready


@given(data=st.data())
def test_truncated_and_altered_sealed_messages_never_open(data: st.DataObject) -> None:
    a = SealedSession(b"s" * 32, b"a" * 40, b"b" * 40, is_initiator=True)
    b = SealedSession(b"s" * 32, b"b" * 40, b"a" * 40, is_initiator=False)
    answers: list[bytes] = []
    b.handle(a.offer(), answers.append)
    a.handle(answers[0], answers.append)
    sealed = bytearray(a.seal(b"payload"))
    if data.draw(st.booleans()):
        sealed = sealed[: data.draw(st.integers(0, len(sealed) - 1))]
    else:
        sealed[data.draw(st.integers(0, len(sealed) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(ProtocolError):
        b.handle(bytes(sealed), lambda reply: None)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(frames=st.lists(st.binary(max_size=40), max_size=12))
def test_zap_admits_no_made_up_request(frames: list[bytes]) -> None:
    factory = _factory()
    reply = answer(frames, factory.registry, now=0.0)
    assert reply is None or reply[4] == b"400"


_shared: list[SocketFactory] = []


def _factory() -> SocketFactory:
    if not _shared:
        _shared.append(SocketFactory(*zmq.curve_keypair()))
    return _shared[0]


@pytest.fixture(scope="module", autouse=True)
def _close_shared() -> Iterator[None]:
    yield
    while _shared:
        _shared.pop().close()


class Target:
    """A victim's channel and an honest peer's, each on its thread, and a hostile admitted peer's raw socket."""

    def __init__(self) -> None:
        self.victim, self.alice, self.mallory = (SocketFactory(*zmq.curve_keypair()) for _ in range(3))
        self.victim.allow(self.alice.public_key, ALICE, {"data"})
        self.victim.allow(self.mallory.public_key, MALLORY, {"data"})
        self.alice.allow(self.victim.public_key, VICTIM, {"data"})
        self.victims_thread, self.alices_thread = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self.channel = self.victims_thread.submit(DataChannel, self.victim, ["127.0.0.1"]).result(5)
        self.alices = self.alices_thread.submit(DataChannel, self.alice, ["127.0.0.1"]).result(5)
        self._link()
        self.step = 0
        self.raw = self.mallory.connect_dealer(f"tcp://127.0.0.1:{self.channel.port}", self.victim.public_key, VICTIM)

    def _link(self) -> None:
        port, until = self.alices.port, time.monotonic() + 10
        one = self.victims_thread.submit(
            self.channel.connect, ALICE, self.alice.public_key, [("127.0.0.1", port)], until
        )
        self.alices_thread.submit(self.alices.connect, VICTIM, self.victim.public_key, [], until).result(10)
        one.result(10)

    def alice_is_served(self) -> None:
        self.step += 1
        tag = Tag(1, self.step)
        self.alices_thread.submit(self.alices.send, VICTIM, EPOCH, tag, b"honest").result(5)
        got = self.victims_thread.submit(self.channel.recv, ALICE, EPOCH, tag, time.monotonic() + 5).result(10)
        assert bytes(got) == b"honest"

    def close(self) -> None:
        self.raw.close()
        self.victims_thread.submit(self.channel.close).result(5)
        self.alices_thread.submit(self.alices.close).result(5)
        for thread in (self.victims_thread, self.alices_thread):
            thread.shutdown()
        for factory in (self.victim, self.alice, self.mallory):
            factory.close()


@pytest.fixture(scope="module")
def target() -> Iterator[Target]:
    built = Target()
    yield built
    built.close()


hostile_frames = st.one_of(
    st.binary(max_size=80),
    st.builds(control_header, st.sampled_from(FrameType), st.integers(0, 2**32 - 1)),
    st.builds(
        lambda kind, step, exchange, epoch, n, data: data_header(Epoch(epoch, n), Tag(kind, step, exchange)) + data,
        st.integers(0, 2**16 - 1), st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1),
        st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.binary(max_size=64),
    ),
)  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(messages=st.lists(st.lists(hostile_frames, min_size=1, max_size=4), max_size=6))
def test_hostile_admitted_peer_disturbs_nobody_else(target: Target, messages: list[list[bytes]]) -> None:
    for message in messages:
        with contextlib.suppress(zmq.Again):
            target.raw.socket.send_multipart(message, zmq.NOBLOCK)
    target.alice_is_served()
    assert threading.active_count() < 40
    while target.raw.socket.poll(0):
        target.raw.receive()
