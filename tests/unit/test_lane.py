"""The fast lane: what is sealed arrives whole, what is tampered with doesn't, and no stranger gets one."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable, Iterator

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from skynet.errors import MalformedMessage
from skynet.protocol.data_frame import DataFrame, Tag, data_header
from skynet.protocol.ids import PeerId
from skynet.protocol.lane import RECORD_BYTES, Lane, LaneEnded, LaneOffer
from skynet.protocol.lanes import MAX_STRANGERS, OPEN_S, Lanes
from skynet.protocol.plan import Epoch

KEY = bytes(range(32))
HEADER = data_header(Epoch(1, 2), Tag(3, 4, 5))
LIMIT = 4 << 20
PEER = PeerId("peer.cpu")


@pytest.fixture
def wires() -> Iterator[tuple[socket.socket, socket.socket]]:
    near, far = socket.socketpair()
    yield near, far
    near.close()
    far.close()


def lane(wire: socket.socket, *, is_dialler: bool) -> Lane:
    return Lane(wire, KEY, is_dialler=is_dialler, max_payload_bytes=LIMIT)


def all_frames(sender: Lane, receiver: Lane, count: int) -> list[DataFrame]:
    frames: list[DataFrame] = []
    until = time.monotonic() + 10
    while len(frames) < count:
        assert time.monotonic() < until
        sender.flush()
        frames += receiver.receive()
    return frames


@pytest.mark.parametrize("size", [0, 1, 4096, RECORD_BYTES, RECORD_BYTES + 1, LIMIT])
def test_frames_of_every_size_arrive_whole_both_ways(wires: tuple[socket.socket, socket.socket], size: int) -> None:
    a, b = lane(wires[0], is_dialler=True), lane(wires[1], is_dialler=False)
    payload = bytes(range(256)) * (size // 256) + bytes(size % 256)
    for sender, receiver in ((a, b), (b, a)):
        sender.send(HEADER, payload)
        sender.send(HEADER, b"next")
        whole, following = all_frames(sender, receiver, 2)
        assert (whole.header, bytes(whole.payload)) == (HEADER, payload)
        assert bytes(following.payload) == b"next"


def test_record_keeps_its_bytes(wires: tuple[socket.socket, socket.socket]) -> None:
    lane(wires[0], is_dialler=True).send(HEADER, b"abc")
    both = HKDF(SHA256(), 64, None, b"skynet/v1/lane").derive(KEY)
    length = struct.pack("<I", 8 + 24 + 3 + 16)
    sealed = AESGCM(both[:32]).encrypt(bytes(12), struct.pack("<Q", 3) + HEADER + b"abc", length)
    assert wires[1].recv(4096) == length + sealed


@pytest.mark.parametrize("what", ["altered", "repeated", "reflected", "too long", "cut short"])
def test_tampered_record_never_becomes_a_frame(wires: tuple[socket.socket, socket.socket], what: str) -> None:
    near, far = wires
    sealer = lane(near, is_dialler=True)
    sealer.send(HEADER, b"payload")
    record = far.recv(4096)
    hostile = {
        "altered": record[:-1] + bytes([record[-1] ^ 1]),
        "repeated": record + record,
        "reflected": record,
        "too long": struct.pack("<I", 1 << 30) + record[4:],
        "cut short": struct.pack("<I", 15) + record[4:],
    }[what]
    receiver = sealer if what == "reflected" else lane(far, is_dialler=False)
    (far if what == "reflected" else near).sendall(hostile)
    with pytest.raises(MalformedMessage):
        receiver.receive()


def test_payload_longer_than_allowed_is_refused_before_it_comes(wires: tuple[socket.socket, socket.socket]) -> None:
    sender = Lane(wires[0], KEY, is_dialler=True, max_payload_bytes=LIMIT)
    receiver = Lane(wires[1], KEY, is_dialler=False, max_payload_bytes=1000)
    sender.send(HEADER, bytes(1001))
    with pytest.raises(MalformedMessage, match="at most 1000"):
        receiver.receive()


def test_end_of_a_lane_is_told(wires: tuple[socket.socket, socket.socket]) -> None:
    receiver = lane(wires[1], is_dialler=False)
    wires[0].close()
    with pytest.raises(LaneEnded):
        receiver.receive()


@pytest.mark.parametrize("payload", [b"", bytes(49), bytes(51), bytes(50)])
def test_offer_of_another_form_is_refused(payload: bytes) -> None:
    with pytest.raises(MalformedMessage):
        LaneOffer.decode(payload)


class Meeting:
    """A side that listens and one that dials, driven by hand."""

    def __init__(self) -> None:
        self.listening, self.dialling = Lanes(["127.0.0.1"], LIMIT), Lanes([], LIMIT)
        self.sockets: list[socket.socket] = []

    def until(self, is_done: Callable[[], object], now: float | None = None) -> None:
        deadline = time.monotonic() + 5
        while not is_done():
            assert time.monotonic() < deadline
            for side in (self.listening, self.dialling):
                side.serve(time.monotonic() if now is None else now)

    def stranger(self, port: int) -> socket.socket:
        self.sockets.append(socket.create_connection(("127.0.0.1", port), timeout=5))
        return self.sockets[-1]

    def close(self) -> None:
        for connection in self.sockets:
            connection.close()
        self.listening.close()
        self.dialling.close()


@pytest.fixture
def meeting() -> Iterator[Meeting]:
    built = Meeting()
    yield built
    built.close()


def test_offer_opens_one_lane_once(meeting: Meeting) -> None:
    offer = meeting.listening.offer(PEER)
    assert offer is not None
    meeting.dialling.dial(PEER, "127.0.0.1", offer, time.monotonic())
    meeting.until(lambda: meeting.listening.get(PEER) and meeting.dialling.get(PEER))
    again = meeting.stranger(offer.port)
    again.sendall(offer.ticket)
    meeting.until(lambda: is_closed(again))


def test_stranger_without_a_ticket_is_closed(meeting: Meeting) -> None:
    offer = meeting.listening.offer(PEER)
    assert offer is not None
    wrong = meeting.stranger(offer.port)
    wrong.sendall(bytes(16))
    meeting.until(lambda: is_closed(wrong))
    silent = meeting.stranger(offer.port)
    meeting.until(lambda: len(meeting.listening.polled()) > 1)
    meeting.until(lambda: is_closed(silent), now=time.monotonic() + OPEN_S + 1)
    assert meeting.listening.get(PEER) is None


def test_strangers_are_bounded(meeting: Meeting) -> None:
    offer = meeting.listening.offer(PEER)
    assert offer is not None
    for _ in range(MAX_STRANGERS + 20):
        meeting.stranger(offer.port)
        meeting.listening.serve(time.monotonic())
    meeting.until(lambda: len(meeting.listening.polled()) <= MAX_STRANGERS + 1)


def is_closed(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return connection.recv(1) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True
