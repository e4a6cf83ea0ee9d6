"""What strangers can cost the listener: bounded time, connections and memory, and never another visitor's turn."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from pathlib import Path

import pytest
import uvloop

from skynet.errors import ConfigError, DiscoveryError
from skynet.protocol.address_limits import AddressLimiter, RateLimit, plain_address
from skynet.protocol.admission import AdmissionListener, ListenerConfig
from skynet.protocol.hello import MAX_MESSAGE_BYTES, Hello, Refused, Welcome
from skynet.protocol.identity import SwarmKey
from tests.security.admission_world import HOST, LENGTH, Stranger, World, applicant, world

Run = Callable[[Coroutine[object, object, None]], None]
RUNNERS = pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
IMPATIENT = ListenerConfig(request_timeout_s=0.3)


async def _still_serves(swarm: World) -> None:
    assert (await swarm.ask(applicant())).welcome.swarm_name == "home"
    await swarm.settled()


@pytest.mark.parametrize(
    "first", [b"", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\x16\x03\x01\xff\xff" + b"\0" * 70000, b"\xff" * 100_000]
)
def test_plaintext_client_is_dropped(tmp_path: Path, first: bytes) -> None:
    async def main() -> None:
        async with world(tmp_path, config=IMPATIENT) as swarm:
            stranger = await swarm.connect(tls=False)
            await stranger.send(first)
            await stranger.closed_by_listener()
            stranger.close()
            await swarm.settled()
            assert swarm.listener.stats.failed == 1
            await _still_serves(swarm)

    asyncio.run(main())


@pytest.mark.parametrize(
    "sent",
    [
        LENGTH.pack(MAX_MESSAGE_BYTES + 1),
        LENGTH.pack(2**32 - 1) + b"x" * 200_000,
        LENGTH.pack(5) + b"hello",
        LENGTH.pack(0),
        LENGTH.pack(MAX_MESSAGE_BYTES) + b"\x91" * MAX_MESSAGE_BYTES,
    ],
)
def test_oversized_or_senseless_request_is_dropped_or_refused(tmp_path: Path, sent: bytes) -> None:
    async def main() -> None:
        async with world(tmp_path, config=IMPATIENT) as swarm:
            stranger = await swarm.connect()
            await stranger.receive()
            await stranger.send(sent)
            assert b"welcome" not in await stranger.closed_by_listener()
            stranger.close()
            await _still_serves(swarm)
            assert swarm.listener.stats.welcomed == 1

    asyncio.run(main())


def test_endless_request_is_cut_off_and_not_buffered(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path, config=IMPATIENT) as swarm:
            stranger = await swarm.connect()
            await stranger.receive()
            sent = 0
            with contextlib.suppress(OSError):
                async with asyncio.timeout(20):
                    while not stranger.writer.is_closing():
                        stranger.writer.write(LENGTH.pack(100) + b"x" * 65536)
                        await stranger.writer.drain()
                        sent += 65536
            stranger.close()
            await _still_serves(swarm)
            assert sent < 32 << 20, "the kernel's buffers and ours hold some, then the sender must wait or is cut off"

    asyncio.run(main())


def test_slow_request_ends_at_its_deadline(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path, config=IMPATIENT) as swarm:
            stranger = await swarm.connect()
            await stranger.receive()

            async def drip() -> None:
                while True:
                    await stranger.send(b"\0")
                    await asyncio.sleep(0.02)

            dripping = asyncio.create_task(drip())
            started = asyncio.get_running_loop().time()
            await stranger.closed_by_listener()
            assert asyncio.get_running_loop().time() - started < 10
            dripping.cancel()
            stranger.close()
            await _still_serves(swarm)

    asyncio.run(main())


@pytest.mark.parametrize("tls", [False, True])
@RUNNERS
def test_silent_connection_ends_at_its_deadline(tmp_path: Path, tls: bool, run: Run) -> None:
    async def main() -> None:
        async with world(tmp_path, config=IMPATIENT) as swarm:
            strangers = [await swarm.connect(tls=tls) for _ in range(5)]
            for stranger in strangers:
                await stranger.closed_by_listener()
                stranger.close()
            await swarm.settled()
            assert swarm.listener.stats.failed == 5

    run(main())


def test_client_that_never_reads_its_answer_is_let_go(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path, config=IMPATIENT) as swarm:
            stranger = await swarm.connect()
            stranger.writer.transport.pause_reading()  # type: ignore[attr-defined]
            await stranger.send_framed(b"x" * 100)
            await swarm.settled()
            stranger.close()

    asyncio.run(main())


def test_crowd_of_slow_clients_does_not_keep_an_honest_one_out(tmp_path: Path) -> None:
    async def main() -> None:
        config = ListenerConfig(request_timeout_s=30, max_connections=8)
        async with world(tmp_path, config=config) as swarm:
            crowd: list[Stranger] = []
            for i in range(24):
                crowd.append(await swarm.connect(tls=False, source=f"127.0.0.{i % 3 + 2}"))
                assert swarm.listener.num_connections <= 8
            await swarm.ask(applicant(), timeout_s=15)
            assert swarm.listener.stats.displaced >= 16
            for stranger in crowd:
                stranger.close()

    asyncio.run(main())


def test_address_that_knocks_too_often_is_not_heard_and_others_are(tmp_path: Path) -> None:
    async def main() -> None:
        config = ListenerConfig(each_address=RateLimit(burst=3, per_s=0.001))
        async with world(tmp_path, config=config) as swarm:
            for _ in range(3):
                (await swarm.connect(source="127.0.0.9")).close()
            for _ in range(5):
                stranger = await swarm.connect(tls=False, source="127.0.0.9")
                assert await stranger.closed_by_listener() == b""
                stranger.close()
            assert swarm.listener.stats.limited == 5
            await _still_serves(swarm)

    asyncio.run(main())


def test_busy_listener_is_asked_again_until_it_hears(tmp_path: Path) -> None:
    async def main() -> None:
        config = ListenerConfig(each_address=RateLimit(burst=1, per_s=5))
        async with world(tmp_path, config=config) as swarm:
            await asyncio.gather(*(swarm.ask(applicant(), timeout_s=30) for _ in range(4)))
            assert swarm.listener.stats.welcomed == 4
            assert swarm.listener.stats.limited > 0

    asyncio.run(main())


def test_waiting_for_a_listener_that_never_hears_has_an_end(tmp_path: Path) -> None:
    async def main() -> None:
        config = ListenerConfig(each_address=RateLimit(burst=0, per_s=0))
        async with world(tmp_path, config=config) as swarm:
            with pytest.raises(DiscoveryError, match=r"within 0\.3 s"):
                await swarm.ask(applicant(), timeout_s=0.3)

    asyncio.run(main())


def test_failing_decision_costs_one_visitor_its_answer_and_nobody_else(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async def admit(_hello: Hello, _source: str) -> Welcome | Refused:
            raise RuntimeError("a fault of ours")

        async with AdmissionListener(SwarmKey.generate(), admit, [HOST]) as listener:
            swarm = World(SwarmKey.generate(), None, None, listener)  # type: ignore[arg-type]
            for _ in range(2):
                with pytest.raises(DiscoveryError, match="log says why"):
                    await swarm.ask(applicant(), timeout_s=0.3)

    asyncio.run(main())
    assert "a fault of ours" in caplog.text


@RUNNERS
def test_stopping_twice_closes_everything(tmp_path: Path, run: Run) -> None:
    async def main() -> None:
        async with world(tmp_path) as swarm:
            stranger = await swarm.connect()
            await swarm.listener.stop()
            await swarm.listener.stop()
            await stranger.closed_by_listener()
            stranger.close()
            assert swarm.listener.num_connections == 0
            with pytest.raises(DiscoveryError):
                await swarm.ask(applicant(), timeout_s=1)

    run(main())


def test_taken_port_is_named_with_the_fix(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as swarm:
            second = AdmissionListener(SwarmKey.generate(), None, [HOST], port=swarm.listener.port)  # type: ignore[arg-type]
            with pytest.raises(ConfigError, match=f"{HOST} port {swarm.listener.port}.*--port"):
                second.start()

    asyncio.run(main())


def test_limiter_refills_over_time_and_forgets_the_stalest() -> None:
    limiter = AddressLimiter(RateLimit(burst=2, per_s=1), RateLimit(burst=100, per_s=100), max_addresses=3)
    assert [limiter.allow("a", 0.0) for _ in range(3)] == [True, True, False]
    assert limiter.allow("a", 1.0)
    assert not limiter.allow("a", 1.5)
    for address in "bcd":
        limiter.allow(address, 2.0)
    assert len(limiter) == 3


def test_limiter_bounds_all_addresses_together() -> None:
    limiter = AddressLimiter(RateLimit(burst=1, per_s=1), RateLimit(burst=5, per_s=1))
    assert sum(limiter.allow(f"fe80::{i:x}", 0.0) for i in range(100)) == 5


def test_mapped_addresses_are_unwrapped() -> None:
    assert plain_address("::ffff:192.168.1.7") == "192.168.1.7"
    assert plain_address("fe80::1%eth0") == "fe80::1%eth0"
