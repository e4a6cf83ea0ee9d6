"""Nobody unknown gets in, the sender is what its key says, and a denied peer is gone at once."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq

from skynet.protocol.ids import PeerId
from skynet.protocol.sockets import Port, Received, SocketConfig, SocketFactory
from skynet.protocol.zap import answer

ALICE, BOB = PeerId("alice.cpu"), PeerId("bob.cpu")


class Swarm:
    """Factories with keys of their own, closed after the test."""

    def __init__(self) -> None:
        self.factories: list[SocketFactory] = []
        self.ports: list[Port] = []

    def factory(self) -> SocketFactory:
        self.factories.append(SocketFactory(*zmq.curve_keypair(), config=SocketConfig(handshake_timeout_s=1.0)))
        return self.factories[-1]

    def server(self, factory: SocketFactory, on_disconnected: Callable[[PeerId, int], None] | None = None) -> Port:
        self.ports.append(factory.bind_router("data", ["127.0.0.1"], on_disconnected=on_disconnected))
        return self.ports[-1]

    def client(self, factory: SocketFactory, server: SocketFactory, port: Port) -> Port:
        endpoint = f"tcp://127.0.0.1:{port.number}"
        self.ports.append(factory.connect_dealer(endpoint, server.public_key, PeerId("server")))
        return self.ports[-1]

    def close(self) -> None:
        for port in self.ports:
            port.close()
        for factory in self.factories:
            factory.close()


@pytest.fixture
def swarm() -> Iterator[Swarm]:
    built = Swarm()
    yield built
    built.close()


def next_message(port: Port, timeout_s: float = 5.0) -> Received | None:
    """The next admitted message, None if none came in time."""
    while port.socket.poll(int(timeout_s * 1000)):
        if (received := port.receive()) is not None:
            return received
    return None


def test_admitted_peer_is_named_by_its_key_and_answered(swarm: Swarm) -> None:
    server, alice = swarm.factory(), swarm.factory()
    server.allow(alice.public_key, ALICE, {"data"})
    listening = swarm.server(server)
    dialling = swarm.client(alice, server, listening)
    dialling.socket.send_multipart([b"I am bob.cpu", b"payload"])
    received = next_message(listening)
    assert received is not None
    assert received.peer_id == ALICE
    assert [f.bytes for f in received.frames] == [b"I am bob.cpu", b"payload"]
    listening.socket.send_multipart([received.routing_id, b"answer"])
    answered = next_message(dialling)
    assert answered is not None
    assert (answered.peer_id, answered.frames[0].bytes) == (PeerId("server"), b"answer")


@pytest.mark.parametrize("domains", [None, {"control"}])
def test_key_that_is_not_admitted_to_the_domain_gets_nothing_through(swarm: Swarm, domains: set[str] | None) -> None:
    server, alice, bob = swarm.factory(), swarm.factory(), swarm.factory()
    if domains is not None:
        server.allow(alice.public_key, ALICE, domains)
    server.allow(bob.public_key, BOB, {"data"})
    listening = swarm.server(server)
    swarm.client(alice, server, listening).socket.send(b"let me in")
    assert next_message(listening, 0.3) is None
    swarm.client(bob, server, listening).socket.send(b"hello")
    received = next_message(listening)
    assert received is not None
    assert received.peer_id == BOB


def test_client_with_the_wrong_server_key_is_not_served(swarm: Swarm) -> None:
    server, alice, other = swarm.factory(), swarm.factory(), swarm.factory()
    server.allow(alice.public_key, ALICE, {"data"})
    listening = swarm.server(server)
    swarm.client(alice, other, listening).socket.send(b"to someone else")
    assert next_message(listening, 0.3) is None


def test_plaintext_client_is_not_served(swarm: Swarm) -> None:
    listening = swarm.server(swarm.factory())
    with zmq.Context() as context, context.socket(zmq.DEALER) as plain:
        plain.linger = 0
        plain.connect(f"tcp://127.0.0.1:{listening.number}")
        plain.send(b"no keys at all")
        assert next_message(listening, 0.3) is None


def test_nobody_gets_in_once_the_zap_handler_is_dead(swarm: Swarm) -> None:
    server, alice, bob = swarm.factory(), swarm.factory(), swarm.factory()
    server.allow(alice.public_key, ALICE, {"data"})
    server.allow(bob.public_key, BOB, {"data"})
    listening = swarm.server(server)
    swarm.client(alice, server, listening).socket.send(b"while it lives")
    assert next_message(listening) is not None
    server._zap_stop.send(b"")
    server._zap.join(5.0)
    swarm.client(bob, server, listening).socket.send(b"after its death")
    assert next_message(listening, 1.5) is None


def test_zap_answers_only_what_it_understands(swarm: Swarm) -> None:
    registry = swarm.factory().registry
    request = [b"env", b"", b"1.0", b"7", b"data", b"10.0.0.1", b"", b"NULL"]
    refused = answer(request, registry, now=0.0)
    assert refused is not None
    assert refused[4] == b"400"
    for hostile in ([], [b""] * 7, [b"env", b"", b"2.0", b"7", b"data", b"a", b"", b"CURVE", b"k" * 32]):
        assert answer(hostile, registry, now=0.0) is None
    short_key = answer([*request[:7], b"CURVE", b"short"], registry, now=0.0)
    assert short_key is not None
    assert short_key[4] == b"400"


def test_denied_peer_is_cut_at_once_and_cannot_come_back(swarm: Swarm) -> None:
    gone = threading.Event()
    server, alice = swarm.factory(), swarm.factory()
    server.allow(alice.public_key, ALICE, {"data"})
    listening = swarm.server(server, on_disconnected=lambda peer, _: gone.set() if peer == ALICE else None)
    dialling = swarm.client(alice, server, listening)
    dialling.socket.send(b"first")
    assert next_message(listening) is not None
    dialling.socket.send(b"queued, not yet read")
    listening.socket.poll(5000)
    server.deny(ALICE)
    assert gone.wait(2.0), "the live connection wasn't cut"
    assert next_message(listening, 0.1) is None, "a frame of a denied peer was processed"
    with contextlib.suppress(zmq.Again):
        dialling.socket.send(b"again", zmq.NOBLOCK)
    swarm.client(alice, server, listening).socket.send(b"and again")
    assert next_message(listening, 0.5) is None


def test_denying_one_peer_leaves_another_connected(swarm: Swarm) -> None:
    gone: list[PeerId] = []
    first_gone = threading.Event()
    server, alice, bob = swarm.factory(), swarm.factory(), swarm.factory()
    server.allow(alice.public_key, ALICE, {"data"})
    server.allow(bob.public_key, BOB, {"data"})

    def note(peer: PeerId, _: int) -> None:
        gone.append(peer)
        first_gone.set()

    listening = swarm.server(server, on_disconnected=note)
    alices, bobs = swarm.client(alice, server, listening), swarm.client(bob, server, listening)
    for port in (alices, bobs):
        port.socket.send(b"hello")
        assert next_message(listening) is not None
    server.deny(ALICE)
    assert first_gone.wait(2.0)
    bobs.socket.send(b"still here")
    received = next_message(listening)
    assert received is not None
    assert (received.peer_id, gone) == (BOB, [ALICE])


def test_denying_one_peer_leaves_those_alone_who_have_not_said_yet_who_they_are(swarm: Swarm) -> None:
    gone, bob_in = threading.Event(), threading.Event()
    server, alice, bob = swarm.factory(), swarm.factory(), swarm.factory()
    server.allow(alice.public_key, ALICE, {"data"})
    server.allow(bob.public_key, BOB, {"data"})
    listening = swarm.server(server, on_disconnected=lambda peer, _: gone.set() if peer == ALICE else None)
    swarm.client(alice, server, listening).socket.send(b"hello")
    assert next_message(listening) is not None
    endpoint, ended_for_bob = f"tcp://127.0.0.1:{listening.number}", threading.Event()
    bobs = bob.connect_dealer(
        endpoint,
        server.public_key,
        PeerId("server"),
        on_connected=bob_in.set,
        on_disconnected=lambda _, __: ended_for_bob.set(),
    )
    swarm.ports.append(bobs)
    assert bob_in.wait(5)
    with socket.create_connection(("127.0.0.1", listening.number), timeout=5) as shaking_hands:
        assert shaking_hands.recv(1), "its greeting"
        server.deny(ALICE)
        assert gone.wait(2)
        shaking_hands.settimeout(0.01)
        assert not ended(shaking_hands)
    bobs.socket.send(b"at last")
    received = next_message(listening)
    assert received is not None
    assert received.peer_id == BOB
    assert not ended_for_bob.is_set()


@pytest.mark.parametrize("is_replaced", [True, False])
def test_silent_connection_of_a_withdrawn_key_is_cut_at_its_first_frame(swarm: Swarm, is_replaced: bool) -> None:
    connected, gone = threading.Event(), threading.Event()
    server, old, new = swarm.factory(), swarm.factory(), swarm.factory()
    server.allow(old.public_key, ALICE, {"data"})
    listening = swarm.server(server)
    dialling = old.connect_dealer(
        f"tcp://127.0.0.1:{listening.number}",
        server.public_key,
        PeerId("server"),
        on_connected=connected.set,
        on_disconnected=lambda _, __: gone.set(),
    )
    swarm.ports.append(dialling)
    assert connected.wait(5)
    if is_replaced:
        server.allow(new.public_key, ALICE, {"data"})
        fresh = swarm.client(new, server, listening)
        fresh.socket.send(b"new key")
        assert next_message(listening) is not None
    else:
        server.deny(ALICE)
    dialling.socket.send(b"old key")
    assert next_message(listening, 0.3) is None
    assert gone.wait(2)
    if is_replaced:
        fresh.socket.send(b"still here")
        received = next_message(listening)
        assert received is not None
        assert received.frames[0].bytes == b"still here"


def test_new_key_of_a_peer_replaces_its_old_one(swarm: Swarm) -> None:
    server, old, new = swarm.factory(), swarm.factory(), swarm.factory()
    server.allow(old.public_key, ALICE, {"data"})
    listening = swarm.server(server)
    server.allow(new.public_key, ALICE, {"data"})
    swarm.client(old, server, listening).socket.send(b"old key")
    assert next_message(listening, 0.3) is None
    swarm.client(new, server, listening).socket.send(b"new key")
    received = next_message(listening)
    assert received is not None
    assert received.frames[0].bytes == b"new key"
    with pytest.raises(ValueError, match="already belongs to alice"):
        server.allow(new.public_key, BOB, {"data"})


def test_message_of_too_many_frames_is_dropped_and_others_are_served(swarm: Swarm) -> None:
    server, alice, bob = swarm.factory(), swarm.factory(), swarm.factory()
    server.allow(alice.public_key, ALICE, {"data"})
    server.allow(bob.public_key, BOB, {"data"})
    listening = swarm.server(server)
    swarm.client(alice, server, listening).socket.send_multipart([b"x"] * 5000)
    swarm.client(bob, server, listening).socket.send(b"hello")
    received = next_message(listening)
    assert received is not None
    assert received.peer_id == BOB


def test_silent_connections_of_one_host_are_bounded_and_an_admitted_peer_is_served(swarm: Swarm) -> None:
    server, bob = swarm.factory(), swarm.factory()
    server.allow(bob.public_key, BOB, {"data"})
    listening = swarm.server(server)
    bobs = swarm.client(bob, server, listening)
    bobs.socket.send(b"before")
    assert next_message(listening) is not None
    limit = server.config.guard.max_unidentified_per_host
    with contextlib.ExitStack() as open_sockets:
        silent = [
            open_sockets.enter_context(socket.create_connection(("127.0.0.1", listening.number), timeout=0.01))
            for _ in range(limit + 10)
        ]
        is_closed = [ended(each) for each in silent]
        assert 10 <= sum(is_closed) <= 20
        bobs.socket.send(b"during")
        received = next_message(listening)
    assert received is not None
    assert received.frames[0].bytes == b"during"


def ended(connection: socket.socket) -> bool:
    """Whether the other side closed it; a live one has sent its greeting and waits."""
    try:
        while connection.recv(4096):
            pass
    except TimeoutError:
        return False
    except OSError:
        return True
    return True


def test_event_loop_receives_and_sends_many_messages_both_ways(swarm: Swarm) -> None:
    server, alice = swarm.factory(), swarm.factory()
    server.allow(alice.public_key, ALICE, {"data"})

    async def echo() -> None:
        listening = server.asynchronous(swarm.server(server))
        dialling = alice.asynchronous(
            alice.connect_dealer(f"tcp://127.0.0.1:{listening.number}", server.public_key, PeerId("server"))
        )

        async def serve() -> None:
            for _ in range(500):
                received = await listening.receive()
                assert listening.send([f.buffer for f in received.frames], received.routing_id)

        try:
            async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
                tasks.create_task(serve())
                for index in range(500):
                    assert dialling.send([index.to_bytes(4, "big")])
                    if index % 7 == 0:
                        await asyncio.sleep(0)
                for index in range(500):
                    received = await dialling.receive()
                    assert received.frames[0].bytes == index.to_bytes(4, "big")
        finally:
            dialling.close()
            listening.close()

    asyncio.run(echo())


def test_sockets_are_made_in_one_module_only() -> None:
    root = Path(__file__).resolve().parents[2]
    makers = re.compile(r"\.socket\((\s*zmq\.|kind|zmq\b)|zmq\.(asyncio\.)?(Socket|Context)\(|get_monitor_socket")
    found = [
        str(path.relative_to(root))
        for folder in ("skynet", "cli")
        for path in sorted((root / folder).rglob("*.py"))
        if makers.search(path.read_text())
    ]
    assert found == ["skynet/protocol/sockets.py"]
