"""The data channel between real sockets on loopback, each side on a thread of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import pytest
import zmq

from skynet.errors import StepAborted, WorkerLost, WorkerTimeout
from skynet.protocol.admitted import AdmittedPeer
from skynet.protocol.channel import ChannelConfig, DataChannel
from skynet.protocol.data_frame import FrameType, Tag, control_header, data_header
from skynet.protocol.ids import PeerId
from skynet.protocol.links import DirectPath
from skynet.protocol.plan import Epoch
from skynet.protocol.relay import RelayServer
from skynet.protocol.sockets import SocketFactory
from skynet.protocol.wakeups import Note

T = TypeVar("T")
EPOCH = Epoch(1, 2)
TAG = Tag(kind=1, step=7, exchange=3)


class Side:
    """One worker: keys, channel, and the thread that owns it."""

    def __init__(self, name: str, config: ChannelConfig | None = None, key: tuple[bytes, bytes] | None = None) -> None:
        self.peer_id = PeerId(name)
        self.factory = SocketFactory(*(key or zmq.curve_keypair()))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        self.channel = self.run(lambda: DataChannel(self.factory, ["127.0.0.1"], config=config)).result(5)

    def run(self, work: Callable[[], T]) -> Future[T]:
        return self._thread.submit(work)

    def close(self) -> None:
        self.run(self.channel.close).result(10)
        self._thread.shutdown()
        self.factory.close()


@pytest.fixture
def relay() -> Iterator[tuple[SocketFactory, RelayServer]]:
    factory = SocketFactory(*zmq.curve_keypair())
    server = RelayServer(factory, ["127.0.0.1"])
    server.start()
    yield factory, server
    server.stop()
    factory.close()


def introduce(sides: Sequence[Side]) -> None:
    for side in sides:
        for other in sides:
            if side is not other:
                side.factory.allow(other.factory.public_key, other.peer_id, {"data"})


def link(a: Side, b: Side, a_port: int | None = None, b_port: int | None = None) -> None:
    """Both connect, to the other's real port unless told otherwise (0: no address)."""

    def addresses(port: int | None, other: Side) -> list[tuple[str, int]]:
        return [] if port == 0 else [("127.0.0.1", port or other.channel.port)]

    def connect(side: Side, other: Side, port: int | None) -> Future[None]:
        to = addresses(port, other)
        key = other.factory.public_key
        return side.run(lambda: side.channel.connect(other.peer_id, key, to, time.monotonic() + 5))

    waiting = [connect(a, b, b_port), connect(b, a, a_port)]
    for future in waiting:
        future.result(10)


def send(side: Side, to: Side, payload: bytes, tag: Tag = TAG, epoch: Epoch = EPOCH) -> None:
    side.run(lambda: side.channel.send(to.peer_id, epoch, tag, payload)).result(10)


def receive(side: Side, frm: Side, tag: Tag = TAG, epoch: Epoch = EPOCH, timeout_s: float = 5.0) -> Future[bytes]:
    return side.run(lambda: bytes(side.channel.recv(frm.peer_id, epoch, tag, time.monotonic() + timeout_s)))


@pytest.fixture
def make() -> Iterator[Callable[..., Side]]:
    sides: list[Side] = []

    def side(*args: object, **kwargs: object) -> Side:
        sides.append(Side(*args, **kwargs))  # type: ignore[arg-type]
        return sides[-1]

    yield side
    for built in sides:
        built.close()


@pytest.fixture
def pair(make: Callable[..., Side]) -> tuple[Side, Side]:
    a, b = make("a.cpu"), make("b.cpu")
    introduce([a, b])
    link(a, b)
    return a, b


def test_headers_keep_their_bytes() -> None:
    golden = bytes.fromhex("0104 0100 01000000 02000000 0700000000000000 03000000")
    assert data_header(EPOCH, TAG) == golden
    assert control_header(FrameType.PING, 9) == bytes.fromhex("0105 0000 00000000 00000000 0000000000000000 09000000")


@pytest.mark.parametrize("size", [0, 1, 4096, 65536, 65537, 3_000_000])
def test_payloads_of_every_size_arrive_both_ways(pair: tuple[Side, Side], size: int) -> None:
    a, b = pair
    payload = bytes(range(256)) * (size // 256) + bytes(size % 256)
    send(a, b, payload)
    send(b, a, payload)
    assert receive(b, a).result(10) == payload
    assert receive(a, b).result(10) == payload


@pytest.mark.parametrize(("a_port", "b_port"), [(None, None), (0, None), (None, 0)])
@pytest.mark.parametrize("is_swapped", [False, True])
def test_one_reachable_side_is_enough(
    make: Callable[..., Side], a_port: int | None, b_port: int | None, is_swapped: bool
) -> None:
    keys = sorted((zmq.curve_keypair() for _ in range(2)), reverse=is_swapped)
    a, b = make("a.cpu", key=keys[0]), make("b.cpu", key=keys[1])
    introduce([a, b])
    link(a, b, a_port, b_port)
    send(a, b, b"there")
    send(b, a, b"back")
    assert receive(b, a).result(10) == b"there"
    assert receive(a, b).result(10) == b"back"
    assert a.run(lambda: a.channel.path(b.peer_id)).result(5) == "direct"


def test_a_dead_address_beside_a_good_one_does_no_harm(make: Callable[..., Side]) -> None:
    a, b = make("a.cpu"), make("b.cpu")
    introduce([a, b])
    key = b.factory.public_key
    addresses = [("192.0.2.1", 9), ("127.0.0.1", 1), ("::1", b.channel.port), ("127.0.0.1", b.channel.port)]
    one = a.run(lambda: a.channel.connect(b.peer_id, key, addresses, time.monotonic() + 5))
    other = b.run(lambda: b.channel.connect(a.peer_id, a.factory.public_key, [], time.monotonic() + 5))
    one.result(10)
    other.result(10)
    send(a, b, b"x")
    assert receive(b, a).result(10) == b"x"


@pytest.mark.parametrize("are_used", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("is_swapped", [False, True])
def test_lane_is_used_where_both_sides_have_one(
    make: Callable[..., Side], are_used: tuple[bool, bool], is_swapped: bool
) -> None:
    keys = sorted((zmq.curve_keypair() for _ in range(2)), reverse=is_swapped)
    a, b = (
        make(name, ChannelConfig(use_lanes=use), key=key)
        for name, use, key in zip(("a.cpu", "b.cpu"), are_used, keys, strict=True)
    )
    introduce([a, b])
    link(a, b)
    for exchange, size in enumerate((10, 300_000)):
        send(a, b, bytes(size), Tag(1, 0, exchange))
        send(b, a, bytes(size), Tag(1, 0, exchange))
        assert receive(b, a, Tag(1, 0, exchange)).result(10) == bytes(size)
        assert receive(a, b, Tag(1, 0, exchange)).result(10) == bytes(size)
    has_lane = [side.channel._lanes.get(other.peer_id) is not None for side, other in ((a, b), (b, a))]
    assert has_lane == [all(are_used)] * 2


def test_peer_that_sends_garbage_by_its_lane_loses_its_link_alone(make: Callable[..., Side]) -> None:
    a, b, c = sides = [make("a.cpu"), make("b.cpu"), make("c.cpu")]
    introduce(sides)
    link(a, b)
    link(c, b)
    lane = a.channel._lanes.get(b.peer_id)
    assert lane is not None
    a.run(lambda: lane.socket.send(bytes(100))).result(5)
    with pytest.raises(WorkerLost, match="lane record of 0 bytes"):
        receive(b, a).result(5)
    send(c, b, b"fine")
    assert receive(b, c).result(5) == b"fine"


def test_frames_arriving_in_another_order_find_their_receivers(make: Callable[..., Side]) -> None:
    a, b, c = sides = [make("a.cpu"), make("b.cpu"), make("c.cpu")]
    introduce(sides)
    for x, y in ((a, b), (b, c), (a, c)):
        link(x, y)
    for exchange in reversed(range(5)):
        send(a, c, b"a%d" % exchange, Tag(1, 0, exchange))
        send(b, c, b"b%d" % exchange, Tag(1, 0, exchange))
    for exchange in range(5):
        assert receive(c, b, Tag(1, 0, exchange)).result(10) == b"b%d" % exchange
        assert receive(c, a, Tag(1, 0, exchange)).result(10) == b"a%d" % exchange


def test_frames_of_a_retired_epoch_are_dropped_and_of_all_others_kept(pair: tuple[Side, Side]) -> None:
    a, b = pair
    oldest, old, new = Epoch(1, 0), Epoch(1, 1), Epoch(1, 3)
    send(a, b, b"old", epoch=old)
    send(a, b, b"new", epoch=new)
    assert receive(b, a, epoch=new).result(10) == b"new"
    b.run(lambda: b.channel.retire(old)).result(5)
    send(a, b, b"oldest", epoch=oldest)
    send(a, b, b"late", Tag(1, 8), epoch=old)
    send(a, b, b"newer", Tag(1, 8), epoch=new)
    assert receive(b, a, Tag(1, 8), epoch=new).result(10) == b"newer"
    assert receive(b, a, epoch=oldest).result(10) == b"oldest"
    for tag in (TAG, Tag(1, 8)):
        with pytest.raises(WorkerTimeout, match=r"a\.cpu"):
            receive(b, a, tag, epoch=old, timeout_s=0.05).result(10)


def test_abort_ends_a_blocking_wait_from_another_thread(pair: tuple[Side, Side]) -> None:
    a, b = pair
    waiting = receive(b, a, timeout_s=30)
    began = time.monotonic()
    b.channel.abort(EPOCH)
    with pytest.raises(StepAborted):
        waiting.result(5)
    assert time.monotonic() - began < 2
    with pytest.raises(StepAborted):
        receive(b, a, timeout_s=30).result(5)
    later = Epoch(EPOCH.start, EPOCH.n + 1)
    send(a, b, b"goes on", epoch=later)
    assert receive(b, a, epoch=later).result(5) == b"goes on"


def test_lost_peer_ends_the_wait_for_it_but_not_for_others(make: Callable[..., Side]) -> None:
    a, b, c = sides = [make("a.cpu"), make("b.cpu"), make("c.cpu")]
    introduce(sides)
    link(a, b)
    link(b, c)
    send(a, b, b"last words")
    waiting = b.run(lambda: b.channel.recv(a.peer_id, EPOCH, Tag(1, 99), time.monotonic() + 30))
    a.close()
    with pytest.raises(WorkerLost, match=r"a\.cpu"):
        waiting.result(5)
    assert receive(b, a).result(5) == b"last words"
    with pytest.raises(WorkerLost):
        send(b, a, b"anyone there?")
    send(c, b, b"still here")
    assert receive(b, c).result(5) == b"still here"
    a.close = lambda: None  # type: ignore[method-assign]  # closed already


def test_end_that_only_the_guard_saw_ends_the_wait(make: Callable[..., Side]) -> None:
    """As where a link is cut without a word: the sockets themselves have nothing to tell."""
    a, b = make("a.cpu"), make("b.cpu", ChannelConfig(spin_s=0))
    introduce([a, b])
    link(a, b)
    known = b.channel._links.get(a.peer_id)
    assert known is not None
    waiting = receive(b, a, timeout_s=30)
    if isinstance(known.path, DirectPath) and known.path.routing_id:
        b.channel._wakeups.post(Note("gone", a.peer_id, known.path.connection))
    else:
        b.channel._wakeups.post(Note("down", next(iter(known.candidates))))
    with pytest.raises(WorkerLost, match="the connection ended"):
        waiting.result(5)


def test_links_can_be_closed_and_opened_again(pair: tuple[Side, Side]) -> None:
    a, b = pair
    for side, other in ((a, b), (b, a)):
        peer = other.peer_id
        side.run(lambda: side.channel.disconnect(peer)).result(5)  # noqa: B023  (result() ends it at once)
        b.run(lambda: b.channel.wait([], time.monotonic() + 0.05)).result(5)
        a.run(lambda: a.channel.wait([], time.monotonic() + 0.05)).result(5)
        assert not a.run(lambda: a.channel.is_connected(b.peer_id)).result(5)
        assert not b.run(lambda: b.channel.is_connected(a.peer_id)).result(5)
        link(a, b)
        send(a, b, b"again", Tag(1, 100))
        assert receive(b, a, Tag(1, 100)).result(5) == b"again"


def test_unreachable_peer_is_named_with_what_was_tried(make: Callable[..., Side]) -> None:
    a, b = make("a.cpu"), make("b.cpu")
    introduce([a, b])
    key = b.factory.public_key
    waiting = a.run(lambda: a.channel.connect(b.peer_id, key, [("127.0.0.1", 1)], time.monotonic() + 0.3))
    with pytest.raises(WorkerTimeout, match=r"b\.cpu.*127\.0\.0\.1:1"):
        waiting.result(5)


def test_dial_that_is_refused_at_first_gets_through_once_admitted(make: Callable[..., Side]) -> None:
    a, b = make("a.cpu"), make("b.cpu")
    a.factory.allow(b.factory.public_key, b.peer_id, {"data"})
    address = [("127.0.0.1", b.channel.port)]
    one = a.run(lambda: a.channel.connect(b.peer_id, b.factory.public_key, address, time.monotonic() + 5))
    with pytest.raises(TimeoutError):
        one.result(0.3)
    b.factory.allow(a.factory.public_key, a.peer_id, {"data"})
    other = b.run(lambda: b.channel.connect(a.peer_id, a.factory.public_key, [], time.monotonic() + 5))
    one.result(10)
    other.result(10)


def test_wait_returns_for_a_guest_socket_and_for_wake(make: Callable[..., Side]) -> None:
    a = make("a.cpu")
    near, far = a.factory.pair()
    waiting = a.run(lambda: a.channel.wait([far], time.monotonic() + 30))
    near.send(b"work")
    assert waiting.result(5) == [far]
    far.recv()
    sleeping = a.run(lambda: a.channel.wait([far], time.monotonic() + 30))
    a.channel.wake()
    assert sleeping.result(5) == []
    assert a.run(lambda: a.channel.wait([far], time.monotonic() + 0.02)).result(5) == []
    near.close()
    far.close()


def test_peer_that_fills_its_inbox_loses_its_link_alone(make: Callable[..., Side]) -> None:
    a, b = make("a.cpu"), make("b.cpu")
    c = make("c.cpu", ChannelConfig(max_inbox_bytes=100_000))
    introduce([a, b, c])
    link(a, c)
    link(b, c)
    send(b, c, b"fine")
    for exchange in range(20):
        try:
            send(a, c, bytes(10_000), Tag(1, 0, exchange))
        except WorkerLost:
            break
    with pytest.raises(WorkerLost, match="wait unread"):
        receive(c, a, Tag(2, 0)).result(5)
    assert receive(c, b).result(5) == b"fine"


def test_both_sides_sending_more_than_the_queues_hold_still_finish(pair: tuple[Side, Side]) -> None:
    a, b = pair
    count, payload = 1500, bytes(70_000)

    def pump(side: Side, other: Side) -> int:
        for exchange in range(count):
            side.channel.send(other.peer_id, EPOCH, Tag(1, 0, exchange), payload)
        return sum(
            len(side.channel.recv(other.peer_id, EPOCH, Tag(1, 0, exchange), time.monotonic() + 10))
            for exchange in range(count)
        )

    both = [a.run(lambda: pump(a, b)), b.run(lambda: pump(b, a))]
    assert [future.result(60) for future in both] == [count * len(payload)] * 2


def test_wake_is_safe_from_many_threads(make: Callable[..., Side]) -> None:
    a = make("a.cpu")

    def wake_often() -> None:
        for _ in range(2000):
            a.channel.wake()

    threads = [threading.Thread(target=wake_often) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        a.run(lambda: a.channel.wait([], time.monotonic() + 0.01)).result(5)
    for thread in threads:
        thread.join()


def relayed(make: Callable[..., Side], relay: tuple[SocketFactory, RelayServer]) -> tuple[Side, Side]:
    """Two workers that no address of theirs reaches, linked through the relay."""
    factory, server = relay
    a, b = make("a.cpu"), make("b.cpu")
    introduce([a, b])
    for side in (a, b):
        factory.allow(side.factory.public_key, side.peer_id, {"relay"})
        endpoint = f"tcp://127.0.0.1:{server.port}"
        side.run(lambda: side.channel.use_relay(endpoint, factory.public_key, PeerId("coordinator"))).result(5)  # noqa: B023
    link(a, b, 0, 0)
    return a, b


def test_peers_that_cannot_reach_each_other_are_relayed(
    make: Callable[..., Side], relay: tuple[SocketFactory, RelayServer]
) -> None:
    a, b = relayed(make, relay)
    assert [s.run(lambda: s.channel.path(o.peer_id)).result(5) for s, o in ((a, b), (b, a))] == ["relayed"] * 2  # noqa: B023
    for exchange, size in enumerate([0, 1, 4096, 262144, 262145, 5_000_000]):
        payload = bytes(range(256)) * (size // 256) + bytes(size % 256)
        send(a, b, payload, Tag(1, 0, exchange))
        send(b, a, payload, Tag(1, 0, exchange))
        assert receive(b, a, Tag(1, 0, exchange)).result(10) == payload
        assert receive(a, b, Tag(1, 0, exchange)).result(10) == payload


def test_relayed_link_is_lost_when_frames_are(
    make: Callable[..., Side], relay: tuple[SocketFactory, RelayServer]
) -> None:
    factory, server = relay
    a, b = relayed(make, relay)
    send(a, b, b"1")
    assert receive(b, a).result(5) == b"1"
    dropped = server.num_dropped
    known = factory.registry._by_id
    kept, known[b.peer_id] = known[b.peer_id], AdmittedPeer(b.peer_id, b"", frozenset())
    send(a, b, b"2", Tag(1, 8))
    while server.num_dropped == dropped:
        a.run(lambda: a.channel.wait([], time.monotonic() + 0.01)).result(5)
    known[b.peer_id] = kept
    send(a, b, b"3", Tag(1, 9))
    with pytest.raises(WorkerLost, match="lost"):
        receive(b, a, Tag(1, 9)).result(10)


@pytest.mark.parametrize("is_relayed", [False, True])
def test_probe_measures_a_link(
    make: Callable[..., Side], relay: tuple[SocketFactory, RelayServer], is_relayed: bool
) -> None:
    if is_relayed:
        a, b = relayed(make, relay)
    else:
        a, b = make("a.cpu"), make("b.cpu")
        introduce([a, b])
        link(a, b)
    is_over = threading.Event()

    def serve() -> None:
        while not is_over.is_set():
            b.channel.wait([], time.monotonic() + 0.1)

    serving = b.run(serve)
    probed = a.run(lambda: a.channel.probe(b.peer_id, time.monotonic() + 20)).result(30)
    is_over.set()
    serving.result(5)
    assert 1e-6 < probed.round_trip_s < 1
    assert 1e6 < probed.bandwidth_bytes_per_s < 1e11
