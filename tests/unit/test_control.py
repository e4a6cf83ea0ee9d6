"""A control link asks a silent coordinator whether it is there before it gives it up."""

from __future__ import annotations

import asyncio

import pytest
import zmq

from skynet.protocol.codec import Decoder, encode
from skynet.protocol.control import ControlLink, LinkLost
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
