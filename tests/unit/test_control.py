"""A control link asks a silent coordinator whether it is there before it gives it up; and floods are contained."""

from __future__ import annotations

import asyncio
import time

import pytest
import zmq

from skynet.protocol.allowance import Allowance
from skynet.protocol.codec import Decoder, encode
from skynet.protocol.control import ControlLink, LinkLost, Switchboard
from skynet.protocol.entrance import COORDINATOR
from skynet.protocol.ids import PeerId
from skynet.protocol.messages import Ping, Pong
from skynet.protocol.sockets import SocketFactory

LEASE_S = 0.25


@pytest.mark.parametrize("num_answers", [0, 1])
def test_a_coordinator_that_says_nothing_for_three_leases_is_lost(num_answers: int) -> None:
    asyncio.run(listen_to_one_that_answers(num_answers))


async def listen_to_one_that_answers(num_answers: int) -> None:
    """Each answer is followed by three leases of silence at most, and two questions."""
    loop = asyncio.get_running_loop()
    server, node = SocketFactory(*zmq.curve_keypair()), SocketFactory(*zmq.curve_keypair())
    server.allow(node.public_key, PeerId("node.cpu"), {"control"})
    coordinator = server.asynchronous(server.bind_router("control", ["127.0.0.1"]))
    dialling = node.connect_dealer(f"tcp://127.0.0.1:{coordinator.number}", server.public_key, COORDINATOR)
    link = ControlLink(node.asynchronous(dialling), (Pong,), LEASE_S, None)
    asked: asyncio.Queue[int] = asyncio.Queue()

    async def answer() -> None:
        decoder = Decoder(Ping)
        for number in range(num_answers + 2):
            received = await coordinator.receive()
            ping = decoder.decode([frame.buffer for frame in received.frames])[0]
            asked.put_nowait(ping.nonce)
            if number < num_answers:
                coordinator.send(encode(Pong(nonce=ping.nonce)), received.routing_id)

    answering = asyncio.ensure_future(answer())
    try:
        async with asyncio.timeout(10):
            for _ in range(num_answers):
                assert await link.receive() == Pong(nonce=1)
            silent_since = loop.time()
            with pytest.raises(LinkLost, match="nothing from the coordinator"):
                await link.receive()
            assert loop.time() - silent_since > 2.9 * LEASE_S
            assert [await asked.get() for _ in range(num_answers + 2)] == [1] * num_answers + [1, 2]
    finally:
        answering.cancel()
        await link.close()
        coordinator.close()
        node.close()
        server.close()


def test_a_flood_of_one_peer_leaves_the_loop_to_others_and_ends_with_its_connection() -> None:
    asyncio.run(flood())


async def flood() -> None:
    """Before, nothing else ran on the coordinator's loop as long as messages waited."""
    loop = asyncio.get_running_loop()
    server, node, flooder = (SocketFactory(*zmq.curve_keypair()) for _ in range(3))
    honest, greedy = PeerId("node.cpu"), PeerId("flooder.c-1")
    server.allow(node.public_key, honest, {"control"})
    server.allow(flooder.public_key, greedy, {"control"})
    port = server.asynchronous(server.bind_router("control", ["127.0.0.1"]))
    flooded = asyncio.Event()

    def on_flood(peer: PeerId) -> None:
        assert peer == greedy
        server.suspend(peer)
        flooded.set()

    def answer(peer: PeerId, ping: Ping) -> None:
        board.send(peer, Pong(nonce=ping.nonce))

    board: Switchboard[Ping] = Switchboard(port, (Ping,), answer, lambda _: None, on_flood, Allowance(0.1, 0.2))
    running = asyncio.ensure_future(board.run())
    endpoint = f"tcp://127.0.0.1:{port.number}"
    dialling = node.connect_dealer(endpoint, server.public_key, COORDINATOR)
    link = ControlLink(node.asynchronous(dialling), (Pong,), 5.0, None)
    until = loop.time() + 2.0
    flooding = asyncio.create_task(asyncio.to_thread(send_until_cut, flooder, endpoint, server.public_key, until))
    gaps = []
    try:
        while not flooded.is_set() and loop.time() < until:
            before = time.monotonic()
            link.send(Ping(nonce=7))
            assert await link.receive() == Pong(nonce=7)
            gaps.append(time.monotonic() - before)
        assert flooded.is_set(), "it was never cut off"
        assert len(gaps) > 3
        assert max(gaps) < 1.0
        link.send(Ping(nonce=8))
        assert await link.receive() == Pong(nonce=8)
    finally:
        await flooding
        running.cancel()
        await link.close()
        port.close()
        for factory in (node, flooder, server):
            factory.close()


def send_until_cut(factory: SocketFactory, endpoint: str, server_key: bytes, until: float) -> None:
    """Say something, and again, as fast as it goes."""
    port = factory.connect_dealer(endpoint, server_key, COORDINATOR)
    frames = encode(Ping(nonce=1))
    while time.monotonic() < until:
        if port.socket.poll(100, zmq.POLLOUT):
            port.socket.send_multipart(frames, zmq.NOBLOCK)
    port.close()
